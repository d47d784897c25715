"""The largest eigenpairs of a symmetric matrix that is written down, whatever its size."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.errors import ArgumentError
from ntk_lazy.linalg.tiles import row_tiles

# Divide and conquer (dsyevd, which torch calls) wants 1 + 6 n + 2 n² numbers to work in, and counts them in 32 bits:
# 2,147,418,109 for 32,766 rows, 2,147,549,181 and more than 2³¹ − 1 for 32,767.
_MOST_ROWS = 32_766
_POWERS = 16


def check_size(num_rows: int) -> None:
    """Refuse, before anything is spent, a matrix that no driver here can solve.

    Raises:
        ArgumentError: It needs the driver of SciPy, which is not there.
    """
    if num_rows > _MOST_ROWS and find_spec("scipy") is None:
        raise ArgumentError(
            f"a dense matrix of {num_rows} rows is too large for the eigensolver of torch, whose 32-bit workspace ends "
            f"at {_MOST_ROWS}; SciPy has another one. Install scipy, or use Lanczos()."
        )


def largest_pairs(
    K: Float64[Tensor, "n n"], num_wanted: int
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, "n k"], float]:
    """Return the largest eigenvalues in descending order, their vectors, and the norm of the matrix.

    The norm is the largest absolute eigenvalue: exactly, or for a matrix of more than 32,766 rows from below.

    Args:
        K: Symmetric, on the CPU.
        num_wanted: Pairs.

    Cost: about ``9 n³`` operations and ``32 n²`` bytes beside K; above 32,766 rows the relatively robust driver, which
        takes ``4 n³ / 3`` and a few ``n k``, and works in K itself, which it restores.
    """
    n = K.shape[0]
    if n > _MOST_ROWS:
        norm = _norm_from_below(K)
        theta, U = _by_bisection(K, num_wanted)
        return theta, U, max(norm, float(theta.abs().max()))
    theta, U = torch.linalg.eigh(K)
    return theta.flip(0)[:num_wanted], U.flip(1)[:, :num_wanted].contiguous(), float(theta.abs().max())


def _by_bisection(K: Tensor, num_wanted: int) -> tuple[Tensor, Tensor]:
    """Solve by LAPACK's dsyevr, whose workspace is 26 n and which needs no other copy of K than its own triangle."""
    import scipy.linalg

    n, diagonal = K.shape[0], K.diagonal().clone()
    # In memory a transposed view of rows is what LAPACK takes for columns. Its lower triangle, our upper one, is
    # overwritten with the diagonal; the other one is not.
    theta, U = scipy.linalg.eigh(
        K.numpy().T,
        lower=True,
        overwrite_a=True,
        check_finite=False,
        driver="evr",
        subset_by_index=[n - num_wanted, n - 1],
    )
    for tile in row_tiles(n, n, device=K.device):
        kept, lost = K[tile.start :, tile].mT, K[tile, tile.start :]
        K[tile, tile.start :] = kept.triu(1) + lost.tril()
    K.diagonal().copy_(diagonal)
    theta, U = torch.from_numpy(theta), torch.from_numpy(U)
    return theta.flip(0), U.flip(1).contiguous()


def _norm_from_below(K: Tensor) -> float:
    """Multiply a random vector often enough for its growth to come near the largest absolute eigenvalue."""
    v = torch.randn(K.shape[0], generator=torch.Generator().manual_seed(0), dtype=K.dtype)
    norm = 0.0
    for _ in range(_POWERS):
        size = float(v.norm())
        if size == 0:
            return norm
        v = K @ (v / size)
        norm = max(norm, float(v.norm()))
    return norm
