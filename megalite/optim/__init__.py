"""Optimizers, loss scaling and the learning-rate schedule."""
