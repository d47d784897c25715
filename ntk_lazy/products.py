"""What the measures ask of an operator: a product, a quadratic form, a diagonal; checked, in float64 where small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.columns import check_tensor
from ntk_lazy.errors import NonFiniteError, ShapeError
from ntk_lazy.linalg import gram
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block

_LARGEST_EXPONENT = 100  # the sixth power of 2^100, summed over any number of rows, is within float64


class Operator(Protocol):
    """Anything that multiplies a block: a Tensor, a ``LinearOperator``, or what an eigensolver sees."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the long vectors."""

    @property
    def device(self) -> torch.device:
        """Where the long vectors live."""

    def matmul(self, other: Tensor, /) -> Tensor:
        """Return the operator times a block."""


def check_operator(A: Any, *, name: str) -> None:
    """Raise ArgumentError unless there is a product with a block: arrays and lists have none."""
    if not callable(getattr(A, "matmul", None)):
        check_tensor(A, name=name, needed="a kernel of ntk(), another LinearOperator or a tensor")


def rows_of(A: Operator, *, name: str = "the operator") -> Rows:
    """Return the rows of a symmetric operator.

    Raises:
        ArgumentError: It does not multiply.
        ShapeError: It is not square, or is a batch of operators.
    """
    check_operator(A, name=name)
    rows = getattr(A, "rows", None)
    shape = getattr(A, "shape", None)
    if shape is not None and (len(shape) != 2 or shape[0] != shape[1]):
        raise ShapeError(f"{name} has shape {tuple(shape)}; a single square operator is needed.")
    if isinstance(rows, Rows):
        return rows
    if shape is None:
        raise ShapeError(f"{name} is a {type(A).__name__} that has neither rows nor a shape.")
    return Rows(int(shape[0]))


@torch.no_grad()
def multiply(A: Operator, V: Block) -> Float[Tensor, "m k"]:
    """Return ``A V`` in the dtype and on the device of the operator, and raise NonFiniteError if it overflowed."""
    product = A.matmul(V.to(A.device, A.dtype))
    if not product.isfinite().all():
        raise NonFiniteError(
            "the operator returned a NaN or an infinity. Look for one in the parameters and the inputs, or use float64."
        )
    return product


def in_units(blocks: Sequence[Tensor], rows: Rows) -> tuple[list[Tensor], float]:
    """Divide blocks by one power of two near their largest entry, if powers of it could overflow or vanish.

    Returns:
        The blocks, the same ones where nothing had to be done, and what to multiply with at the end.
    """
    largest = max((float(rows.sum(b.abs().amax())) for b in blocks if b.numel()), default=0.0)
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _LARGEST_EXPONENT or not math.isfinite(largest):
        return list(blocks), 1.0
    # In two steps: the inverse of a subnormal number does not exist.
    half = exponent // 2
    first, second = math.ldexp(1.0, -half), math.ldexp(1.0, half - exponent)
    return [b * first * second for b in blocks], math.ldexp(1.0, exponent)


@torch.no_grad()
def quadratic_form(A: Operator, V: Block, rows: Rows) -> Tensor:
    """Return ``Vᵀ A V`` in float64 on the CPU, ``(k, k)``, from the half product where the operator has one.

    The half product keeps forms much smaller than ``λ_1 ‖v‖²`` accurate, where ``vᵀ(A v)`` drowns in the
    rounding of the product.
    """
    # A kernel between two sets of points that happen to be the same has no halves that it knows to be the same.
    half_gram = getattr(A, "half_gram", None) if getattr(A, "is_symmetric", True) else None
    if half_gram is not None:
        form = cast("Tensor", half_gram(V.to(A.device, A.dtype))).double().cpu()
    else:
        form = gram(V.to(A.device, A.dtype), multiply(A, V), rows=rows)
    if not form.isfinite().all():
        raise NonFiniteError("a quadratic form of the operator is not finite. Use float64, or smaller columns.")
    return (form + form.mT) / 2


@torch.no_grad()
def diagonal_of(A: Operator) -> Tensor:
    """Return the diagonal, shape ``(n,)``."""
    diagonal = cast("Tensor", cast("Any", A).diagonal())
    if not diagonal.isfinite().all():
        raise NonFiniteError("the diagonal of the operator holds a NaN or an infinity.")
    return diagonal
