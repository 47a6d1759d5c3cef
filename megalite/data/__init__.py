"""Text to token windows: indexed files, tokenizers, sample order, datasets and n-gram baselines; no torch."""
