"""Checkpoints: one folder that any topology loads, safetensors and JSON only, complete or not there."""
