"""What a user can get wrong, as exceptions whose text is the message."""


class ConfigError(ValueError):
    """A mistake of the user's: one line with the value, the rule and a remedy."""


class TrainingError(RuntimeError):
    """The run cannot go on, and the user has to change something."""
