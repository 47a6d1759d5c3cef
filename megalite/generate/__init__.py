"""Text from a model at any tensor and pipeline parallel layout."""
