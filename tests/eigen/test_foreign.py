"""Arrays, sparse tensors and what SciPy makes have the pairs of the dense tensor, or are refused with a cure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from check_solution import check_solution

from ntk_lazy.eigen import LOBPCG, Dense, Lanczos, Solver, eigsh
from ntk_lazy.errors import ArgumentError, NonFiniteError, ShapeError

N, K = 300, 4


def weighted_path() -> torch.Tensor:
    """A sparse matrix with a spectrum that falls."""
    index = torch.arange(1, N + 1, dtype=torch.float64)
    beside = 0.1 * index[1:] ** -1.5
    return torch.diag(index**-1.5) + torch.diag(beside, 1) + torch.diag(beside, -1)


A = weighted_path()


def rows_in_compressed_form(matrix: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return matrix.to_sparse_csr()


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "coordinates": torch.Tensor.to_sparse_coo,
    "doubled coordinates": lambda B: torch.sparse_coo_tensor(
        B.nonzero().mT.repeat(1, 2), B[B != 0].repeat(2) / 2, B.shape, check_invariants=True
    ),
    "compressed rows": rows_in_compressed_form,
    "compressed columns": torch.Tensor.to_sparse_csc,
    "blocks": lambda B: B.to_sparse_bsr((4, 4)),
    "sparse with a gradient": lambda B: B.to_sparse_coo().requires_grad_(),
    "array": torch.Tensor.numpy,
    "array in Fortran order": lambda B: np.asfortranarray(B.numpy()),
    "array of other bytes": lambda B: B.numpy().astype(B.numpy().dtype.newbyteorder(">")),
    "array that is not to be written": lambda B: np.broadcast_to(B.numpy(), B.shape),
    "SciPy rows": lambda B: scipy.sparse.csr_array(B.numpy()),
    "SciPy columns": lambda B: scipy.sparse.csc_matrix(B.numpy()),
    "SciPy coordinates": lambda B: scipy.sparse.coo_array(B.numpy()),
    "SciPy diagonals": lambda B: scipy.sparse.dia_array(B.numpy()),
    "SciPy lists": lambda B: scipy.sparse.lil_array(B.numpy()),
    "SciPy keys": lambda B: scipy.sparse.dok_array(B.numpy()),
    "SciPy operator": lambda B: scipy.sparse.linalg.aslinearoperator(B.numpy()),
    "SciPy operator of one column": lambda B: scipy.sparse.linalg.LinearOperator(
        B.shape, matvec=lambda v: B.numpy() @ v, dtype=B.numpy().dtype
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_every_kind_have_the_pairs_of_the_dense_one(kind: str, dtype: torch.dtype) -> None:
    B = A.to(dtype)
    pairs = eigsh(KINDS[kind](B), K)
    check_solution(pairs, B, K)
    assert pairs.vectors.dtype is dtype


@pytest.mark.parametrize("solver", [Lanczos(), LOBPCG(), Dense()], ids=repr)
@pytest.mark.parametrize("kind", ["coordinates", "SciPy rows", "SciPy operator", "array"])
def test_every_solver_takes_them(kind: str, solver: Solver) -> None:
    check_solution(eigsh(KINDS[kind](A), K, solver=solver), A, K)


def test_an_array_is_not_written_to() -> None:
    array = A.numpy().copy()
    eigsh(array, K, solver=Dense())
    assert np.array_equal(array, A.numpy())


def spoilt(entry: float) -> torch.Tensor:
    B = A.clone()
    B[3, 4] = entry
    return B


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (spoilt(9.0).to_sparse_coo(), ArgumentError, "not symmetric"),
        (scipy.sparse.csr_array(spoilt(9.0).numpy()), ArgumentError, "not symmetric"),
        (scipy.sparse.linalg.aslinearoperator(spoilt(9.0).numpy()), ArgumentError, "not symmetric"),
        (spoilt(9.0).numpy(), ArgumentError, "not symmetric"),
        (spoilt(float("nan")).to_sparse_coo(), NonFiniteError, "NaN"),
        (scipy.sparse.csr_array(spoilt(float("nan")).numpy()), NonFiniteError, "NaN"),
        (A[:5].to_sparse_coo(), ShapeError, "square"),
        (scipy.sparse.csr_array(A[:5].numpy()), ShapeError, "square"),
        (scipy.sparse.linalg.aslinearoperator(A[:5].numpy()), ShapeError, "square"),
        (np.zeros(4), ShapeError, "square"),
        (np.eye(4, dtype=np.int64), ShapeError, "astype"),
        (np.eye(4, dtype=np.longdouble), ShapeError, "astype"),
        (scipy.sparse.eye_array(4, dtype=np.int32), ShapeError, "astype"),
        (scipy.sparse.linalg.aslinearoperator(np.eye(4, dtype=complex)), ShapeError, "astype"),
        (torch.eye(4, dtype=torch.int64).to_sparse_coo(), ShapeError, "dtype"),
        ("a word", ArgumentError, "dense or sparse"),
    ],
    ids=lambda value: None,
)
def test_what_has_no_pairs_is_refused(matrix: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eigsh(matrix, 1)


def test_a_sparse_matrix_of_zeros_has_values_zero() -> None:
    for zero in (torch.zeros(40, 40).to_sparse_coo(), scipy.sparse.csr_array((300, 300), dtype=np.float64)):
        pairs = eigsh(zero, 2)
        assert pairs.status == "converged"
        assert pairs.values.tolist() == [0.0, 0.0]
