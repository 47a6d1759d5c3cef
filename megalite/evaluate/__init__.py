"""What a model is worth: held-out loss, answers to questions, choices by likelihood."""
