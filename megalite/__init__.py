"""megalite: large language models split over tensor- and pipeline-parallel ranks, small enough to read."""

__version__ = "0.1.0"
