"""Rows of files, tokenizers, conversations and chat templates. No torch."""
