"""Turn the pairs that a search ended with into vectors, values and residuals that can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.contract import asymmetry_tolerance
from ntk_lazy.eigen.criterion import Criterion
from ntk_lazy.eigen.iteration import Iteration, RitzPairs
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.errors import ArgumentError
from ntk_lazy.linalg import column_norms, combine, gram, rayleigh_ritz
from ntk_lazy.shapes import Block

_NUM_GROUPS = {torch.float32: 4, torch.float64: 1}
_NUM_DRAWS = {torch.float32: 2, torch.float64: 1}
# Rounding of float64 stays far below any sensible tolerance: one column is enough to see that the operator still
# is what it was. That of float32 differs from pair to pair and must be told apart by size of the value. It leaks
# onto few eigenvectors, so that a single sum may cancel by chance, and pairs scatter about the mean of their group.
_SCATTER = 1.5


@dataclass(frozen=True)
class CertifiedPairs:
    """Pairs in units of the scale of the operator.

    Attributes:
        theta: ``(k,)``, descending.
        X: ``(n, k)``, in the dtype of the operator.
        residuals: ``(k,)``, honest ones.
        noise: ``(k,)``, the measured part of a residual that no further product can remove.
        is_measured: Whether a fresh product was spent; without one the residuals are those of the search.
    """

    theta: Float64[Tensor, " k"]
    X: Block
    residuals: Float64[Tensor, " k"]
    noise: Float64[Tensor, " k"]
    is_measured: bool


def certify(
    pairs: RitzPairs,
    num_wanted: int,
    *,
    method: Iteration,
    product: Product,
    draw: RandomColumns,
    criterion: Criterion,
    fresh_width: int,
) -> CertifiedPairs:
    """Form the vectors, improve the values by half products, and measure the residuals.

    The products of the search know ``A x`` for the exact combination of basis vectors. What is handed out is that
    combination rounded to the dtype of the operator, and the rounding leaks onto the largest eigenvector.
    Where one call can do that (``k <= fresh_width``), each pair is multiplied afresh. Otherwise fresh products
    of a few random combinations of neighbouring pairs measure the difference between the two, and only pairs
    for which it matters are multiplied one by one.

    Cost: ``k`` products, or 8 (1 in float64, 4 where all entries are known) plus those that were in doubt; ``k`` half
        products where offered; ``k`` long vectors and two blocks.
    """
    coefficients = pairs.coefficients[:, :num_wanted]
    theta = pairs.theta[:num_wanted]
    X = method.combine(coefficients)
    G = product.half_gram(X)
    if G is not None:
        theta, S = _from_half_products(G, theta, X, product)
        coefficients = coefficients @ S
        X = method.combine(coefficients)
    k = theta.numel()
    residuals = _residuals_of_search(theta, coefficients, X, method, product)
    noise = torch.zeros_like(residuals)
    doubtful = torch.ones(k, dtype=torch.bool)
    is_measured = False
    if k > fresh_width:
        # Rounding of entries that are all there is no accident of one sum.
        num_draws = 1 if method.is_exhaustive else _NUM_DRAWS[X.dtype]
        if not product.affords(_NUM_GROUPS[X.dtype] * num_draws):
            return CertifiedPairs(theta, X, residuals, noise, is_measured)
        noise = _audit(theta, coefficients, X, num_draws=num_draws, method=method, product=product, draw=draw)
        if product.num_written_columns:
            _check_what_is_written(float(noise.max()), X.dtype, product)
        is_measured = True
        residuals = torch.hypot(residuals, noise)
        doubtful = ~criterion.met(theta, residuals)
    index = doubtful.nonzero().flatten()
    width = max(8, fresh_width)
    for begin in range(0, len(index), width):
        chosen = index[begin : begin + width]
        if not product.affords(len(chosen)):
            break
        x = combine(X, torch.eye(k, dtype=torch.float64)[:, chosen])
        image = product.afresh(x)
        known = method.combine_images(coefficients[:, chosen])
        noise[chosen] = column_norms(image - known, rows=product.rows)
        defect = image - x * theta[chosen].to(x.device, x.dtype)
        residuals[chosen] = column_norms(defect, rows=product.rows)
        is_measured = True
    return CertifiedPairs(theta, X, residuals, noise, is_measured)


def _from_half_products(G: Tensor, theta: Tensor, X: Block, product: Product) -> tuple[Tensor, Tensor]:
    """Extract values from ``G = (Jᵀ X)ᵀ (Jᵀ X)``: not negative, and right to ``eps √(λ1/λ)``, not ``eps λ1/λ``."""
    values, S = rayleigh_ritz(G, gram(X, rows=product.rows))
    defect = float((values - theta).abs().max())
    if defect > asymmetry_tolerance(X.dtype) * product.norm:
        raise ArgumentError(
            f"half_gram and the products of the operator disagree by {defect / product.norm:.1e} of its "
            "norm: they belong to different matrices."
        )
    return values.clamp_min(0), S


def _check_what_is_written(noise: float, dtype: torch.dtype, product: Product) -> None:
    """Refuse a matrix that is not that of the products."""
    if noise > asymmetry_tolerance(dtype) * product.norm:
        raise ArgumentError(
            f"to_dense and the products of the operator disagree by {noise / product.norm:.1e} of its norm: they "
            "belong to different matrices, or the operator changes from call to call (put a model in eval mode)."
        )


def _residuals_of_search(theta: Tensor, coefficients: Tensor, X: Block, method: Iteration, product: Product) -> Tensor:
    """Form ``A X − X Λ`` from products already made, a block of columns at a time."""
    norms = torch.empty_like(theta)
    for begin in range(0, theta.numel(), 32):
        part = slice(begin, begin + 32)
        R = method.combine_images(coefficients[:, part])
        R -= X[:, part] * theta[part].to(X.device, X.dtype)
        norms[part] = column_norms(R, rows=product.rows)
    return norms


def _audit(
    theta: Tensor,
    coefficients: Tensor,
    X: Block,
    *,
    num_draws: int,
    method: Iteration,
    product: Product,
    draw: RandomColumns,
) -> Tensor:
    """Measure, group by group, how far fresh products are from those of the search.

    Each column of the audit is a sum with random signs over pairs of neighbouring values, so that the expected square
    of the difference is the sum of the squares of its members. What rounding leaks onto the largest eigenvector
    falls little from pair to pair; a group of half a decade of pairs has one size of it.
    """
    k = theta.numel()
    # Groups that grow like a geometric series: the leading values fall fastest.
    num_groups = min(k, _NUM_GROUPS[X.dtype])
    ends = sorted({round(k ** ((i + 1) / num_groups)) for i in range(num_groups)})
    groups = torch.arange(k).tensor_split(ends[:-1])
    signs = draw.mixing(k, num_draws).sign()
    S = torch.zeros(k, len(groups), num_draws, dtype=torch.float64)
    for index, members in enumerate(groups):
        S[members, index] = signs[members]
    S = S.flatten(1)
    fresh = product.afresh(combine(X, S))
    norms = column_norms(fresh - method.combine_images(coefficients @ S), rows=product.rows)
    whole = norms.view(len(groups), num_draws).square().mean(dim=1).sqrt()
    noise = torch.empty_like(theta)
    for index, members in enumerate(groups):
        noise[members] = _SCATTER * whole[index] / len(members) ** 0.5
    return noise
