"""A square root of ``L Lᵀ + D`` with few columns in L, for all directions that D alone makes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from linear_operator.operators import AddedDiagLinearOperator, DiagLinearOperator, LinearOperator, MatmulLinearOperator
from torch import Tensor
from typing_extensions import override

from ntk_lazy.operator.differentiation import differentiable_once


def shifted_root(L: Float[Tensor, "*batch n k"], diagonal: Float[Tensor, "*batch n"]) -> LinearOperator:
    """Return R of n rows and columns with ``R Rᵀ = L Lᵀ + D``, as a diagonal and a product of thin factors.

    With ``W = D^{-1/2} L`` it is ``D^{1/2} (I + W g(WᵀW) Wᵀ)``, where ``g(t) = 1 / (1 + sqrt(1 + t))``.

    Args:
        L: The part of few directions.
        diagonal: That of D, positive.

    Cost: ``4 n k²`` operations, three blocks like L.
    """
    roots = diagonal.sqrt()
    W = L / roots.unsqueeze(-1)
    inner = _SmallRoot.apply(W.mT @ W)  # type: ignore[no-untyped-call]
    return AddedDiagLinearOperator(MatmulLinearOperator(L @ inner, W.mT), DiagLinearOperator(roots))


class _SmallRoot(torch.autograd.Function):
    """``g(M)`` of a positive semi-definite M, with a gradient also where eigenvalues repeat.

    Divided differences of g have a closed form: with ``s = sqrt(1 + t)`` they are
    ``−1 / ((s_i + s_j) (1 + s_i) (1 + s_j))``.

    Source: Daleckii and Krein (1965); Higham, Functions of Matrices (2008), theorem 3.11.
    """

    @staticmethod
    @override
    def forward(ctx: Any, M: Tensor) -> Tensor:
        values, V = torch.linalg.eigh(M.double())
        sizes = (1 + values.clamp_min(0)).sqrt()
        ctx.save_for_backward(M, sizes, V)
        return ((V / (1 + sizes).unsqueeze(-2)) @ V.mT).to(M.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        M, sizes, V = ctx.saved_tensors
        s, t = sizes.unsqueeze(-1), sizes.unsqueeze(-2)
        with torch.no_grad():
            inside = -(V.mT @ grads[0].double() @ V) / ((s + t) * (1 + s) * (1 + t))
            found = (V @ inside @ V.mT).to(grads[0].dtype)
        return differentiable_once((found,), (M, *grads))[0]
