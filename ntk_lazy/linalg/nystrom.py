"""The largest part of a positive semidefinite matrix from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def nystrom_root(
    matmul: Callable[[Tensor], Tensor],
    shape: torch.Size,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "*batch n rank"]:
    """Return L with orthogonal columns, ``L Lᵀ ≈ K``, in the order of their size.

    The random block is the same for each call.

    Args:
        matmul: Multiplies with K.
        shape: Of K, batches first.
        rank: Columns of L, at most n.
        dtype: Of the products.
        device: Where they are made.

    Cost: one product with ``rank`` columns, ``4 n rank²`` operations in float64, three blocks in float64.

    Source: Frangella, Tropp and Udell, Randomized Nyström preconditioning (SIAM J. Matrix Anal. Appl. 44, 2023),
        algorithm 2.1, with the shift by ``√n eps ‖Y‖`` in the eps of the products.
    """
    *batch, n, _ = shape
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(rank)
    Omega = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0]
    Omega = Omega.to(device, dtype)
    Y = matmul(Omega.expand(*batch, n, rank)).double()
    Omega = Omega.double()
    shift = n**0.5 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(Y, keepdim=True)
    Y = Y + shift * Omega
    small = Omega.mT @ Y
    C, _ = torch.linalg.cholesky_ex((small + small.mT) / 2)
    B = torch.linalg.solve_triangular(C.mT, Y, upper=True, left=False)
    U, s, _ = torch.linalg.svd(B, full_matrices=False)
    roots = (s.square() - shift.squeeze(-1)).clamp_min(0).sqrt()
    return (U * roots.unsqueeze(-2)).to(dtype)
