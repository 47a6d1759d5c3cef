"""The plain model, the table of its cuts, and its names elsewhere."""
