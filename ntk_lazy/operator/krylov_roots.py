"""Roots of a symmetric operator and of its inverse from one Krylov basis, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from typing_extensions import override

from ntk_lazy.linalg.krylov import krylov_bases
from ntk_lazy.linalg.tiles import row_tiles
from ntk_lazy.operator.differentiation import differentiable_once

Roots: TypeAlias = Float[Tensor, "*starts_and_batch n k"]

_LEAST = 1.0  # in eps of the largest value and the size of the basis: below, a value is rounding


def krylov_roots(
    operator: Any, size: int, starts: Float[Tensor, "*batch n m"] | None, tensors: Sequence[Tensor]
) -> tuple[Roots, Roots]:
    """Return L and M with ``L Lᵀ`` the part of A in a Krylov basis, and ``M Mᵀ`` the inverse of this part.

    Nothing is compared with an absolute number. Values that are rounding, or negative, have no column in either.

    Args:
        operator: A, a ``LinearOperator`` that is symmetric.
        size: Columns, at most.
        starts: Where the processes start; None for one vector, the same each time.
        tensors: The representation of A, which the gradients go to.

    Returns:
        Shape ``(*batch, n, k)``, and ``(m, *batch, n, k)`` for several starts.

    Cost: see ``linalg.krylov``; backward, a derivative of A in twice k columns for each start.

    Source: of the gradients, Murray, Differentiation of the Cholesky decomposition (arXiv:1602.07527), as
        linear_operator has them.
    """
    if starts is None:
        n = operator.shape[-1]
        start = torch.randn(n, 1, generator=Generator().manual_seed(0), dtype=operator.dtype).to(operator.device)
        starts = start.expand(*operator.batch_shape, n, 1)
    root, inverse = _Roots.apply(operator.representation_tree(), size, starts, operator, *tensors)  # type: ignore[no-untyped-call]
    return root, inverse


class _Roots(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, tree: Callable[..., Any], size: int, starts: Tensor, operator: Any, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.tree, ctx.is_several = tree, starts.shape[-1] > 1
        ctx.set_materialize_grads(False)
        Q, T = krylov_bases(operator._matmul, starts, size)
        values, S = torch.linalg.eigh(T)
        least = _LEAST * values.shape[-1] * torch.finfo(Q.dtype).eps * values[..., -1:]
        roots = torch.where(values > least, values, 0).sqrt()
        inverses = torch.where(values > least, values, torch.inf).rsqrt()
        sides = [S * each.unsqueeze(-2) for each in (roots, inverses)]
        found = [Q.new_empty(*Q.shape[:-2], Q.shape[-1], Q.shape[-2]) for _ in sides]
        for tile in row_tiles(Q.shape[-1], 2 * S[..., 0].numel(), device=Q.device):
            part = Q[..., tile].mT.double()
            for out, side in zip(found, sides, strict=True):
                out[..., tile, :] = part @ side
        root, inverse = (each.movedim(-3, 0) if ctx.is_several else each.squeeze(-3) for each in found)
        ctx.save_for_backward(inverse, *tensors)
        return root, inverse

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _Roots._gradients(ctx, grads)
        return differentiable_once(found, (*ctx.saved_tensors[1:], *grads))

    @staticmethod
    def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        inverse, *tensors = ctx.saved_tensors
        of_root, of_inverse = grads
        left = torch.zeros_like(inverse) if of_root is None else of_root
        if of_inverse is not None:
            left = left - inverse @ (of_inverse.mT @ inverse)
        right = inverse / 2
        if ctx.is_several:
            left, right = (each.movedim(0, -3).transpose(-3, -2).flatten(-2) for each in (left, right))
        return (None, None, None, None, *ctx.tree(*tensors)._bilinear_derivative(left, right))
