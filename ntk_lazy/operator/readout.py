"""Autograd for what is read off K: backward passes that compute again, chunk by chunk, and keep no graph.

Without these an entry of K would hold the graph of two rows of J, and a diagonal that of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from typing_extensions import override


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
        tensors = _leaves(ctx, ctx.needs_input_grad[2:])
        gramian, total = ctx.tree(*tensors).gramian, _Total(tensors)
        upstream = grads[0].reshape(-1)
        flat = [i.reshape(-1) for i in ctx.index]
        for chunk in gramian.engine.row_chunks(upstream.shape[0]):
            with torch.enable_grad():
                total.add((gramian.entries(*(i[chunk] for i in flat)) * upstream[chunk]).sum())
        return (None, None, *total.gradients())


class _Dense(torch.autograd.Function):
    """All of K; its gradient is that of ``sum_ij g_ij K_ij``, with the scale fixed."""

    @staticmethod
    @override
    def forward(ctx: Any, tree: Callable[..., Any], *tensors: Tensor) -> Tensor:
        ctx.tree = tree
        ctx.save_for_backward(*tensors)
        return tree(*tensors).gramian.dense()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = _leaves(ctx, ctx.needs_input_grad[1:])
        total = _Total(tensors)
        for part in ctx.tree(*tensors).gramian.weighted_rows(grads[0]):
            total.add(part)
        return (None, *total.gradients())


class _Total:
    """The gradient of a sum whose terms come one by one, each with a graph of its own."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._asked = [t for t in tensors if t.requires_grad]
        self._found: list[Tensor | None] = [None] * len(self._asked)

    def add(self, term: Tensor) -> None:
        if not term.requires_grad:
            return  # rows of J that are constant, as those of a linear model
        parts = torch.autograd.grad(term, self._asked, allow_unused=True)
        self._found = [p if t is None else t if p is None else t + p for t, p in zip(self._found, parts, strict=True)]

    def gradients(self) -> list[Tensor | None]:
        """For each tensor, None where none was asked for or the sum does not depend on it."""
        found = iter(self._found)
        return [next(found) if t.requires_grad else None for t in self._tensors]


def _leaves(ctx: FunctionCtx, needed: Sequence[bool]) -> list[Tensor]:
    """Cut the saved tensors off from the graph that they came from, so that only their own gradients are computed."""
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    return [t.detach().requires_grad_(is_needed) for t, is_needed in zip(saved, needed, strict=True)]
