"""Sums over the rows of tall blocks, in float64 whatever the dtype of the blocks.

A float32 block is read in tiles of rows, each cast to float64 when its turn comes. Gram matrices of
float32 vectors that are *summed* in float32 cost two digits of every small eigenvalue; a full float64
copy would cost three times the memory of the block. Small matrices live on the CPU, and each function
below moves one of them once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.rows import Rows

TILE_BYTES = 1 << 24
"""Most bytes of one float64 tile; two of them are alive at a time."""
# On a CPU a tile is made, read and forgotten in cache: half as fast again. The sum over wide tiles is read from memory
# for each of them: a tile has some rows in any case.
_CACHED_BYTES = 1 << 21
_LEAST_ROWS = 1024
# A smaller sum of squares may have lost some of them, below 2.2e-308.
_SMALLEST_SQUARE = 1e-280


def row_tiles(num_rows: int, num_columns: int, *, device: torch.device) -> Iterator[slice]:
    """Cut the rows so that a float64 tile of this many columns stays under ``TILE_BYTES``."""
    row_bytes = 8 * max(1, num_columns)
    height = max(1, TILE_BYTES // row_bytes)
    if device.type == "cpu":
        height = min(height, max(_LEAST_ROWS, _CACHED_BYTES // row_bytes))
    for begin in range(0, num_rows, height):
        yield slice(begin, min(begin + height, num_rows))


def gram(X: Float[Tensor, "n a"], Y: Float[Tensor, "n b"] | None = None, *, rows: Rows) -> Float64[Tensor, "a b"]:
    """Form ``Xᵀ Y`` in float64 (``Xᵀ X`` when one block is given), on the CPU.

    Args:
        X: Local rows of the first block.
        Y: Local rows of the second block, of the same dtype and device.
        rows: Adds the partial sums of all processes.

    Cost: ``2 n a b`` float64 operations, two tiles of ``TILE_BYTES``, one transfer.
    """
    right = X if Y is None else Y
    total = torch.zeros(X.shape[1], right.shape[1], dtype=torch.float64, device=X.device)
    for tile in row_tiles(X.shape[0], X.shape[1] + right.shape[1], device=X.device):
        left_tile = X[tile].double()
        right_tile = left_tile if Y is None else right[tile].double()
        total.addmm_(left_tile.mT, right_tile)
    return rows.sum(total).cpu()


def column_norms(X: Float[Tensor, "n k"], *, rows: Rows) -> Float64[Tensor, " k"]:
    """Measure every column in float64, on the CPU, whatever its size: squares that overflow or vanish are scaled."""
    squares = _summed_squares(X, rows)
    # Squares of float32 numbers do neither in float64.
    if X.dtype is not torch.float64 or bool(((squares > _SMALLEST_SQUARE) & (squares < torch.inf)).all()):
        return squares.sqrt()
    # Added up over processes, the largest entries are no smaller than the largest of all, and hardly larger.
    largest = rows.sum(X.abs().amax(dim=0) if X.shape[0] else X.new_zeros(X.shape[1]))
    largest = torch.where(largest > 0, largest, 1).clamp_max(torch.finfo(torch.float64).max)
    return _summed_squares(X / largest, rows).sqrt() * largest.cpu()


def _summed_squares(X: Float[Tensor, "n k"], rows: Rows) -> Float64[Tensor, " k"]:
    total = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device)
    for tile in row_tiles(X.shape[0], X.shape[1], device=X.device):
        total += X[tile].double().square().sum(dim=0)
    return rows.sum(total).cpu()


def combine(X: Float[Tensor, "n a"], S: Float64[Tensor, "a b"]) -> Float[Tensor, "n b"]:
    """Form ``X S``, summed in float64 and rounded once to the dtype of the block.

    Cost: ``2 n a b`` float64 operations, one new block, two tiles.
    """
    small = S.to(X.device)
    result = torch.empty(X.shape[0], S.shape[1], dtype=X.dtype, device=X.device)
    for tile in row_tiles(X.shape[0], X.shape[1] + S.shape[1], device=X.device):
        result[tile] = X[tile].double() @ small
    return result


def subtract_(W: Float[Tensor, "n b"], X: Float[Tensor, "n a"], S: Float64[Tensor, "a b"]) -> None:
    """Replace ``W`` by ``W − X S`` in place, summed in float64 and rounded once."""
    small = S.to(X.device)
    for tile in row_tiles(X.shape[0], X.shape[1] + S.shape[1], device=X.device):
        W[tile] = W[tile].double().addmm_(X[tile].double(), small, alpha=-1)
