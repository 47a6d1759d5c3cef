"""A training run, from the command line to the last checkpoint; docs/design.md has the way through these modules."""

from collections.abc import Callable

Say = Callable[[str], None]
"""Prints a line for the user, on one rank."""
