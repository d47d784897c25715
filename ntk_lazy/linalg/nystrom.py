"""The largest part of a positive semidefinite matrix from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.linalg.tiles import row_tiles

Root: TypeAlias = Float[Tensor, "*batch n rank"]
Tiles: TypeAlias = Callable[[], Iterator[tuple[slice, Tensor]]]

_TINY = torch.finfo(torch.float64).tiny ** 0.5  # of K = 0 the root is zero
_LEAN = 1.0  # in eps of the root: what columns may lean to each other
_GROWTH = 10.0  # of a shift that leaves a matrix indefinite


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
    shift = asymmetry.maximum(_rounding(size, n))
    C, info = torch.linalg.cholesky_ex(small + shift * eye)
    while bool(info.any()):
        shift = torch.where(info[..., None, None] > 0, _GROWTH * shift, shift)
        C, info = torch.linalg.cholesky_ex(small + shift * eye)

    def whitened() -> Iterator[tuple[slice, Tensor]]:
        """Rows of ``B = (Y + shift Omega) C^-T``, with ``K ≈ B Bᵀ``, in float64."""
        for tile in row_tiles(n, 3 * rank, device=Y.device):
            shifted = Y[..., tile, :].double() + shift * Omega[tile].double()
            yield tile, torch.linalg.solve_triangular(C.mT, shifted, upper=True, left=False)

    return _orthogonal_columns(whitened, shift, out=torch.empty_like(Y))


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
    return _orthogonal_columns(joined, _rounding(size, n), out=out)


def _orthogonal_columns(tiles: Tiles, shift: Tensor, *, out: Root) -> Root:
    """Write L with orthogonal columns into ``out``, with ``L Lᵀ = B Bᵀ - shift I`` on the space of B.

    Args:
        tiles: Gives rows of B, in float64, as often as it is called.
        shift: Not negative.
        out: As wide as B.
    """
    # From the Gram matrix of products with K small values would be lost: it has the squares.
    rank = out.shape[-1]
    gram = torch.zeros(*out.shape[:-2], rank, rank, dtype=torch.float64, device=out.device)
    for _, B in tiles():
        gram += B.mT @ B
    values, V = torch.linalg.eigh(gram)
    values, V = values.flip(-1), V.flip(-1)
    roots = (values - shift.squeeze(-1)).clamp_min(0).sqrt()
    # Columns of length one; without a value there is none.
    is_there = roots > 0
    S = V * torch.where(is_there, values.clamp_min(_TINY).rsqrt(), 0).unsqueeze(-2)
    # Those of small values lean to those of large ones by eps of their ratio.
    least = torch.where(is_there, values, torch.inf).amin(-1)
    if bool((torch.finfo(torch.float64).eps * values[..., 0] > _LEAN * torch.finfo(out.dtype).eps * least).any()):
        # Straightened from the largest on.
        overlap = torch.diag_embed((~is_there).double())
        for _, B in tiles():
            Q = B @ S
            overlap += Q.mT @ Q
        R, _ = torch.linalg.cholesky_ex(overlap, upper=True)
        S = torch.linalg.solve_triangular(R, S, upper=True, left=False)
    S = S * roots.unsqueeze(-2)
    for tile, B in tiles():
        out[..., tile, :] = B @ S
    return out


def _rounding(size: Tensor, n: int) -> Tensor:
    """What sums over n rows in float64 are off by."""
    return (n**0.5 * torch.finfo(torch.float64).eps * size).clamp_min(_TINY)


def _gram(X: Tensor, Y: Tensor) -> Tensor:
    """Return ``Xᵀ Y``, summed in float64."""
    total = torch.zeros(*Y.shape[:-2], X.shape[-1], Y.shape[-1], dtype=torch.float64, device=Y.device)
    for tile in row_tiles(Y.shape[-2], X.shape[-1] + Y.shape[-1], device=Y.device):
        left = X[..., tile, :].double()
        total += left.mT @ (left if X is Y else Y[..., tile, :].double())
    return total
