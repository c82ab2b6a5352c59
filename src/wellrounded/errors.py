"""The errors of wellrounded. Each message says what was asked, what was seen and what to do."""


class WellRoundedError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1
    speaks = True  # False in a process whose run another one speaks for


class UsageError(WellRoundedError):
    """The request itself cannot be carried out: a wrong value, a missing file, a model that does not fit the task."""

    exit_code = 2


class CheckpointError(WellRoundedError):
    """A file on disk is damaged, incomplete, or in a format this version does not know."""


class NumericsError(WellRoundedError):
    """NaN or Inf in weights or activations, or a Hessian that no damping makes positive definite."""


class OutOfMemory(WellRoundedError):  # noqa: N818  # what it is called everywhere
    """Memory does not suffice, and there is nothing left to do without."""
