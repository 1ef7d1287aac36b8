"""The errors a user of this library can meet."""


class SparseFlashError(ValueError):
    """Bad input: the message says what was given, what was expected and how to fix it."""


class PlanError(SparseFlashError):
    """A plan whose fields contradict each other or the tensors it is used with."""


class BackendError(SparseFlashError, NotImplementedError):
    """No backend can run the call; the message lists every backend with every reason."""


class DerivativeError(SparseFlashError, RuntimeError):
    """A derivative that there is not; torch's own refusals are `RuntimeError`s, and so is this."""


def require(*rules: tuple[bool, str], error: type[SparseFlashError] = SparseFlashError) -> None:
    """Raise `error` with the message of the first rule whose condition is false."""
    for holds, message in rules:
        if not holds:
            raise error(message)
