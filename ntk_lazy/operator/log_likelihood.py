"""What a marginal likelihood is made of, with exact gradients in scale and noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ntk_lazy.operator.differentiation import differentiable_once
from ntk_lazy.operator.weight_space import WeightSpace
from ntk_lazy.shapes import Block


def log_likelihood_terms(
    weights: WeightSpace, X: Block, B: Block, scale: Tensor | None, diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``bᵀ A^-1 b`` for each column and ``log det A``, for ``A = scale J Jᵀ + D``.

    Args:
        weights: A, factorised.
        X: ``A^-1 B``.
        B: Right-hand sides.
        scale: s, differentiable; None for 1.
        diagonal: The diagonal of D, or the one number on it; differentiable.

    Returns:
        Shapes ``(k,)`` and ``()``, differentiable once in B, scale and diagonal; in nothing else.

    Cost: backward, half a product and ``F³ / 3`` operations; those of ``inverse_diagonal`` for a diagonal of n numbers.
    """
    quadratic, log_determinant = _Terms.apply(weights, X, B, scale, diagonal)  # type: ignore[no-untyped-call]
    return quadratic, log_determinant


class _Terms(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, weights: WeightSpace, X: Block, B: Block, scale: Tensor | None, diagonal: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.weights, ctx.shape = weights, diagonal.shape
        ctx.save_for_backward(X, B, scale, diagonal)
        return (X * B).sum(0), torch.as_tensor(weights.log_determinant(), dtype=X.dtype, device=X.device)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _Terms._gradients(ctx, grads)
        return differentiable_once(found, (*ctx.saved_tensors[1:], *grads))

    @staticmethod
    def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        X, weights, (of_quadratic, of_log) = ctx.saved_tensors[0], ctx.weights, grads
        _, _, needs_B, needs_scale, needs_diagonal = ctx.needs_input_grad
        is_one = ctx.shape.numel() == 1
        rank = weights.effective_rank() if needs_scale or (needs_diagonal and is_one) else 0.0
        of_scale = of_diagonal = None
        if needs_scale:
            weight_norms = weights.gramian.jacobian_rmatmul(X).square().sum(0)
            of_scale = of_log * (rank / weights.scale) - (of_quadratic * weight_norms).sum()
        if needs_diagonal and is_one:
            inverse_trace = (X.shape[0] - rank) / weights.noise
            of_diagonal = of_log * inverse_trace - (of_quadratic * X.square().sum(0)).sum()
        elif needs_diagonal:
            of_diagonal = of_log * weights.inverse_diagonal() - (of_quadratic * X.square()).sum(1)
        of_diagonal = None if of_diagonal is None else of_diagonal.reshape(ctx.shape)
        return None, None, 2 * of_quadratic * X if needs_B else None, of_scale, of_diagonal
