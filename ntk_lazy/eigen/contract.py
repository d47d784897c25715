"""What a solver may know about a matrix: its rows, its dtype, its device, and how it acts on a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from linear_operator import LinearOperator
from torch import Tensor

from ntk_lazy.eigen.foreign import (
    ArrayOperator,
    ArrayProducts,
    SparseArray,
    as_sparse_tensor,
    as_tensor,
    coordinates,
)
from ntk_lazy.errors import ArgumentError, NonFiniteError, ShapeError
from ntk_lazy.linalg.tiles import row_tiles
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block, SmallMatrix


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric matrix that is known by its products alone."""

    @property
    def rows(self) -> Rows:
        """The rows of a long vector that this process holds."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Where blocks live."""
        ...

    def matmul(self, V: Block) -> Block:
        """Multiply the local rows of a block."""
        ...


@runtime_checkable
class HalfGram(Protocol):
    """An operator ``K = J Jᵀ`` that can form the Gram matrix of ``Jᵀ V``."""

    def half_gram(self, V: Block) -> SmallMatrix:
        """Form ``Vᵀ K V`` from the half product ``Jᵀ V``, summed in float64, on the CPU."""
        ...


@runtime_checkable
class Afresh(Protocol):
    """An operator that may keep rounded entries between products, and can do without them."""

    def matmul_afresh(self, V: Block) -> Block:
        """Multiply by another way than ``matmul``, if there is a more direct one."""
        ...


@runtime_checkable
class WritesDown(Protocol):
    """An operator that can write itself down for less than a product with each unit vector."""

    def to_dense(self) -> Tensor:
        """Return all entries, shape ``(n, n)``; BudgetError where there is no room for them."""
        ...


@runtime_checkable
class Linearised(Protocol):
    """An operator that can keep what its products have in common, for as long as it does not change."""

    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Keep it within the context, in which about so many columns will be multiplied."""
        ...


@dataclass(frozen=True)
class TensorOperator:
    """A symmetric matrix whose entries are there, as a dense tensor or as a sparse one in coordinates."""

    matrix: Tensor

    @property
    def rows(self) -> Rows:
        """All rows."""
        return Rows(self.matrix.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix."""
        return self.matrix.device

    def matmul(self, V: Block) -> Block:
        """Multiply with a block."""
        return self.matrix @ V


