"""Generation and evaluation with trained weights."""
