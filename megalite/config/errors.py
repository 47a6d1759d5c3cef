"""Exceptions whose text is the message for the user."""


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: the value, the rule and a remedy."""


class TrainingError(RuntimeError):
    """The run cannot continue unless the user changes something."""
