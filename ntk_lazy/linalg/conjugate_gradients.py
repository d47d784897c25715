"""Conjugate gradients for many right-hand sides at once, judged by the residual itself.

Each column is solved by itself, with products in common. Nothing is compared with an absolute number: a system in other
units takes the same steps. What the recurrence says of its residual is checked by one more product, and columns whose
residual is larger than that start again from it, as long as rounding does not explain it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Columns: TypeAlias = Float[Tensor, "*batch n k"]
Map: TypeAlias = Callable[[Columns], Columns]
Scalars: TypeAlias = Float[Tensor, "*batch 1 k"]

FROM_ROUNDING = 10.0
"""How many times what rounding makes of one product a residual may be that rounding explains: that of all steps."""

_MOST_ROUNDS = 8
_GAIN = 0.5  # of a round that is worth another one
_NEXT_LOOK = 0.3  # of a residual that was measured: where it is measured again
_QUADRATURE_RTOL = 1e-2
_OTHER_UNITS = (3.0, 5.0, 7.0)  # not powers of two: everything rounds anew


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """An approximate inverse of A.

    Attributes:
        inverse: Multiplies with it; symmetric positive definite.
        norm: What is known of the largest eigenvalue of A, from below: steps do not show it when the inverse has taken
            its direction out of them. 0 if nothing is.
    """

    inverse: Map
    norm: float = 0.0


@dataclass(frozen=True, eq=False)
class Solution:
    """What came out.

    Attributes:
        X: The solutions.
        residuals: ``‖b − A x‖ / ‖b‖`` of each column, measured by a product.
        rounding: What rounding makes of it in one product, where it is above the tolerance after the first round, the
            largest of three samples; 0 elsewhere. That of all steps adds up to a few times as much.
        num_products: Columns that A was multiplied with.
        tridiagonal: Of the first columns the matrices of the Lanczos process that belongs to the steps, for the
            preconditioned matrix: ``(columns, *batch, steps, steps)``. One that ends early goes on as the identity.
    """

    X: Columns
    residuals: Scalars
    rounding: Scalars
    num_products: int
    tridiagonal: Float[Tensor, "columns *batch steps steps"]


def conjugate_gradients(
    matmul: Map,
    B: Columns,
    *,
    rtol: float,
    max_steps: int,
    min_steps: int = 0,
    preconditioner: Preconditioner | None = None,
    num_tridiagonal: int = 0,
    tridiagonal_steps: int = 0,
) -> Solution:
    """Solve ``A X = B`` for a symmetric positive definite A.

    Args:
        matmul: Multiplies with A.
        B: Right-hand sides.
        rtol: A column is done when ``‖b − A x‖ <= rtol ‖b‖``.
        max_steps: Steps of all rounds together.
        min_steps: Least steps of a column, unless its residual vanishes.
        preconditioner: Makes the steps fewer; None for none.
        num_tridiagonal: Columns from the first on for which the Lanczos matrices are wanted.
        tridiagonal_steps: Most steps of these; fewer where the residual is below the tolerance, or a hundredth, before.

    Cost: A product with all columns that are not done, for each step, and one with all at the end of each round; most
        solves have one round. Columns whose residual falls below ``eps ‖A‖ ‖x‖`` are measured in between, at each third
        of what they were: beyond what rounding allows no step is taken. Columns that are above the tolerance after the
        first round are multiplied three times more, to tell. Memory: six blocks like B.

    Source: Hestenes and Stiefel (1952); the restart is residual replacement, van der Vorst and Ye, Residual replacement
        strategies for Krylov subspace iterative methods (SIAM J. Sci. Comput. 22, 2000).
    """
    norms = _norms(B)
    X, R = torch.zeros_like(B), B.clone()
    residuals = torch.where(norms > 0, 1.0, 0.0).to(norms)
    rounding = torch.zeros_like(residuals)
    num_products, steps_left = 0, max_steps
    tridiagonal = _Tridiagonal(num_tridiagonal, min(tridiagonal_steps, B.shape[-2], max_steps), rtol)
    pending = _columns(norms > 0)
    for number in range(_MOST_ROUNDS):
        if not len(pending) or steps_left <= 0:
            break
        own, goal = torch.where(norms > 0, norms, 1.0)[..., pending], rtol * norms[..., pending]
        recorder = tridiagonal if number == 0 else _Tridiagonal(0, 0, rtol)
        least = min_steps if number == 0 else 0
        D, steps, products = _round(matmul, R[..., pending], goal, steps_left, least, preconditioner, recorder, pending)
        steps_left -= steps
        D += X[..., pending]
        left = B[..., pending] - matmul(D)
        num_products += products + len(pending)
        before, now = residuals[..., pending], _norms(left) / own
        # One that rounding has made worse is not taken.
        is_better = ~(now >= before)
        X[..., pending] = torch.where(is_better, D, X[..., pending])
        R[..., pending] = torch.where(is_better, left, R[..., pending])
        residuals[..., pending] = torch.where(is_better, now, before)
        is_pending = (now > rtol) & (now < _GAIN * before)
        if number == 0 and bool(is_pending.any()):
            at = _columns(is_pending)
            samples = _rounding(matmul, B[..., pending[at]], D[..., at], left[..., at])
            rounding[..., pending[at]] = samples / own[..., at]
            num_products += len(_OTHER_UNITS) * len(at)
        pending = pending[_columns(is_pending & (now > _worth(rounding[..., pending], rtol)))]
    return Solution(X, residuals, rounding, num_products, tridiagonal.matrices(B))


def _rounding(matmul: Map, B: Columns, X: Columns, R: Columns) -> Scalars:
    """Return the largest difference between ``B - A X``, which is R, and the same from products in other units.

    One sample is not enough: where one eigenvalue dominates, it is a normal number, and may be next to nothing.
    """
    differences = [_norms(B - unit * matmul(X / unit) - R) for unit in _OTHER_UNITS]
    return torch.stack(differences).amax(0)


def _worth(rounding: Scalars, rtol: float) -> Scalars:
    """Return the residuals from which another round is worth its steps, about as many as those before it.

    Where the tolerance can be reached, any. Elsewhere a round would gain what the steps of the last one have added to
    the rounding of a product, mostly a factor of 1 to 4: less than the other half of all steps is worth.
    """
    return torch.where(rounding <= rtol, rounding, FROM_ROUNDING * rounding)


def _round(
    matmul: Map,
    R: Columns,
    goal: Scalars,
    max_steps: int,
    min_steps: int,
    preconditioner: Preconditioner | None,
    recorder: _Tridiagonal,
    numbers: Tensor,
) -> tuple[Columns, int, int]:
    """Step until the recurrence says that all columns are done, or is wrong: corrections, steps and products."""
    begin, R, D = R, R.clone(), torch.zeros_like(R)
    first = _norms(R)
    # Of the eigenvalues of A; and the size below which the recurrence is compared with the residual that it stands for.
    largest, look = torch.full_like(first, preconditioner.norm if preconditioner else 0.0), first + torch.inf
    Z = R if preconditioner is None else preconditioner.inverse(R)
    P, rho = Z.clone(), _inner(R, Z)
    recorder.begin(numbers, rho)
    places = torch.arange(R.shape[-1], device=R.device)  # of the columns that are not done
    products = 0
    for step in range(max_steps):
        Q = matmul(P)
        products += len(places)
        curvature = _inner(P, Q)
        can_step = (rho > 0) & (curvature > 0)
        alpha = torch.where(can_step, rho / torch.where(can_step, curvature, 1.0), 0.0)
        D[..., places] += alpha.to(P.dtype) * P
        R -= alpha.to(Q.dtype) * Q
        Z = R if preconditioner is None else preconditioner.inverse(R)
        before, rho = rho, _inner(R, Z)
        beta = torch.where(can_step, rho / torch.where(can_step, before, 1.0), 0.0)
        recorder.add(step, alpha, beta, numbers[places])
        size, largest = _norms(R), largest.maximum((_norms(Q) / _norms(P)).nan_to_num(0.0, posinf=0.0))
        vanished = size <= torch.finfo(R.dtype).eps * first[..., places]
        needed = torch.full_like(size, step + 1 < min_steps, dtype=torch.bool)
        needed |= recorder.wants(step + 1, numbers[places], rho)
        is_above = size > goal[..., places]
        shown = torch.finfo(R.dtype).eps * largest * _norms(D[..., places])
        is_due = is_above & (size < shown) & (size < look)
        if bool(is_due.any()):
            at = _columns(is_due)
            off = _norms(begin[..., places[at]] - matmul(D[..., places[at]]) - R[..., at])
            products += len(at)
            is_above[..., at] &= ~(is_due[..., at] & (off > size[..., at]))
            look = torch.where(is_due, _NEXT_LOOK * size, look)
        kept = _columns(can_step & ~vanished & (is_above | needed))
        if not len(kept):
            return D, step + 1, products
        P = Z + beta.to(P.dtype) * P
        if len(kept) < len(places):
            places = places[kept]
            P, R, rho, largest, look = (t[..., kept] for t in (P, R, rho, largest, look))
    return D, max_steps, products


class _Tridiagonal:
    """Collects the coefficients of the steps, from which the Lanczos matrices follow.

    They are for quadratures of ``bᵀ log(A) b``, with the preconditioner in A and the norm. Once the residual is r these
    are off by about ``‖r‖² / 2``, and further steps are for nothing: the error of ``bᵀ (A + t I)⁻¹ b`` is
    ``rᵀ (A + t I)⁻¹ r`` with the residual of that system, which is parallel to r and falls as ``1 / (1 + t / θ)`` or
    faster, where θ is the smallest Ritz value, and the logarithm is an integral over t. Where b has next to nothing of
    the eigenvector of a far smaller λ, it is ``‖r‖² ln(θ / λ)`` at most.

    Attributes:
        num_columns: From the first on.
        num_steps: Most.
        rtol: Of the residual, where a column needs no further step.
    """

    def __init__(self, num_columns: int, num_steps: int, rtol: float) -> None:
        self.num_columns, self.num_steps = num_columns, num_steps
        self.rtol = min(rtol, _QUADRATURE_RTOL)
        self._goal = torch.zeros(())
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, numbers: Tensor, rho: Scalars) -> None:
        """Note the squares of the columns with these numbers, in the norm of the preconditioner."""
        self._goal = rho.new_zeros(*rho.shape[:-1], int(numbers.max()) + 1)
        self._goal[..., numbers] = self.rtol**2 * rho

    def add(self, step: int, alpha: Scalars, beta: Scalars, numbers: Tensor) -> None:
        """Note a step of the columns with these numbers."""
        if step < self.num_steps:
            own = numbers < self.num_columns
            self._steps.append((alpha[..., own], beta[..., own], numbers[own]))

    def wants(self, step: int, numbers: Tensor, rho: Scalars) -> Tensor:
        """Which columns have to take another step, with these squares of residuals."""
        return (numbers < self.num_columns) & (step < self.num_steps) & (rho > self._goal[..., numbers])

    def matrices(self, B: Columns) -> Tensor:
        """Write them down: ``1/α_i + β_{i-1}/α_{i-1}`` on the diagonal, ``√β_i / α_i`` beside it."""
        shape = (len(self._steps), *B.shape[:-2], self.num_columns)
        rates, ratios = (torch.zeros(shape, dtype=torch.float64, device=B.device) for _ in range(2))
        for step, (alpha, beta, numbers) in enumerate(self._steps):
            rates[step][..., numbers] = torch.where(alpha > 0, 1 / torch.where(alpha > 0, alpha, 1.0), 0.0)[..., 0, :]
            ratios[step][..., numbers] = beta[..., 0, :].clamp_min(0)
        took = rates > 0
        carried = torch.where(took[1:], ratios[:-1] * rates[:-1], 0.0)
        diagonal = torch.where(took, rates + torch.cat([torch.zeros_like(rates[:1]), carried]), 1.0)
        beside = torch.where(took[1:], ratios[:-1].sqrt() * rates[:-1], 0.0)
        matrices = _last(diagonal).diag_embed() + _last(beside).diag_embed(1) + _last(beside).diag_embed(-1)
        return matrices.to(B.dtype)


def _columns(which: Tensor) -> Tensor:
    """Numbers of the columns that a mask of shape ``(*batch, 1, k)`` has in any kernel of the batch."""
    return which.reshape(-1, which.shape[-1]).any(0).nonzero().squeeze(1)


def _last(steps: Tensor) -> Tensor:
    """From ``(steps, *batch, columns)`` to ``(columns, *batch, steps)``."""
    return steps.movedim(-1, 0).movedim(1, -1)


def _inner(X: Columns, Y: Columns) -> Scalars:
    return (X * Y).sum(-2, keepdim=True, dtype=torch.float64)


def _norms(X: Columns) -> Scalars:
    """Norms in float64, of columns that are scaled first: squares of float32 numbers leave its range."""
    largest = X.abs().amax(-2, keepdim=True) if X.shape[-2] else X.new_zeros(*X.shape[:-2], 1, X.shape[-1])
    unit = torch.where(largest > 0, largest, 1.0)
    return (X / unit).square().sum(-2, keepdim=True, dtype=torch.float64).sqrt() * unit.double()
