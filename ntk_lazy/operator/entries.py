"""Single entries, rows and blocks of K: from tiles of factors, or from whatever else the engine finds cheaper."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.contract import Engine
from ntk_lazy.operator.side import Side
from ntk_lazy.precision import ieee_precision
from ntk_lazy.shapes import Block

# An entry of a tile is made by a matrix product; one by itself costs at least so many times more.
_BLOCK_SHARE = 1 / 16
_BLOCK_BYTES_SHARE = 0.125  # of the budget: a block whose entries are picked from it
_THIN = 8  # times longer than wide: columns may be cheaper by products


@ieee_precision()
def entries(engine: Engine, side1: Side, side2: Side, rows: Tensor, cols: Tensor) -> Tensor:
    """Compute ``K[rows, cols]`` for index vectors of equal length, in the caller's grad mode.

    Entries that fill a good part of a block are picked from it; others are made pair by pair.
    """
    few_rows, row_place = rows.unique(return_inverse=True)
    few_cols, col_place = cols.unique(return_inverse=True)
    num_rows, num_cols = few_rows.shape[0], few_cols.shape[0]
    if torch.is_grad_enabled() or rows.numel() < _BLOCK_SHARE * num_rows * num_cols:
        return engine.entries(side1.x, side2.x, side1.among_all(rows), side2.among_all(cols))
    found = torch.empty(rows.shape[0], dtype=engine.model.dtype, device=engine.model.device)
    columns = side2.select(few_cols)
    size = int(_BLOCK_BYTES_SHARE * engine.budget) // max(1, num_cols * found.itemsize)
    for strip in slices(num_rows, max(1, size)):
        wanted = ((row_place >= strip.start) & (row_place < strip.stop)).nonzero().squeeze(1)
        part = block(engine, side1.select(few_rows[strip]), columns)
        found[wanted] = part[row_place[wanted] - strip.start, col_place[wanted]]
    return found


@ieee_precision()
def block(engine: Engine, side1: Side, side2: Side) -> Tensor:
    """Write down all of K between two sides. Builds no graph."""
    short, long = sorted((side1.num_rows, side2.num_rows))
    if side1.selected is None and side2.selected is None and _THIN * short > long:
        full = torch.empty(side1.num_rows, side2.num_rows, dtype=engine.model.dtype, device=engine.model.device)
        engine.gram(side1.x, side2.x, full)
        return full
    return _columns(engine, side1, side2) if side2.num_rows == short else _columns(engine, side2, side1).mT


def _columns(engine: Engine, side1: Side, side2: Side) -> Block:
    """Write K down by its columns, all outputs of the examples of the rows at a time."""
    which = side2.among_all(torch.arange(side2.num_rows, device=side2.x.device))
    if side1.selected is None:
        return engine.columns(side1.x, side2.x, which)
    out = torch.empty(side1.num_rows, side2.num_rows, dtype=engine.model.dtype, device=engine.model.device)
    all_rows = side1.num_examples * side1.rows_per_example
    size = int(_BLOCK_BYTES_SHARE * engine.budget) // max(1, all_rows * out.itemsize)
    for strip in slices(side2.num_rows, max(1, size)):
        out[:, strip] = side1.gather(engine.columns(side1.x, side2.x, which[strip]))
    return out
