"""The optimizer and the learning-rate curve."""
