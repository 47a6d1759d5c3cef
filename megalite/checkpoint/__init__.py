"""Checkpoints: one folder that any topology loads, safetensors and JSON only, complete or not there."""

from megalite.checkpoint.folder import find, latest, read_manifest
from megalite.checkpoint.load import load
from megalite.checkpoint.save import save

__all__ = ["find", "latest", "load", "read_manifest", "save"]
