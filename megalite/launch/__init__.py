"""The processes of a run: which rank this is, how ranks meet and stay in touch, how they stop."""
