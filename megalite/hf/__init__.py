"""Folders of Hugging Face models, and Megatron-LM checkpoints of old: in, out, and whether both sides agree."""
