"""``(s J Jᵀ + D)^-1`` from the other side: a matrix of the columns of J, which are fewer than its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Any, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.engines.weight_gram import WEIGHTS, WeightGram, weight_gram_fits
from ntk_lazy.linalg.conjugate_gradients import Map, Preconditioner, conjugate_gradients
from ntk_lazy.operator.gramian import Gramian
from ntk_lazy.shapes import Block
from ntk_lazy.solves import Solve

_REFINEMENTS = 3
_GAIN = 0.5  # of a refinement that is worth another one
# The condition number of the small matrix times the eps of its factor, and times that of the products: beyond, log
# determinants have few digits, and residuals of single precision were larger than what they began with.
_MOST_ROUNDING = {"factor": 1e-3, "products": 1.0}
_BLOCK = 512  # columns of an inverse factor at a time


@final
@dataclass(frozen=True, eq=False)
class WeightSolution:
    """A solution, and how good it is.

    Attributes:
        X: The solution.
        worst: Largest of the relative residuals, measured by a product.
        first: The same before any refinement.
    """

    X: Block
    worst: float
    first: float


@final
@dataclass(frozen=True, eq=False)
class WeightSpace:
    """``A = s J Jᵀ + c U`` with a diagonal U whose largest entry is 1, by Woodbury's formula.

    With ``G = Jᵀ U^-1 J`` and ``ρ = c / s``, ``A^-1 = (U^-1 − U^-1 J (G + ρ I)^-1 Jᵀ U^-1) / c``.

    Attributes:
        gramian: ``J Jᵀ``, without the scale.
        scale: s.
        noise: c.
        shape: The diagonal of U in the dtype of J; None for the unit matrix.
        gram: G.
        factor: L with ``L Lᵀ = G + ρ I``.
        was_kept: Whether G is one that was made before.
    """

    gramian: Gramian
    scale: float
    noise: float
    shape: Float[Tensor, " n"] | None
    gram: WeightGram
    factor: Float64[Tensor, "features features"]
    was_kept: bool

    @classmethod
    def of(
        cls,
        kernel: Any,
        diagonal: Float[Tensor, " n"],
        *,
        right_hand_sides: int,
        rtol: float,
        rank: Callable[[], int],
        num_solves: int,
    ) -> WeightSpace | None:
        """Factorise ``K + D``, if the plan says so; None if it prefers conjugate gradients.

        It does not where the user named an engine, K is batched or has a scale that is not positive, J has as many
        columns as rows, G does not fit, or the noise is so small that rounding shows.

        Args:
            kernel: K, an ``NTKLinearOperator``.
            diagonal: That of D, positive.
            right_hand_sides: Of a solve, for the plan.
            rtol: Asked of conjugate gradients, for the plan.
            rank: Says that of their preconditioner, for the plan.
            num_solves: With other noise and scale, for the plan.

        Cost: that of ``WeightGram.of``, unless the last one was for the same J and U; and of its factor.
        """
        gramian = kernel.gramian
        settings, rows, engine = kernel.settings, gramian.side1, gramian.engine
        is_candidate = settings.engine == "auto" and kernel.is_gram_matrix and weight_gram_fits(engine, rows.num_rows)
        scale = 1.0 if gramian.scale is None else float(gramian.scale.detach())
        noise = float(diagonal.max()) if is_candidate else 0.0
        if not (is_candidate and scale > 0 and noise > 0):
            return None
        shape = diagonal / noise if bool((diagonal != noise).any()) else None
        key = (engine.model, rows.x, rows.selected)
        found = settings.gram.find(*key, key=shape)
        if found is None:
            asked = Solve(
                noise=float(diagonal.mean()),
                right_hand_sides=right_hand_sides,
                rtol=rtol,
                rank=rank(),
                num_solves=num_solves,
            )
            if kernel.explain(solve=asked).engine != WEIGHTS:
                return None
            settings.gram.forget()  # before its successor is made
            found = settings.gram.keep(*key, WeightGram.of(engine, rows.x, _row_weights(gramian, shape)), key=shape)
            was_kept = False
        else:
            was_kept = True
        shift = noise / scale
        condition = found.trace / shift
        if (
            condition * torch.finfo(torch.float64).eps > _MOST_ROUNDING["factor"]
            or condition * torch.finfo(gramian.dtype).eps > _MOST_ROUNDING["products"]
        ):
            return None
        factor = found.factor(shift)
        if factor is None:
            return None
        return cls(replace(gramian, scale=None), scale, noise, shape, found, factor, was_kept)

    def solve(self, matmul: Map, B: Block, *, rtol: float, max_steps: int) -> WeightSolution:
        """Solve ``A X = B``, refined until the measured residuals are small; by conjugate gradients if they stay large.

        What the formula takes away from B may be nearly all of it, so that rounding is larger than the answer by up to
        the condition number of A: refinements multiply it by itself.

        Args:
            matmul: Multiplies with A.
            B: Right-hand sides.
            rtol: ``‖b − A x‖ <= rtol ‖b‖`` is asked for, for each column.
            max_steps: Of conjugate gradients, preconditioned with the formula.

        Cost: two products with all columns, and two for each refinement.
        """
        norms = _norms(B)
        X = self.apply(B)
        R = B - matmul(X)
        sizes = _norms(R) / torch.where(norms > 0, norms, 1.0)
        first = _largest(sizes)
        for _ in range(_REFINEMENTS):
            if _largest(sizes) <= rtol:
                break
            better = X + self.apply(R)
            rest = B - matmul(better)
            now = _norms(rest) / torch.where(norms > 0, norms, 1.0)
            is_better = now < sizes
            X, R = torch.where(is_better, better, X), torch.where(is_better, rest, R)
            before, sizes = sizes, torch.where(is_better, now, sizes)
            if bool((sizes > torch.clamp(_GAIN * before, min=rtol)).any()):
                break
        pending = (sizes > rtol).nonzero().squeeze(1)
        if len(pending):
            goal = min(float((rtol / sizes[pending]).min()), 0.5)
            found = conjugate_gradients(
                matmul, R[:, pending], rtol=goal, max_steps=max_steps, preconditioner=Preconditioner(self.apply)
            )
            X, R = X.clone(), R.clone()
            X[:, pending] += found.X
            R[:, pending] = B[:, pending] - matmul(X[:, pending])
            sizes = _norms(R) / torch.where(norms > 0, norms, 1.0)
        return WeightSolution(X, _largest(sizes), first)

    def is_doubtful(self, solution: WeightSolution) -> bool:
        """Whether residuals are larger than rounding explains, so that G may be that of other parameters."""
        eps = torch.finfo(self.gramian.dtype).eps
        return not solution.first <= 1e3 * eps * (1 + self.gram.trace * self.scale / self.noise)

    def apply(self, B: Block) -> Block:
        """Return ``A^-1 B`` as the formula has it. Cost: a product."""
        V = B if self.shape is None else B / self.shape.unsqueeze(1)
        w = torch.cholesky_solve(self.gramian.jacobian_rmatmul(V).double(), self.factor)
        Y = self.gramian.jacobian_matmul(w.to(B.dtype))
        return (V - (Y if self.shape is None else Y / self.shape.unsqueeze(1))) / self.noise

    def log_determinant(self) -> float:
        """``log det A``, exact."""
        n, F = self.gramian.side1.num_rows, self.gram.matrix.shape[0]
        found = 2 * float(self.factor.diagonal().log().sum()) - F * log(self.noise / self.scale) + n * log(self.noise)
        return found if self.shape is None else found + float(self.shape.double().log().sum())

    def effective_rank(self) -> float:
        """``tr(A^-1 s J Jᵀ)``: how many directions the noise leaves. Cost: ``F³ / 3`` operations."""
        F = self.factor.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=self.factor.device)
        for begin in range(0, F, _BLOCK):
            lower = self.factor[begin:, begin:]
            units = torch.eye(lower.shape[0], min(_BLOCK, F - begin), dtype=lower.dtype, device=lower.device)
            total += torch.linalg.solve_triangular(lower, units, upper=False).square().sum()
        return F - self.noise / self.scale * float(total)

    def inverse_diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal of ``A^-1``. Cost: the rows of J, and ``n F²`` operations."""
        parts = [part.square().sum(0) for part in self._solved_rows(self.gramian)]
        taken = self.gramian.side1.gather(torch.cat(parts).unsqueeze(1)).squeeze(1)
        u = torch.ones_like(taken) if self.shape is None else self.shape.double()
        return ((1 / u - taken / u.square()) / self.noise).to(self.gramian.dtype)

    def posterior_root(self, tests: Gramian) -> Float[Tensor, "tests features"]:
        """Return R with ``R Rᵀ = K* − K(*, train) A^-1 K(train, *)`` for points of the same network.

        That is ``c J* (G + ρ I)^-1 J*ᵀ``, in which nothing is taken away.

        Cost: the rows of ``J*``, and ``n* F²`` operations.
        """
        parts = [part.mT.to(self.gramian.dtype) for part in self._solved_rows(tests)]
        full = torch.cat(parts) if parts else self.factor.new_zeros(0, self.factor.shape[0]).to(self.gramian.dtype)
        return tests.side1.gather(full) * self.noise**0.5

    def _solved_rows(self, gramian: Gramian) -> Iterator[Tensor]:
        """Go through ``L^-1 Jᵀ``, all rows of some examples at a time."""
        x, engine = gramian.side1.x, gramian.engine
        for examples in engine.row_chunks(x.shape[0]):
            with torch.no_grad():
                J = engine.rows(x[examples]).reshape(-1, self.factor.shape[0]).double()
                yield torch.linalg.solve_triangular(self.factor, J.mT, upper=False)


def _row_weights(gramian: Gramian, shape: Tensor | None) -> Tensor | None:
    """``U^-1`` among all rows of all examples: a row that is there twice counts twice, another one not at all."""
    rows = gramian.side1
    if shape is None and rows.selected is None:
        return None
    one = torch.ones(rows.num_rows, dtype=gramian.dtype, device=gramian.device)
    return rows.scatter((one if shape is None else one / shape).unsqueeze(1)).squeeze(1)


def _norms(X: Block) -> Float64[Tensor, " k"]:
    return torch.linalg.vector_norm(X, dim=0, dtype=torch.float64)


def _largest(sizes: Tensor) -> float:
    return float(sizes.max()) if sizes.numel() else 0.0
