"""Single entries of K, and all of it, from rows of J."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lazy.engines.contract import Engine
from ntk_lazy.operator.side import Side
from ntk_lazy.precision import ieee_precision

# One product gives a whole row of K for the price of a few rows of J: past this share of wanted entries it is cheaper.
_BLOCK_SHARE = 0.25


@ieee_precision()
def entries(engine: Engine, side1: Side, side2: Side, rows: Tensor, cols: Tensor) -> Tensor:
    """Compute ``K[rows, cols]`` for index vectors of equal length.

    Entries that fill a block of few rows or few columns come from one product with unit vectors; others from
    pairs of rows of J.
    """
    few_rows, row_place = rows.unique(return_inverse=True)
    few_cols, col_place = cols.unique(return_inverse=True)
    is_block = rows.numel() >= _BLOCK_SHARE * few_rows.numel() * few_cols.numel()
    is_thin = min(few_rows.numel(), few_cols.numel()) * 8 <= max(few_rows.numel(), few_cols.numel())
    if torch.is_grad_enabled() or not (is_block and is_thin):
        return paired_entries(engine, side1, side2, rows, cols)
    if few_rows.numel() <= few_cols.numel():
        block = _block(engine, side2, side1, few_cols, few_rows).mT
    else:
        block = _block(engine, side1, side2, few_rows, few_cols)
    return block[row_place, col_place]


@ieee_precision()
def paired_entries(engine: Engine, side1: Side, side2: Side, rows: Tensor, cols: Tensor) -> Tensor:
    """Compute ``K[rows, cols]`` pair by pair, as inner products of rows of J; the way to a diagonal.

    Cost: the rows of J of both examples of each pair, in chunks; those of one example only where both are the same.
    """
    examples1, output1 = side1.positions(rows)
    examples2, output2 = side2.positions(cols)
    is_same = side1.x is side2.x and bool((examples1 == examples2).all())
    # Pairs that share both examples share the rows of J: sorted, they fall into one chunk.
    pairs, place = torch.stack([examples1, examples2]).unique(dim=1, return_inverse=True)
    found = torch.empty(0, dtype=engine.model.dtype, device=engine.model.device)
    places = rows.new_empty(0)
    for chunk in engine.row_chunks(pairs.shape[1]):
        left = engine.rows(side1.x[pairs[0, chunk]])
        right = left if is_same else engine.rows(side2.x[pairs[1, chunk]])
        wanted = ((place >= chunk.start) & (place < chunk.stop)).nonzero().squeeze(1)
        local = place[wanted] - chunk.start
        if is_same and left.shape[1] == 1:
            part = left.square().sum((1, 2))[local]
        else:
            part = _inner(left, right, local, output1[wanted], output2[wanted])
        found, places = torch.cat([found, part]), torch.cat([places, wanted])
    return found[places.argsort()]


def dense(engine: Engine, side1: Side, side2: Side) -> Tensor:
    """Write down all of K. Builds no graph."""
    r, model = side1.rows_per_example, engine.model
    full = torch.empty(side1.num_examples * r, side2.num_examples * r, dtype=model.dtype, device=model.device)
    engine.gram(side1.x, side2.x, full)
    full = full if side1.selected is None else full[side1.selected]
    return full if side2.selected is None else full[:, side2.selected]


def _block(engine: Engine, side1: Side, side2: Side, rows: Tensor, cols: Tensor) -> Tensor:
    """Compute ``K[rows][:, cols]`` by a product with the unit vectors of ``cols``."""
    few1, few2 = side1.select(rows), side2.select(cols)
    eye = torch.eye(few2.num_rows, dtype=engine.model.dtype, device=engine.model.device)
    return few1.gather(engine.product(few1.x, few2.x, few2.scatter(eye)))


def _inner(left: Tensor, right: Tensor, example: Tensor, output1: Tensor, output2: Tensor) -> Tensor:
    """Take inner products of chosen rows, all outputs against all where that is not more work."""
    if example.numel() >= left.shape[0] * left.shape[1]:
        return torch.einsum("erf,esf->ers", left, right)[example, output1, output2]
    return (left[example, output1] * right[example, output2]).sum(-1)
