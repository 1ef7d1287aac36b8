"""The one error class of the trainer: what was given, what was expected, the fix."""

from sparseflash.common.errors import SparseFlashError


class TrainError(SparseFlashError):
    """A problem the user can fix; its message is one line and is shown without a traceback."""
