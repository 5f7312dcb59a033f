"""The errors a person may meet. One line for people in ``str(error)``, details for logs in ``details``.

Everything that is the user's to mend derives from :class:`LwmError`; the command prints it as one line and
exits with :attr:`LwmError.exit_code`. So it does with an OSError that names a file, or that a full disk raises, and
exits with 1. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class LwmError(Exception):
    """A failure that is told in one line: who, what was got, what was expected, what to do.

    Args:
        message: the line for people, without a trailing full stop.
        details: further text for logs (a traceback, a list of files); never shown unless asked for.
    """

    exit_code = 1

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class UsageError(LwmError):
    """The command was called wrongly: a bad option, a folder that is not a run, a file that is missing."""

    exit_code = 2


class ConfigError(LwmError):
    """One or more mistakes in the configuration, all told at once.

    ``problems`` holds one line a mistake, each ``file:line: key: what is wrong; what to do``.
    """

    exit_code = 2

    def __init__(self, problems: list[str] | str, *, details: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), details=details)


class PluginError(LwmError):
    """A plugin is missing, broken, incompatible, disabled, ambiguous or unusable here."""

    exit_code = 2


class UnsupportedError(LwmError, NotImplementedError):
    """A combination that a plugin does not support and refuses, with the reason. Nothing falls back silently."""

    exit_code = 2


class ShapeError(LwmError, ValueError):
    """An array, a length or a mesh does not have the size that is needed."""

    exit_code = 2


class DataError(LwmError):
    """A corpus, a file or a batch cannot be used: missing, empty, or not what its name says."""


class CheckpointError(LwmError):
    """A checkpoint is missing, incomplete, or does not match its manifest."""


class EndedElsewhereError(LwmError):
    """Another process of the same run has failed or was stopped, and that one says why: the command prints nothing.

    Args:
        exit_code: the code that the other process ends with, and this one too.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run has ended it, and says why")
        self.exit_code = exit_code


class TrainingError(LwmError):
    """Training cannot go on: the loss or a gradient is not finite."""
