"""One rank's stages of the model: what runs forward, and what learns."""
