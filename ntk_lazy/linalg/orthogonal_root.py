"""Matrices L with ``K ≈ L Lᵀ`` whose columns are orthogonal, in the order of their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Root: TypeAlias = Float[Tensor, "*batch n rank"]
Tiles: TypeAlias = Callable[[], Iterator[tuple[slice, Tensor]]]

_TINY = torch.finfo(torch.float64).tiny ** 0.5  # of K = 0 the root is zero
_PARTS = 4  # of a symmetric matrix: five eighths of it are computed
_LEAST_PART = 64
_LEAN = 1.0  # in eps of the root: what columns may lean to each other


def orthogonal_root(tiles: Tiles, width: int, shift: Tensor, *, out: Root) -> Root:
    """Write L with orthogonal columns into ``out``, with ``L Lᵀ = B Bᵀ - shift I`` on the largest directions of B.

    Args:
        tiles: Gives rows of B, in float64, as often as it is called.
        width: Columns of B.
        shift: Not negative, shape ``(*batch, 1, 1)``.
        out: Has as many columns as are wanted, at most those of B.

    Cost: ``n width (1.25 width + 2 rank)`` operations in float64.
    """
    # From the Gram matrix of products with K small values would be lost: it has the squares.
    rank = out.shape[-1]
    gram = torch.zeros(*out.shape[:-2], width, width, dtype=torch.float64, device=out.device)
    for _, B in tiles():
        for part in _parts(width):  # of the lower half, which is all that is read
            gram[..., part, : part.stop] += B[..., part].mT @ B[..., : part.stop]
    values, V = torch.linalg.eigh(gram, UPLO="L")
    values, V = values.flip(-1)[..., :rank], V.flip(-1)[..., :rank]
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


def _parts(width: int) -> list[slice]:
    size = max(_LEAST_PART, -(-width // _PARTS))
    return [slice(begin, min(begin + size, width)) for begin in range(0, width, size)]


def rounding(size: Tensor, n: int) -> Tensor:
    """What sums over n rows in float64 are off by."""
    return (n**0.5 * torch.finfo(torch.float64).eps * size).clamp_min(_TINY)
