"""Frobenius norms and inner products: a leading subspace exactly, the rest by random products.

One eigenvalue often holds nearly all of ``‖K‖_F``; random vectors alone would then measure their own overlap with
one eigenvector. So that subspace is multiplied exactly, and random vectors orthogonal to it see the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.columns import Eigenpairs, check_pairs
from ntk_lazy.errors import ArgumentError, ShapeError
from ntk_lazy.estimate.result import Estimate, error_of_mean
from ntk_lazy.linalg import column_norms, combine, gram, orthonormalise, project_out_
from ntk_lazy.precision import ieee_precision
from ntk_lazy.products import Operator, in_units, multiply, rows_of
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block

# Seeds of the samples must differ from those of the sketch, or the samples would see what the sketch has seen.
_SAMPLE_SEED = 7919
# Of a norm, in units of the dtype: what products and eigenvalues are off by where nothing is left to sample.
_ROUNDING = 8


@dataclass(frozen=True, kw_only=True)
class Deflation:
    """How many vectors are spent on what.

    Attributes:
        num_leading: Leading vectors that are multiplied exactly, of each operator: its eigenvectors where they are
            known, or what a block of as many random products is rich in.
        num_samples: Random vectors spent on the rest; at least 4.
    """

    num_leading: int = 16
    num_samples: int = 16

    def __post_init__(self) -> None:
        if self.num_leading < 0 or self.num_samples < 4:
            raise ArgumentError(
                f"num_leading={self.num_leading} and num_samples={self.num_samples}: no fewer than 0 and 4 are needed."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ProductSamples:
    """Inner products ``⟨A_a, A_b⟩_F``, split into a part that is exact and one estimate of the rest for each sample.

    Attributes:
        units: In these the operators are measured: powers of two, 1 where squares of entries neither overflow nor
            vanish.
        exact: Shape ``(operators, operators)``.
        products: Shape ``(samples, samples, operators, operators)``, ``⟨A_a ω_i, A_b ω_j⟩``: the estimates where
            ``i = j``; empty where nothing had to be sampled.
        overlaps: Shape ``(samples, samples)``, ``⟨ω_i, ω_j⟩``.
        num_products: Products spent on all operators together.
    """

    units: tuple[float, ...]
    exact: Float64[Tensor, "a a"]
    products: Float64[Tensor, "m m a a"]
    overlaps: Float64[Tensor, "m m"]
    num_products: int

    @property
    def samples(self) -> Float64[Tensor, "m a a"]:
        """One estimate of the rest for each sample."""
        return self.products.diagonal(dim1=0, dim2=1).movedim(-1, 0)


@ieee_precision()
def frobenius_norm(
    A: Operator,
    *,
    pairs: Eigenpairs | None = None,
    num_samples: int = 16,
    num_leading: int = 16,
    seed: int = 0,
) -> Estimate:
    """Measure ``‖A‖_F``, the root of the sum of the squared eigenvalues.

    Args:
        A: Symmetric.
        pairs: Eigenpairs of A, as many as there are: they take the error down by orders of magnitude and spare the
            ``2 num_leading`` products spent on finding them otherwise.
        num_samples: Random vectors spent on what the leading vectors leave over.
        num_leading: Leading vectors found by products where no pairs are given.
        seed: Of the random vectors.

    Returns:
        ``sqrt(Σ_{i≤k} (λ_i² + ‖r_i‖²) + mean ‖A (I − VVᵀ) ω‖²)``; the standard error is 0 where it takes no
            more than n products to do without samples.

    Cost: ``num_samples`` products, and ``2 num_leading`` more without pairs.

    Raises:
        ShapeError: A is not square, or the pairs have other rows.
        ArgumentError: There are fewer than 4 samples, A does not multiply, or the pairs are none.
        NonFiniteError: The operator returned a NaN or an infinity.

    Source: Meyer, Musco, Musco and Woodruff, Hutch++ (SOSA 2021), applied to ``A²``.
    """
    if pairs is None:
        sampled = sample_products([A], deflation=Deflation(num_leading=num_leading, num_samples=num_samples), seed=seed)
        exact, unit = sampled.exact[0, 0], sampled.units[0]
        products, overlaps = sampled.products[..., 0, 0], sampled.overlaps
        num_products = sampled.num_products
    else:
        deflation = Deflation(num_leading=0, num_samples=num_samples)
        rows = rows_of(A)
        check_pairs(pairs)
        V = _leading([pairs], None, rows, A)
        W = _samples_beside(V, rows, deflation.num_samples, seed)
        image = multiply(A, W) if W.shape[1] else W
        (values, residuals, image), unit = in_units([pairs.values, pairs.residual_norms, image], rows)
        # λ_i is the Rayleigh quotient of v_i, so that r_i is orthogonal to v_i and ‖A v_i‖² = λ_i² + ‖r_i‖².
        exact = (values.double().square() + residuals.double().square()).sum().cpu()
        products, overlaps = gram(image, rows=rows), gram(W, rows=rows)
        num_products = W.shape[1]
    if len(products) == 0:
        return Estimate(value=exact.sqrt().item() * unit, standard_error=0.0, num_products=num_products)
    value = (exact + products.diagonal().mean()).sqrt().item()
    if value == 0:
        return Estimate(value=0.0, standard_error=0.0, num_products=num_products)
    error = max(error_of_mean(products, overlaps) / (2 * value), _ROUNDING * torch.finfo(A.dtype).eps * value)
    return Estimate(value=value * unit, standard_error=error * unit, num_products=num_products)


@ieee_precision()
def sample_products(
    operators: Sequence[Operator],
    *,
    pairs: Sequence[Eigenpairs] | None = None,
    deflation: Deflation,
    seed: int,
) -> ProductSamples:
    """Multiply several operators on the same rows with the same vectors, and form all their inner products.

    Args:
        operators: Symmetric, on the same rows.
        pairs: Eigenpairs of each; their leading vectors span the subspace that is multiplied exactly.
        deflation: How many vectors.
        seed: Of the random vectors.

    Cost: for each operator ``len(operators) num_leading + num_samples`` products, and ``num_leading`` more without
        pairs; n products where that is no more.

    Raises:
        ArgumentError: An operator does not multiply, or there are not the pairs of each.
        ShapeError: The operators have different rows.
    """
    first, rows = operators[0], rows_of(operators[0])
    if any(rows_of(A).total != rows.total for A in operators):
        raise ShapeError(f"operators of {[rows_of(A).total for A in operators]} rows cannot be compared.")
    if pairs is not None:
        _check_each(pairs, len(operators))
    width = len(operators) * deflation.num_leading
    sketch = 0 if pairs is not None else deflation.num_leading
    if rows.total <= width + sketch + deflation.num_samples:
        U = torch.eye(rows.total, dtype=first.dtype, device=first.device)[rows.start : rows.end]
        W, sketch = U[:, :0], 0
    else:
        known = _sketches(operators, rows, sketch, seed) if pairs is None else None
        U = _leading(pairs, known, rows, first, limit=deflation.num_leading)
        W = _samples_beside(U, rows, deflation.num_samples, seed)
    together = torch.cat([U, W], dim=1)
    measured = [in_units([multiply(A, together).to(first.device)], rows) for A in operators]
    images, units = [image for (image,), _ in measured], tuple(unit for _, unit in measured)
    count = U.shape[1]
    exact = torch.zeros(len(operators), len(operators), dtype=torch.float64)
    products = torch.zeros(W.shape[1], W.shape[1], len(operators), len(operators), dtype=torch.float64)
    for a, left in enumerate(images):
        for b, right in enumerate(images):
            exact[a, b] = _inner_product(left[:, :count], right[:, :count], rows)
            products[:, :, a, b] = gram(left[:, count:], right[:, count:], rows=rows)
    return ProductSamples(
        units=units,
        exact=exact,
        products=products,
        overlaps=gram(W, rows=rows),
        num_products=len(operators) * (together.shape[1] + sketch),
    )


def _check_each(pairs: Any, num_operators: int) -> None:
    if not isinstance(pairs, Sequence) or len(pairs) != num_operators:
        raise ArgumentError(f"pairs must be {num_operators} results of eigsh, one for each operator.")
    for each in pairs:
        check_pairs(each, name="one of pairs")


def _sketches(operators: Sequence[Operator], rows: Rows, width: int, seed: int) -> list[Tensor]:
    first = operators[0]
    Omega = rows.random_block(width, seed=seed, dtype=first.dtype, device=first.device)
    return [in_units([multiply(A, Omega).to(first.device)], rows)[0][0] for A in operators] if width else []


def _leading(
    pairs: Sequence[Eigenpairs] | None,
    sketches: Sequence[Tensor] | None,
    rows: Rows,
    A: Operator,
    *,
    limit: int | None = None,
) -> Block:
    """Return an orthonormal basis of the leading vectors of all operators together."""
    blocks = [p.vectors[:, :limit] for p in pairs] if pairs is not None else list(sketches or [])
    for block in blocks:
        if block.shape[0] != rows.local:
            raise ShapeError(f"the pairs have {block.shape[0]} rows and the operator has {rows.local}.")
    blocks = [block.detach().to(A.device, A.dtype) for block in blocks]
    if not blocks:
        return torch.empty(rows.local, 0, dtype=A.dtype, device=A.device)
    if len(blocks) == 1 and pairs is not None:
        return blocks[0]
    W = torch.cat(blocks, dim=1)
    # Vectors that two operators share leave fewer directions than columns; none is drawn to make up for them.
    return orthonormalise(W, [], rows=rows, width=W.shape[1], draw=lambda _: W[:, :0]).Q


def _samples_beside(U: Block, rows: Rows, num_samples: int, seed: int) -> Float[Tensor, "n m"]:
    """Draw vectors orthogonal to a basis, uniform in direction, of squared length n − k; none if nothing is left."""
    room = rows.total - U.shape[1]
    if room <= 0:
        return U[:, :0]
    W = rows.random_block(num_samples, seed=seed + _SAMPLE_SEED, dtype=U.dtype, device=U.device)
    project_out_(W, [U], rows=rows)
    return combine(W, torch.diag(room**0.5 / column_norms(W, rows=rows)))


def _inner_product(left: Block, right: Block, rows: Rows) -> Tensor:
    """Return the sum of the products of all entries with their counterparts, in float64 on the CPU."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(65_536), right.split(65_536), strict=True):
        total += (a.double() * b.double()).sum()
    return rows.sum(total).cpu()
