"""A training run, from the command line to the last checkpoint; docs/design.md has the way through these modules."""
