"""Every error the library raises: what we got, what we need, what to do."""

from __future__ import annotations


class NTKLazyError(Exception):
    """Base of all errors of this library; an error of the user's model reaches the user as it is."""


class ArgumentError(NTKLazyError, ValueError):
    """An argument that no product is spent on; the parent of the more specific ones below."""


class ShapeError(ArgumentError):
    """A tensor whose shape, dtype or device does not fit the operator it meets."""


class NonFiniteError(ArgumentError):
    """A NaN or an infinity, in the data, in the parameters or in what the operator returned."""


class UnsupportedModuleError(ArgumentError):
    """A module whose Jacobian would be wrong or does not exist; the message names the module and the cure."""


class DegenerateError(ArgumentError):
    """A quantity that is not defined for this input, such as the cosine with a zero vector."""


class BudgetError(ArgumentError):
    """A result or a working set that does not fit the memory it was given.

    Attributes:
        requested_bytes: What the smallest possible step would take.
        available_bytes: What it was allowed.
        largest_chunk: The largest number of examples that fits; 0 if not even one does.
    """

    def __init__(self, message: str, *, requested_bytes: int, available_bytes: int, largest_chunk: int = 0) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.available_bytes = available_bytes
        self.largest_chunk = largest_chunk


class SecondDerivativeError(NTKLazyError, RuntimeError):
    """A gradient that was computed without a graph of its own, and is differentiated again."""


class NotConvergedError(NTKLazyError):
    """An iteration that ended before all that was asked for had been found.

    Attributes:
        result: The partial ``EigenResult``; its ``converged`` mask says which pairs may be used.
    """

    def __init__(self, message: str, *, result: object) -> None:
        super().__init__(message)
        self.result = result
