"""The Cholesky factor of a matrix that is written down, in its own units."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from linear_operator.operators import TriangularLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

Matrix = Float[Tensor, "*batch n n"]


def cholesky_factor(A: Matrix) -> Matrix:
    """Return L with ``L Lᵀ = A``; where A is not definite, with what linear_operator adds to its diagonal.

    That is an absolute number, 1e-6 or 1e-8 at first: it is added to A divided by the mean of its diagonal, or rather
    by a power of four near it, so that nothing is rounded by the way.

    Args:
        A: Positive semi-definite, but for rounding.
    """
    if A.shape[-1] == 1:
        return A.clamp_min(0).sqrt()
    mean = A.detach().diagonal(dim1=-2, dim2=-1).mean(-1, dtype=torch.float64)[..., None, None]
    unit = power_of_two(mean.clamp_min(0).sqrt())
    return psd_safe_cholesky(A / unit.square().to(A.dtype)) * unit.to(A.dtype)


def cholesky_of(operator: Any, *, upper: bool) -> TriangularLinearOperator:
    """Write an operator down and factorise it."""
    factor = cholesky_factor(operator.evaluate_kernel().to_dense())
    return TriangularLinearOperator((factor.mT if upper else factor).contiguous(), upper=upper)


def power_of_two(sizes: Tensor) -> Tensor:
    """A power of two near each number, by which nothing is rounded; 1 for those that are not positive and finite."""
    is_plain = (sizes > 0) & sizes.isfinite()
    return torch.where(is_plain, torch.exp2(torch.where(is_plain, sizes, 1.0).log2().round()), 1.0)
