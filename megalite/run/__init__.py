"""A run: its steps, what is evaluated, saved and reported, and when it stops."""
