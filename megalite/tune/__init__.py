"""Training a part of the model, or a little beside it."""
