"""One rank's part of the model at work: what runs forward, and what learns."""
