"""Values on the rows of an operator, as the measures read them: one float64 column for each vector.

A target, an output or a residual comes in the shape the model gives it, ``(N, C)``; an operator knows ``n``
rows. This file is the one place that puts the first onto the second.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.shapes import Block

Columns: TypeAlias = Float64[Tensor, "n c"]


@runtime_checkable
class HasVectors(Protocol):
    """Anything with an orthonormal block ``vectors`` of shape ``(n, k)``, such as an ``EigenResult``."""

    @property
    def vectors(self) -> Tensor:
        """Orthonormal columns, shape ``(n, k)``."""


@runtime_checkable
class Eigenpairs(HasVectors, Protocol):
    """What the measures read of an ``EigenResult``."""

    @property
    def values(self) -> Tensor:
        """Eigenvalues in descending order, shape ``(k,)``, float64 on the CPU."""

    @property
    def residual_norms(self) -> Tensor:
        """``‖K v_i − λ_i v_i‖``, shape ``(k,)``."""

    @property
    def noise_floor(self) -> float:
        """Size of the smallest eigenvalue that means something, relative to the largest."""


def check_tensor(value: Any, *, name: str, needed: str = "a tensor") -> None:
    """Raise ArgumentError unless the value is a tensor; an array is the usual mistake, and has a cure of its own."""
    if isinstance(value, Tensor):
        return
    cure = "torch.from_numpy(...) makes a tensor of it" if isinstance(value, np.ndarray) else "torch.tensor makes one"
    raise ArgumentError(f"{name} is of type {type(value).__name__}, and {needed} is needed; {cure}.")


def check_pairs(pairs: Any, *, name: str = "pairs") -> None:
    """Raise ArgumentError unless there are values and residuals beside the vectors."""
    if not isinstance(pairs, Eigenpairs):
        raise ArgumentError(
            f"{name} is of type {type(pairs).__name__}, and vectors, values and residual norms are needed. Pass the "
            "EigenResult that eigsh returned."
        )


def holds_labels(values: Tensor) -> bool:
    """Whether values are integers that no measure may take for numbers: all but the 0 and 1 of a one-hot code."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        return False
    if values.ndim != 2 or values.shape[1] < 2:
        return True
    return not bool((((values == 0) | (values == 1)).all(1) & (values.sum(1) == 1)).all())


def check_numbers(values: Tensor, *, name: str) -> None:
    """Raise ArgumentError for integers: as numbers, labels would say that class 2 is twice class 1.

    A function of a class, True or False on each row, and a one-hot code are numbers.
    """
    if holds_labels(values):
        raise ArgumentError(
            f"{name} holds integers ({str(values.dtype).removeprefix('torch.')}, shape {tuple(values.shape)}), which "
            f"may be the labels of classes. For labels of C classes give torch.nn.functional.one_hot({name}, "
            f"C).double(); for numbers give {name}.double()."
        )


def as_columns(values: Tensor, num_rows: int, *, name: str) -> Columns:
    """Put values onto the rows of an operator.

    Args:
        values: As many entries as rows, in any shape, read in C order (row ``i * C + c`` is example i, output
            c); or shape ``(num_rows, c)``, which is c vectors.
        num_rows: n, the rows of the operator.
        name: What the values are called in a message.

    Returns:
        Shape ``(n, c)``, float64 on the device of the values.

    Raises:
        ArgumentError: The values are no tensor, or integers that may be labels of classes.
        ShapeError: The values do not fit the rows.
        NonFiniteError: There is a NaN or an infinity among them.
    """
    check_tensor(values, name=name)
    check_numbers(values, name=name)
    if values.numel() == num_rows and num_rows > 0:
        columns = values.detach().reshape(num_rows, 1)
    elif values.ndim == 2 and values.shape[0] == num_rows and values.shape[1] > 0:
        columns = values.detach()
    else:
        raise ShapeError(
            f"{name} has shape {tuple(values.shape)}, but there are {num_rows} rows. Give ({num_rows},) or (N, C) "
            f"with N * C = {num_rows}, where row i * C + c is example i, output c (output.reshape(-1)); or "
            f"({num_rows}, c) for c vectors at once."
        )
    if not columns.isfinite().all():
        bad = int((~columns.isfinite().all(1)).nonzero()[0])
        raise NonFiniteError(f"{name} holds a NaN or an infinity, first in row {bad}.")
    return columns.double()


def as_directions(values: Tensor, num_rows: int, *, name: str) -> Columns:
    """Do as ``as_columns``, and divide by the largest entry, so that squares neither overflow nor vanish.

    Raises:
        DegenerateError: All values are zero, so that they have no direction.
    """
    columns = as_columns(values, num_rows, name=name)
    largest = columns.abs().max()
    if largest == 0:
        raise DegenerateError(f"{name} is zero everywhere, so that it has no direction.")
    return columns / largest


def span_of(space: HasVectors | Tensor, *, name: str) -> Block:
    """Return the block of vectors that a result or a tensor stands for, shape ``(n, k)``."""
    if not isinstance(space, HasVectors):
        check_tensor(space, name=name, needed="an EigenResult or a tensor")
    vectors = space if isinstance(space, Tensor) else space.vectors
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ShapeError(f"{name} has vectors of shape {tuple(vectors.shape)}; (n, k) with k > 0 is needed.")
    return vectors.detach()


def check_orthonormal(gram: Tensor, dtype: torch.dtype, *, name: str) -> None:
    """Raise ArgumentError unless a Gram matrix is the identity to half the digits of the dtype of its vectors."""
    allowed = math.sqrt(torch.finfo(dtype).eps)
    defect = (gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max().item()
    if not defect <= allowed:
        raise ArgumentError(
            f"the vectors of {name} are not orthonormal: VᵀV is off the identity by {defect:.1e}, and {allowed:.0e} "
            "is allowed. Take them from eigsh, or orthonormalise them with torch.linalg.qr."
        )
