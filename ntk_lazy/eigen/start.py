"""Turn what the user offers as a start into a block that a search can trust."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lazy.counts import NUM_FRESH
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.eigen.result import EigenResult
from ntk_lazy.errors import ArgumentError, NonFiniteError, ShapeError
from ntk_lazy.linalg import column_norms, combine
from ntk_lazy.shapes import Block


def check_start(start: object, *, draw: RandomColumns) -> None:
    """Refuse what no search can begin with, whether or not the solver makes use of it.

    Raises:
        ArgumentError: Neither a tensor, a result nor None.
        ShapeError: Not two-dimensional, or not the rows of this process.
        NonFiniteError: A NaN or an infinity.
    """
    if start is None:
        return
    block = start.vectors if isinstance(start, EigenResult) else start
    if not isinstance(block, Tensor):
        raise ArgumentError(
            f"the start is a {type(block).__name__}; it is a tensor, an earlier EigenResult or None. "
            "torch.from_numpy(...) makes a tensor of an array."
        )
    if block.ndim != 2 or block.shape[0] != draw.rows.local:
        raise ShapeError(
            f"the start has shape {tuple(block.shape)}; it must be (n, s) with the {draw.rows.local} rows of the "
            "operator and any number s of columns."
        )
    if int(draw.rows.sum((~torch.isfinite(block.detach().to(draw.device, draw.dtype))).sum())):
        raise NonFiniteError("the start contains NaN or infinity.")


def start_block(start: Tensor | EigenResult | None, *, width: int, draw: RandomColumns) -> Block:
    """Make a start block of ``width`` columns, at least ``NUM_FRESH`` of which are random.

    Columns beyond ``width - NUM_FRESH`` are mixed at random into that many, which keeps a little of each. Pairs
    of an earlier solve are first divided by the square root of their values, so that the weak ones, which
    need the help, are not drowned. Zero and repeated columns are harmless: random ones replace them.
    The start is one that ``check_start`` has let pass.
    """
    if start is None:
        return draw(width)
    offered = _scaled_vectors(start) if isinstance(start, EigenResult) else start
    block = offered.detach().to(draw.device, draw.dtype)
    norms = column_norms(block, rows=draw.rows)
    room = max(1, width - NUM_FRESH)
    scale = norms.clamp_min(torch.finfo(torch.float64).tiny).reciprocal() * (norms > 0)
    if isinstance(start, EigenResult):
        scale = torch.ones_like(scale)
    if block.shape[1] > room:
        block = combine(block, scale[:, None] * draw.mixing(block.shape[1], room))
    else:
        block = combine(block, torch.diag(scale))
    return torch.cat([block, draw(max(NUM_FRESH, width - block.shape[1]))], dim=1)


def _scaled_vectors(pairs: EigenResult) -> Block:
    """Weigh vectors by ``lambda^-1/2``, values of rounding size by that of the smallest real one."""
    values = pairs.values.abs()
    if values.numel() == 0 or float(values.max()) == 0:
        return pairs.vectors
    weight = (values / values.max()).clamp_min(pairs.noise_floor).rsqrt()
    return combine(pairs.vectors, torch.diag(weight))
