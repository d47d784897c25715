"""The largest part of a positive semidefinite matrix from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.linalg.orthogonal_root import Root, orthogonal_root, rounding
from ntk_lazy.linalg.tiles import row_tiles
from ntk_lazy.precision import ieee_precision

_GROWTH = 10.0  # of a shift that leaves a matrix indefinite


@ieee_precision()
def nystrom_root(
    matmul: Callable[[Tensor], Tensor],
    shape: torch.Size,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None = None,
) -> Root:
    """Return L with orthogonal columns, ``L Lᵀ ≈ K``, in the order of their size.

    Args:
        matmul: Multiplies with K.
        shape: Of K, batches first.
        rank: Columns of L, at most n.
        dtype: Of the products.
        device: Where they are made.
        seed: Of the random block; None for ``rank``, so that each call draws the same.

    Cost: one product with ``rank`` columns, about ``16 n rank²`` operations in float64, three blocks in the dtype of
        the products.

    Source: Frangella, Tropp and Udell, Randomized Nyström preconditioning (SIAM J. Matrix Anal. Appl. 44, 2023),
        algorithm 2.1. Its shift, by ``√n eps ‖Y‖``, would hide in float32 what is 1e-5 of the largest eigenvalue: here
        it is what products are off by, which shows in ``Ωᵀ K Ω − (Ωᵀ K Ω)ᵀ``. Singular values come from a Gram matrix
        in float64, whose rounding is eps of float64 of the largest of them.
    """
    *batch, n, _ = shape
    rank = min(rank, n)
    generator = torch.Generator().manual_seed(rank if seed is None else seed)
    Omega = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=dtype).to(device))[0]
    Y = matmul(Omega.expand(*batch, n, rank))
    # Omega is orthonormal to rounding, which on the shift does not count.
    small, eye = _gram(Omega, Y), torch.eye(rank, dtype=torch.float64, device=device)
    size = torch.linalg.matrix_norm(Y, keepdim=True, dtype=torch.float64)
    if not bool(size.isfinite().all()):
        return torch.full_like(Y, torch.nan)  # whoever solves with it sees that
    asymmetry = torch.linalg.matrix_norm(small - small.mT, keepdim=True)
    small = (small + small.mT) / 2
    shift = asymmetry.maximum(rounding(size, n))
    C, info = torch.linalg.cholesky_ex(small + shift * eye)
    while bool(info.any()):
        shift = torch.where(info[..., None, None] > 0, _GROWTH * shift, shift)
        C, info = torch.linalg.cholesky_ex(small + shift * eye)

    def whitened() -> Iterator[tuple[slice, Tensor]]:
        """Rows of ``B = (Y + shift Omega) C^-T``, with ``K ≈ B Bᵀ``, in float64."""
        for tile in row_tiles(n, 3 * rank, device=Y.device):
            shifted = Y[..., tile, :].double() + shift * Omega[tile].double()
            yield tile, torch.linalg.solve_triangular(C.mT, shifted, upper=True, left=False)

    return orthogonal_root(whitened, rank, shift, out=torch.empty_like(Y))


@ieee_precision()
def extended_root(matmul: Callable[[Tensor], Tensor], root: Float[Tensor, "*batch n known"], rank: int) -> Root:
    """Add columns to a Nyström root, for products with these alone.

    What the root has left of K is approximated in the same way, and both are made orthogonal together.

    Args:
        matmul: Multiplies with K.
        root: L, with orthogonal columns.
        rank: Columns of the new one, more than L has.

    Cost: one product with the new columns, about ``16 n rank²`` operations in float64, five blocks of ``rank`` columns.
    """
    *batch, n, known = root.shape

    def left(V: Tensor) -> Tensor:
        return matmul(V) - root @ (V.mT @ root).mT

    shape = torch.Size([*batch, n, n])
    # With a block that went into the root already, nothing would be left: all of these had a smaller seed.
    more = nystrom_root(left, shape, rank - known, dtype=root.dtype, device=root.device, seed=rank)
    out = root.new_empty(*batch, n, rank)
    if not bool(more.isfinite().all()):
        return out.fill_(torch.nan)

    def joined() -> Iterator[tuple[slice, Tensor]]:
        for tile in row_tiles(n, 3 * rank, device=root.device):
            yield tile, torch.cat([root[..., tile, :], more[..., tile, :]], -1).double()

    # Where nothing was left, columns are rounding.
    size = torch.linalg.matrix_norm(root, keepdim=True, dtype=torch.float64).square()
    return orthogonal_root(joined, rank, rounding(size, n), out=out)


def _gram(X: Tensor, Y: Tensor) -> Tensor:
    """Return ``Xᵀ Y``, summed in float64."""
    total = torch.zeros(*Y.shape[:-2], X.shape[-1], Y.shape[-1], dtype=torch.float64, device=Y.device)
    for tile in row_tiles(Y.shape[-2], X.shape[-1] + Y.shape[-1], device=Y.device):
        left = X[..., tile, :].double()
        total += left.mT @ (left if X is Y else Y[..., tile, :].double())
    return total
