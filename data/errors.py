"""The errors of the lower floors. Every message is one sentence that says what to do next."""


class PerennialError(Exception):
    """Base of every error this project raises on purpose; its text is meant for the user."""


class InvalidInput(PerennialError):
    """The caller's value is wrong; the message says which and what is accepted."""


class UnsupportedModel(InvalidInput):
    """The checkpoint's architecture, or one of its options, has no implementation here."""


class CorruptData(PerennialError):
    """A file or record is damaged, truncated, or newer than this version can read."""


class Infeasible(PerennialError):
    """No configuration satisfies the constraints (memory, devices) that were given."""
