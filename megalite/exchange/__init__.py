"""Weights in other formats: Hugging Face, Megatron-LM, peft; adapters and their bases."""
