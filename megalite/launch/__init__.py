"""The processes of a run: which rank this process is, how ranks connect and watch each other, how they stop."""