@dataclass(frozen=True)
class WrappedOperator:
    """A square ``LinearOperator``; its products run without a graph."""

    operator: LinearOperator

    @property
    def rows(self) -> Rows:
        """The operator's own rows where it has them, else all."""
        own = getattr(self.operator, "rows", None)
        return own if isinstance(own, Rows) else Rows(self.operator.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the operator."""
        return cast("torch.dtype", self.operator.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the operator."""
        return torch.device(self.operator.device or "cpu")  # operators that hold no tensor have none

    @property
    def num_outputs(self) -> int:
        """Rows that belong to one example: the multiplicity an eigenvalue is expected to come near."""
        examples = getattr(self.operator, "num_examples", None)
        if isinstance(examples, int) and examples > 0:
            return max(1, int(self.operator.shape[-1]) // examples)
        return 1

    def matmul(self, V: Block) -> Block:
        """Multiply with a block."""
        with torch.no_grad():
            return cast("Tensor", self.operator._matmul(V))

    def to_dense(self) -> Tensor:
        """Return all entries."""
        with torch.no_grad():
            return cast("Tensor", self.operator.to_dense())


@dataclass(frozen=True)
class FactoredOperator:
    """A ``LinearOperator`` that offers ``half_gram``, with what the wrapped one has."""

    wrapped: WrappedOperator

    @property
    def rows(self) -> Rows:
        """See ``WrappedOperator``."""
        return self.wrapped.rows

    @property
    def dtype(self) -> torch.dtype:
        """See ``WrappedOperator``."""
        return self.wrapped.dtype

    @property
    def device(self) -> torch.device:
        """See ``WrappedOperator``."""
        return self.wrapped.device

    @property
    def num_outputs(self) -> int:
        """See ``WrappedOperator``."""
        return self.wrapped.num_outputs

    def matmul(self, V: Block) -> Block:
        """Multiply with a block."""
        return self.wrapped.matmul(V)

    def matmul_afresh(self, V: Block) -> Block:
        """Multiply by the most direct way that the wrapped operator has."""
        if not isinstance(self.wrapped.operator, Afresh):
            return self.matmul(V)
        with torch.no_grad():
            return self.wrapped.operator.matmul_afresh(V)

    def half_gram(self, V: Block) -> SmallMatrix:
        """Form ``Vᵀ K V`` from the half product."""
        with torch.no_grad():
            return cast("Float64[Tensor, 'k k']", self.wrapped.operator.half_gram(V))


def way_to_write_down(operator: SymmetricOperator) -> Callable[[], Tensor] | None:
    """Return what writes an operator down, if it has a way of its own.

    Every ``LinearOperator`` has ``to_dense``; that of the base class is a product with the identity, all at once.
    """
    inner = operator.wrapped if isinstance(operator, FactoredOperator) else operator
    if isinstance(inner, WrappedOperator):
        return None if type(inner.operator).to_dense is LinearOperator.to_dense else inner.to_dense
    return inner.to_dense if isinstance(inner, WritesDown) else None


def asymmetry_tolerance(dtype: torch.dtype) -> float:
    """Say how far ``⟨u, Av⟩`` and ``⟨Au, v⟩`` may differ, relative to the largest: ``eps^0.7``.

    Sums in an unlucky order lose one digit or two, 1e-5 in float32 and 1e-11 in float64 leave room for
    that; a matrix that is meant to be symmetric and is not differs by more.
    """
    return float(torch.finfo(dtype).eps ** 0.7)


def as_symmetric_operator(A: object) -> SymmetricOperator:
    """Wrap a tensor, an array or a ``LinearOperator``, or take an operator as it is; refuse what is not symmetric.

    Raises:
        ShapeError: Not square, batched, or neither float32 nor float64.
        NonFiniteError: A tensor with NaN or infinity.
        ArgumentError: A tensor that is not symmetric, or something that is not an operator.
    """
    operator: SymmetricOperator
    if isinstance(A, Tensor | np.ndarray | SparseArray):
        _check_square(tuple(A.shape))
        operator = TensorOperator(_as_matrix(A))
    elif isinstance(A, LinearOperator):
        _check_square(tuple(A.shape))
        wrapped = WrappedOperator(A)
        operator = FactoredOperator(wrapped) if _has_half_gram(A) else wrapped
    elif isinstance(A, SymmetricOperator):
        operator = A
    elif isinstance(A, ArrayOperator):
        _check_square(tuple(A.shape))
        operator = ArrayProducts(A)
    else:
        raise ArgumentError(
            f"A is a {type(A).__name__}; eigsh needs a symmetric tensor or array, dense or sparse, a LinearOperator of "
            "linear_operator or SciPy, or an object with rows, dtype, device and matmul."
        )
    if operator.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"A has dtype {operator.dtype}; eigenpairs are computed in float32 or float64. Convert A first."
        )
    if operator.rows.total == 0:
        raise ShapeError("A has no rows, so it has no eigenvalues.")
    if isinstance(operator, TensorOperator):
        _check_entries(operator.matrix)
    return operator


def _has_half_gram(A: LinearOperator) -> bool:
    """Whether ``A`` has half products: the class may, and this one not, being negative or of two sides."""
    return callable(getattr(A, "half_gram", None)) and bool(getattr(A, "is_gram_matrix", True))


def _check_square(shape: tuple[int, ...]) -> None:
    """Refuse batches and rectangles."""
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ShapeError(
            f"A has shape {shape}; eigsh needs one square matrix. Solve the members of a batch one by one, "
            "and use A.mT @ A for the singular values of a rectangle."
        )


def _as_matrix(A: Tensor | np.ndarray[Any, Any] | SparseArray) -> Tensor:
    """Return a dense tensor, or a sparse one in coordinates."""
    if isinstance(A, np.ndarray):
        return as_tensor(A)
    if not isinstance(A, Tensor):
        return as_sparse_tensor(A)
    return A.detach() if A.layout is torch.strided else coordinates(A)


def _pieces(matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through entries, and what they differ by from those of the transpose."""
    if matrix.is_sparse:
        yield matrix.values(), (matrix - matrix.mT).coalesce().values()
        return
    for tile in row_tiles(matrix.shape[0], matrix.shape[1], device=matrix.device):
        yield matrix[tile], matrix[tile] - matrix.mT[tile]


def _check_entries(matrix: Tensor) -> None:
    """Refuse a tensor that is not finite or not symmetric, tile by tile."""
    largest = defect = 0.0
    for piece, difference in _pieces(matrix):
        if not bool(torch.isfinite(piece).all()):
            raise NonFiniteError("A contains NaN or infinity.")
        if piece.numel():
            largest = max(largest, float(piece.abs().max()))
            defect = max(defect, float(difference.abs().max()))
    if defect > asymmetry_tolerance(matrix.dtype) * largest:
        raise ArgumentError(
            f"A is not symmetric: entries differ from those of its transpose by {defect / largest:.1e} of the "
            "largest. Pass (A + A.mT) / 2 if that is what you mean."
        )
