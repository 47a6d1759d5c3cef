"""Ranks and what they say to each other: mesh, groups, cuts, tensor-parallel modules, gradient buffers."""
