"""What a run tells: metrics on disk, a progress line, a plot."""
