"""Matrices of other kinds than dense tensors: arrays of NumPy, sparse tensors, and what SciPy makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.errors import ShapeError
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block


@runtime_checkable
class SparseArray(Protocol):
    """A sparse matrix or array of SciPy."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> Any:
        """That of NumPy."""
        ...

    def tocoo(self) -> Any:
        """Return the entries with their places."""
        ...


@runtime_checkable
class ArrayOperator(Protocol):
    """A ``LinearOperator`` of SciPy: it multiplies arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    @property
    def dtype(self) -> Any:
        """That of NumPy."""
        ...

    def matmat(self, X: Any) -> Any:
        """Multiply a block."""
        ...


@dataclass(frozen=True)
class ArrayProducts:
    """An operator on arrays, for blocks of tensors on the CPU."""

    operator: ArrayOperator

    @property
    def rows(self) -> Rows:
        """All rows."""
        return Rows(self.operator.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the operator."""
        return dtype_of(self.operator)

    @property
    def device(self) -> torch.device:
        """Arrays live on the CPU."""
        return torch.device("cpu")

    def matmul(self, V: Block) -> Block:
        """Multiply with a block."""
        return torch.from_numpy(np.ascontiguousarray(self.operator.matmat(V.numpy()), dtype=V.numpy().dtype))


def dtype_of(A: SparseArray | ArrayOperator | np.ndarray[Any, Any]) -> torch.dtype:
    """Return the dtype of an array or operator of NumPy's kind.

    Raises:
        ShapeError: Neither float32 nor float64.
    """
    known = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
    found = np.dtype(A.dtype).newbyteorder("=") if A.dtype is not None else None
    if found not in known:
        raise ShapeError(
            f"A has dtype {A.dtype}; eigenpairs are computed in float32 or float64. Convert A first, with "
            "A.astype(numpy.float64)."
        )
    return known[found]


def as_tensor(A: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array of any layout or byte order into a tensor."""
    dtype = dtype_of(A)
    return torch.from_numpy(np.array(A, dtype=np.float32 if dtype is torch.float32 else np.float64, order="C"))


def as_sparse_tensor(A: SparseArray) -> Tensor:
    """Copy the entries of a sparse array into a sparse tensor."""
    entries, dtype = A.tocoo(), dtype_of(A)
    values = torch.from_numpy(np.array(entries.data, dtype=np.float32 if dtype is torch.float32 else np.float64))
    places = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    return torch.sparse_coo_tensor(places, values, tuple(A.shape), check_invariants=False).coalesce()


def coordinates(matrix: Tensor) -> Tensor:
    """Return a sparse tensor of any layout in coordinates, without doubled entries."""
    return matrix.detach().to_sparse_coo().coalesce()
