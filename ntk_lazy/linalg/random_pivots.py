"""The largest part of a positive semidefinite matrix from some of its columns, drawn by what is left of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ntk_lazy.gemm import times_transposed
from ntk_lazy.linalg.orthogonal_root import Root, orthogonal_root, rounding
from ntk_lazy.linalg.tiles import row_tiles
from ntk_lazy.precision import ieee_precision
from ntk_lazy.solves import COLUMNS_PER_RANK

MOST_AT_ONCE = 128
"""Columns that are drawn before what they know is taken out of the others."""
_ROUNDS = 8  # at least, of few columns
_LEAST_AT_ONCE = 8
_GROWTH = 10.0  # of a shift that leaves a matrix indefinite


@ieee_precision()
def pivoted_root(
    columns: Callable[[Int64[Tensor, " b"]], Float[Tensor, "n b"]], diagonal: Float[Tensor, " n"], rank: int
) -> Root:
    """Return L with orthogonal columns, ``L Lᵀ ≈ K``, in the order of their size.

    Rounds of columns are drawn with the chance of what is left on the diagonal, and what earlier ones know is taken out
    of them. Of half as many columns again as the root has, the largest directions stay. Two calls draw the same.

    Args:
        columns: Returns columns of K, by their numbers.
        diagonal: That of K.
        rank: Columns of L, at most n; zeros or rounding where K has a smaller rank.

    Cost: ``1.5 rank`` columns of K, ``6 n rank²`` operations in float64 and ``2.25 n rank²`` in the dtype of K, an
        eigendecomposition of ``1.5 rank`` rows; two and a half blocks of ``rank`` columns.

    Source: Chen, Epperly, Tropp and Webber, Randomly pivoted Cholesky (Comm. Pure Appl. Math. 78, 2025), algorithm 2.2,
        in blocks. A factor of the last columns drawn is all that the shift, of rounding in entries of K, goes into.
    """
    n = diagonal.shape[0]
    rank = min(rank, n)
    size = min(math.ceil(COLUMNS_PER_RANK * rank), n)
    at_once = max(_LEAST_AT_ONCE, min(MOST_AT_ONCE, size // _ROUNDS))
    generator = torch.Generator().manual_seed(rank)
    # Columns lie as rows: those that are there are read without gaps, each time that new ones come.
    F, left = diagonal.new_zeros(size, n), diagonal.to("cpu", torch.float64, copy=True)
    # What entries of K are rounded by: pivots below are rounding alone.
    floor = torch.finfo(diagonal.dtype).eps * float(left.max())
    begin = 0
    while begin < size:
        chances = torch.where(left > floor, left, 0)
        width = min(at_once, size - begin, int(chances.count_nonzero()))
        if not width:
            break
        # As torch.multinomial draws without putting back, of as many rows as there may be.
        waits = torch.empty_like(chances).exponential_(generator=generator)
        pivots = (chances / waits).topk(width).indices.to(F.device)
        known, new = F[:begin], columns(pivots).mT
        if begin:
            new = new - times_transposed(known[:, pivots].mT.contiguous(), known.mT)
        inverse = _inverse_factor(new[:, pivots].double(), 2 * width**0.5 * floor)
        new = F[begin : begin + width].copy_(times_transposed(inverse.to(F.dtype), new.mT))
        left -= new.square().sum(0, dtype=torch.float64).cpu()
        left[pivots.cpu()] = 0  # but for rounding
        begin += width

    def tiles() -> Iterator[tuple[slice, Tensor]]:
        for tile in row_tiles(n, 2 * size, device=F.device):
            yield tile, F[:, tile].mT.double()

    if not bool(F.isfinite().all()) or not floor < torch.inf:
        return F.new_full((n, rank), torch.nan)  # whoever solves with it sees that
    squares = torch.linalg.matrix_norm(F, keepdim=True, dtype=torch.float64).square()
    return orthogonal_root(tiles, size, rounding(squares, n), out=F.new_empty(n, rank))


def _inverse_factor(G: Float[Tensor, "b b"], shift: float) -> Float[Tensor, "b b"]:
    """Invert the Cholesky factor of a Gram matrix, shifted until it is definite."""
    eye = torch.eye(G.shape[0], dtype=G.dtype, device=G.device)
    if not bool(G.isfinite().all()):
        return torch.nan * eye
    R, info = torch.linalg.cholesky_ex((G + G.mT) / 2 + shift * eye)
    while bool(info):
        shift *= _GROWTH
        R, info = torch.linalg.cholesky_ex((G + G.mT) / 2 + shift * eye)
    return torch.linalg.solve_triangular(R, eye, upper=False)
