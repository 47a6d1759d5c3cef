"""What a run records and shows: metrics, progress lines, plots, traces."""
