"""Autograd for what is read off K: backward passes that compute again, chunk by chunk, and keep no graph.

Without these an entry of K would hold the graph of two rows of J, and a diagonal that of all of them. Only where a
gradient is to be differentiated again (``create_graph=True``) it has such a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from typing_extensions import override

# A pair of rows of J that are differentiated by themselves costs as much as so many examples in a block of columns.
_PAIR_COST = 4


def read_entries(tree: Callable[..., Any], index: tuple[Tensor, ...], tensors: Sequence[Tensor]) -> Tensor:
    """Read entries at index tensors ``(*batch, row, column)`` of one shape off the operator that ``tree`` builds."""
    return _Entries.apply(tree, index, *tensors)  # type: ignore[no-untyped-call]


def write_down(tree: Callable[..., Any], tensors: Sequence[Tensor]) -> Tensor:
    """Write down all of the operator that ``tree`` builds from tensors."""
    return _Dense.apply(tree, *tensors)  # type: ignore[no-untyped-call]


class _Entries(torch.autograd.Function):
    """Entries of K at index tensors ``(*batch, row, column)`` of one shape."""

    @staticmethod
    @override
    def forward(ctx: Any, tree: Callable[..., Any], index: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.tree, ctx.index = tree, index
        ctx.save_for_backward(*tensors)
        return tree(*tensors).gramian.entries(*index)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if _is_bilinear(ctx):
            return (None, None, *_bilinear_gradients(ctx, grads[0]))
        if torch.is_grad_enabled():
            operator = ctx.tree(*ctx.saved_tensors)
            return (None, None, *operator.entries_derivative(ctx.index, grads[0]))
        tensors = _leaves(ctx)
        gramian = ctx.tree(*tensors).gramian
        asked = [t for t in tensors if t.requires_grad]
        total: list[Tensor | None] = [None] * len(asked)
        upstream = grads[0].reshape(-1)
        flat = [i.reshape(-1) for i in ctx.index]
        for chunk in gramian.engine.row_chunks(upstream.shape[0]):
            with torch.enable_grad():
                weighted = (gramian.entries(*(i[chunk] for i in flat)) * upstream[chunk]).sum()
            parts = torch.autograd.grad(weighted, asked, allow_unused=True)
            total = [p if t is None else t if p is None else t + p for t, p in zip(total, parts, strict=True)]
        found = iter(total)
        return (None, None, *(next(found) if t.requires_grad else None for t in tensors))


class _Dense(torch.autograd.Function):
    """All of K, whose gradient is that of ``⟨G, K⟩``."""

    @staticmethod
    @override
    def forward(ctx: Any, tree: Callable[..., Any], *tensors: Tensor) -> Tensor:
        ctx.tree = tree
        ctx.save_for_backward(*tensors)
        return tree(*tensors).gramian.dense()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operator = ctx.tree(*ctx.saved_tensors)
        return (None, *operator.dense_derivative(grads[0]))


def _leaves(ctx: FunctionCtx) -> list[Tensor]:
    """Cut the saved tensors off from the graph that they came from, so that only their own gradients are computed."""
    return [
        t.detach().requires_grad_(needed)
        for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)  # type: ignore[attr-defined]
    ]


def _is_bilinear(ctx: Any) -> bool:
    """Whether entries lie in so few rows or columns that to differentiate these as a whole is less work."""
    *batch, rows, cols = ctx.index
    if batch or not rows.numel():
        return False
    short = min(rows.unique().numel(), cols.unique().numel())
    return short * sum(ctx.tree(*ctx.saved_tensors).shape) <= _PAIR_COST * rows.numel()


def _bilinear_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate ``sum_d u_dᵀ K e_d`` over the columns that occur, or over the rows."""
    operator = ctx.tree(*ctx.saved_tensors)
    rows, cols = (i.reshape(-1) for i in ctx.index)
    few_rows, few_cols = rows.unique(), cols.unique()
    is_wide = few_rows.numel() < few_cols.numel()
    few, along, across = (few_rows, rows, cols) if is_wide else (few_cols, cols, rows)
    place = torch.searchsorted(few, along)
    units = upstream.new_zeros(operator.shape[-2 if is_wide else -1], few.numel())
    units[few, torch.arange(few.numel(), device=few.device)] = 1
    weights = upstream.new_zeros(operator.shape[-1 if is_wide else -2], few.numel())
    weights = weights.index_put((across, place), upstream.reshape(-1), accumulate=True)
    gradients: tuple[Tensor | None, ...] = operator.bilinear_gradients(
        *((units, weights) if is_wide else (weights, units))
    )
    return gradients
