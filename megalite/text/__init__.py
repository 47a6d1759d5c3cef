"""Text: rows of files, tokenizers, conversations and chat templates."""
