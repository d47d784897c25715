"""A matrix with rows and columns appended, and roots of it that follow from those of the matrix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from linear_operator.operators import LinearOperator, RootLinearOperator, to_linear_operator
from linear_operator.utils.memoize import add_to_cache
from torch import Tensor

from ntk_lazy.operator.cholesky import cholesky_factor
from ntk_lazy.operator.roots import lanczos_roots


def with_rows(operator: Any, cross: Float[Tensor, "*batch m n"], new: Float[Tensor, "*batch m m"]) -> LinearOperator:
    """Return ``[A Bᵀ; B D]`` with its roots, from those that the process of Lanczos gives for A.

    With ``A ≈ L Lᵀ`` and ``Lᵀ M = I``, ``F = B M`` and ``G Gᵀ = D − F Fᵀ``, they are ``[L 0; F G]`` and its
    pseudo-inverse, transposed, ``[M, −M Fᵀ G⁻ᵀ; 0, G⁻ᵀ]``. linear_operator has the pseudo-inverse from a QR
    decomposition in which what is below 1e-6 counts as zero, in whatever units.

    Args:
        operator: A, with ``LinearOperator.cat_rows`` beneath its own.
        cross: B.
        new: D.

    Cost: that of the roots, and ``4 n k m`` operations for each member of the batch.
    """
    L, M = lanczos_roots(operator)
    F = cross @ M
    G = cholesky_factor(new - F @ F.mT)
    batch, (m, n), k = F.shape[:-2], cross.shape[-2:], L.shape[-1]
    L, M = L.expand(*batch, n, k), M.expand(*batch, n, k)
    # Of the whole, and of its parts: a copy of A has no roots yet, and is not asked for any.
    again = operator.representation_tree()(*operator.representation())
    joined: LinearOperator = LinearOperator.cat_rows(again, cross, new, generate_roots=False, generate_inv_roots=False)
    zeros = L.new_zeros(*batch, n, m)
    root = torch.cat([torch.cat([L, zeros], -1), torch.cat([F, G], -1)], -2)
    eye = torch.eye(m, dtype=G.dtype, device=G.device)
    inverse_G = torch.linalg.solve_triangular(G, eye, upper=False).mT
    right = torch.cat([-M @ (F.mT @ inverse_G), inverse_G], -2)
    inverse = torch.cat([torch.cat([M, zeros.new_zeros(*batch, m, k)], -2), right], -1)
    for name, part in (("root_decomposition", root), ("root_inv_decomposition", inverse)):
        add_to_cache(joined, name, RootLinearOperator(to_linear_operator(part)))
    return joined
