"""Autograd for products and solves: backward passes that are differentiable themselves, or say that they are not.

The functions of linear_operator save results that have no graph, so that a gradient taken with ``create_graph=True``
would lack a part without a word. Those here save operands and results alone, whose graphs autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from linear_operator import settings
from linear_operator.functions._solve import _solve
from linear_operator.utils.broadcasting import _matmul_broadcast_shape
from torch import Tensor
from typing_extensions import override

from ntk_lazy.errors import SecondDerivativeError

Gradients = tuple[Tensor | None, ...]


def multiply(tree: Callable[..., Any], rhs: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return ``A @ rhs`` for the operator A that ``tree`` builds from tensors, differentiable any number of times."""
    return cast(Tensor, _Product.apply(tree, rhs, *tensors))  # type: ignore[no-untyped-call]


def solve(tree: Callable[..., Any], rhs: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return ``A^-1 @ rhs`` for the symmetric operator A that ``tree`` builds, differentiable any number of times."""
    return cast(Tensor, _Solution.apply(tree, rhs, *tensors))  # type: ignore[no-untyped-call]


def solve_for(operator: Any, right: Tensor, left: Tensor | None) -> Tensor | None:
    """Return ``left @ A^-1 @ right`` where somebody asks for gradients; None where linear_operator does as well."""
    given = [right] if left is None else [right, left]
    if not (torch.is_grad_enabled() and (operator.requires_grad or any(t.requires_grad for t in given))):
        return None
    _matmul_broadcast_shape(operator.shape, right.shape)
    X = solve(operator.representation_tree(), right, operator.representation())
    return X if left is None else left @ X


def differentiable_once(found: Gradients, of: Sequence[Tensor | None]) -> Gradients:
    """Let gradients raise when they are differentiated in their turn, wherever autograd builds a graph of them.

    Args:
        found: Gradients that were computed without a graph.
        of: What they are functions of. Autograd runs those nodes alone that lie between what is differentiated and what
            it is differentiated in: an error that did not hang on these would never be met.
    """
    if not torch.is_grad_enabled():
        return found
    anchors = [t for t in of if t is not None and t.requires_grad]
    return tuple(None if g is None else cast(Tensor, _Refusal.apply(g, *anchors)) for g in found)  # type: ignore[no-untyped-call]


def once(*tensors: Tensor, of: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Return views whose gradients raise when they are differentiated in their turn.

    Args:
        tensors: What a function is called with that is differentiable once.
        of: What else its value is a function of.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return tensors
    return cast(tuple[Tensor, ...], _Once.apply(len(tensors), *tensors, *of))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, tree: Callable[..., Any], rhs: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tree = tree
        ctx.save_for_backward(rhs, *tensors)
        return cast(Tensor, tree(*tensors)._matmul(rhs))

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        rhs, *tensors = ctx.saved_tensors
        operator, columns = ctx.tree(*tensors), _columns(grads[0], rhs)
        of_rhs = None
        if ctx.needs_input_grad[1]:
            of_rhs = operator.mT.matmul(columns)
            of_rhs = (of_rhs.squeeze(-1) if rhs.ndim == 1 else of_rhs).sum_to_size(rhs.shape)
        of_tensors: Gradients = (None,) * len(tensors)
        if any(ctx.needs_input_grad[2:]):
            of_tensors = operator.bilinear_gradients(columns, _columns(rhs, rhs))
        return None, of_rhs, *of_tensors


class _Solution(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, tree: Callable[..., Any], rhs: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tree = tree
        operator = tree(*tensors)
        X = _solve(operator, rhs.unsqueeze(-1) if rhs.ndim == 1 else rhs)
        X = X.squeeze(-1) if rhs.ndim == 1 else X
        ctx.save_for_backward(X, rhs, *tensors)
        # With the Cholesky factor that it may have made, for the solve of the backward pass.
        ctx.operator = operator if settings.memory_efficient.off() else None
        return X

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        X, rhs, *tensors = ctx.saved_tensors
        columns = _columns(grads[0], rhs)
        if torch.is_grad_enabled():
            Y = solve(ctx.tree, columns, tensors)
        else:
            Y = _solve(ctx.operator if ctx.operator is not None else ctx.tree(*tensors), columns)
        of_tensors: Gradients = (None,) * len(tensors)
        if any(ctx.needs_input_grad[2:]):
            of_tensors = ctx.tree(*tensors).bilinear_gradients(-Y, _columns(X, rhs))
        of_rhs = None
        if ctx.needs_input_grad[1]:
            of_rhs = (Y.squeeze(-1) if rhs.ndim == 1 else Y).sum_to_size(rhs.shape)
        return None, of_rhs, *of_tensors


class _Once(torch.autograd.Function):
    """The identity on the first of its operands, whose gradient is differentiable once."""

    @staticmethod
    @override
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        views = tuple(t.view_as(t) for t in tensors[:count])
        ctx.mark_non_differentiable(*(t for t in views if not (t.is_floating_point() or t.is_complex())))
        return views

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        others = (None,) * (len(ctx.saved_tensors) - len(grads))
        return None, *differentiable_once(grads, (*ctx.saved_tensors, *grads)), *others


class _Refusal(torch.autograd.Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    @override
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise SecondDerivativeError(
            "this gradient of a kernel cannot be differentiated again. It came from a log determinant or a quadratic "
            "form by iterations, from a root, a pivoted Cholesky factor or a sum of operators. Differentiable twice "
            "are products, entries, to_dense() and solve() of the kernel itself and of K + D, and a marginal "
            "likelihood by Cholesky (raise linear_operator.settings.max_cholesky_size)."
        )


def _columns(block: Tensor, rhs: Tensor) -> Tensor:
    return block.unsqueeze(-1) if rhs.ndim == 1 else block
