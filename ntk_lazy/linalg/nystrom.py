"""The largest part of a positive semidefinite matrix from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.linalg.tiles import row_tiles

_GROWTH = 10.0  # of a shift that leaves a matrix indefinite


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

    Cost: one product with ``rank`` columns, about ``16 n rank²`` operations in float64, three blocks in the dtype of
        the products.

    Source: Frangella, Tropp and Udell, Randomized Nyström preconditioning (SIAM J. Matrix Anal. Appl. 44, 2023),
        algorithm 2.1. Its shift, by ``√n eps ‖Y‖``, would hide in float32 what is 1e-5 of the largest eigenvalue: here
        it is what products are off by, which shows in ``Ωᵀ K Ω − (Ωᵀ K Ω)ᵀ``. Singular values come from a Gram matrix
        in float64, whose rounding is eps of float64 of the largest of them.
    """
    *batch, n, _ = shape
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(rank)
    Omega = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(device, dtype)
    Omega = torch.linalg.qr(Omega)[0]
    Y = matmul(Omega.expand(*batch, n, rank))
    small, overlap = _gram(Omega, Y), _gram(Omega, Omega)
    size = torch.linalg.matrix_norm(Y, keepdim=True, dtype=torch.float64)
    if not bool(size.isfinite().all()):
        return torch.full_like(Y, torch.nan)  # whoever solves with it sees that
    asymmetry = torch.linalg.matrix_norm(small - small.mT, keepdim=True)
    small = (small + small.mT) / 2
    tiny = torch.finfo(torch.float64).tiny ** 0.5  # of K = 0 the root is zero
    shift = asymmetry.maximum(n**0.5 * torch.finfo(torch.float64).eps * size).clamp_min(tiny)
    C, info = torch.linalg.cholesky_ex(small + shift * overlap)
    while bool(info.any()):
        shift = torch.where(info[..., None, None] > 0, _GROWTH * shift, shift)
        C, info = torch.linalg.cholesky_ex(small + shift * overlap)

    def whitened() -> Iterator[tuple[slice, Tensor]]:
        """Rows of ``B = (Y + shift Omega) C^-T``, with ``K ≈ B Bᵀ``, in float64."""
        for tile in row_tiles(n, 3 * rank):
            shifted = Y[..., tile, :].double() + shift * Omega[tile].double()
            yield tile, torch.linalg.solve_triangular(C.mT, shifted, upper=True, left=False)

    # From the Gram matrix of Y small values would be lost: it has the squares.
    gram = torch.zeros_like(small)
    for _, B in whitened():
        gram += B.mT @ B
    values, V = torch.linalg.eigh(gram)
    values, V = values.flip(-1), V.flip(-1)
    roots = (values - shift.squeeze(-1)).clamp_min(0).sqrt()
    # Columns of length one; without a value there is none.
    is_there = roots > 0
    S = V * torch.where(is_there, values.clamp_min(tiny).rsqrt(), 0).unsqueeze(-2)
    # Those of small values lean to those of large ones by eps of their ratio: straightened from the largest on.
    overlap = torch.diag_embed((~is_there).double())
    for _, B in whitened():
        Q = B @ S
        overlap += Q.mT @ Q
    R, _ = torch.linalg.cholesky_ex(overlap, upper=True)
    S = S @ torch.linalg.solve_triangular(R, torch.diag_embed(roots), upper=True)
    L = torch.empty_like(Y)
    for tile, B in whitened():
        L[..., tile, :] = B @ S
    return L


def _gram(X: Tensor, Y: Tensor) -> Tensor:
    """Return ``Xᵀ Y``, summed in float64."""
    total = torch.zeros(*Y.shape[:-2], X.shape[-1], Y.shape[-1], dtype=torch.float64, device=Y.device)
    for tile in row_tiles(Y.shape[-2], X.shape[-1] + Y.shape[-1]):
        left = X[..., tile, :].double()
        total += left.mT @ (left if X is Y else Y[..., tile, :].double())
    return total
