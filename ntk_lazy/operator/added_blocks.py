"""A kernel of several outputs with noise that they have in common, example by example: ``K + I ⊗ S``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from linear_operator import settings
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    PsdSumLinearOperator,
    RootLinearOperator,
)
from linear_operator.utils.memoize import cached
from torch import Tensor
from typing_extensions import override

from ntk_lazy.linalg.conjugate_gradients import Map, Preconditioner, conjugate_gradients
from ntk_lazy.operator.cholesky import cholesky_factor, cholesky_of
from ntk_lazy.operator.loose_solves import hint_at_loose_solves, warn_of_residual
from ntk_lazy.operator.preconditioner_rank import preconditioner_rank
from ntk_lazy.operator.roots import (
    known_norm,
    lanczos_inverse_root,
    lanczos_root,
    randomised_root,
    root_of_kept_pairs,
    samples_by_root,
)
from ntk_lazy.solves import MOST_RTOL, TYPICAL_STEPS

Preconditioning: TypeAlias = tuple[Map | None, LinearOperator | None, Tensor | None]

_TYPICAL_SOLVES = 10  # of a training, as for ``AddedDiagonal``


@final
class BlockNoise(KroneckerProductLinearOperator):  # type: ignore[misc]
    """``I ⊗ S``, whose samples come from a Cholesky factor of S."""

    @property
    def block(self) -> Float[Tensor, "C C"]:
        """S, with its graph."""
        ones, tasks = self.linear_ops
        S: Tensor = tasks.to_dense() * ones.diag_values
        return S

    @override
    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        factor = cholesky_factor(self.block)
        normal = torch.randn(num_samples, self.linear_ops[0].shape[-1], factor.shape[0]).to(factor)
        return (normal @ factor.mT).flatten(1)


@final
class AddedBlocks(PsdSumLinearOperator):  # type: ignore[misc]  # linear_operator has no types
    """``K + I ⊗ S`` with a tangent kernel of C outputs and a positive definite S of C rows.

    The noise of ``MultitaskGaussianLikelihood(rank=r)``. Solves, preconditioner and roots are as in ``AddedDiagonal``,
    by conjugate gradients alone.
    """

    @classmethod
    def of(cls, kernel: Any, other: Any) -> AddedBlocks | None:
        """Add to a kernel what is such a noise; None if it is not."""
        parts: tuple[Any, ...] = other.linear_ops if type(other) is KroneckerProductLinearOperator else ()
        is_plain = len(parts) == 2 and isinstance(parts[0], ConstantDiagLinearOperator) and not other.batch_shape
        if not is_plain or not kernel.is_gram_matrix or parts[0].shape[-1] * parts[1].shape[-1] != kernel.shape[-1]:
            return None
        return cls(kernel, BlockNoise(*parts))

    @property
    def kernel(self) -> Any:
        """K, an ``NTKLinearOperator``."""
        return self.linear_ops[0]

    @property
    def block(self) -> Float[Tensor, "C C"]:
        """S, with its graph."""
        S: Tensor = self.linear_ops[1].block
        return S

    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Keep what products have in common within the context, while nothing changes."""
        return nullcontext() if self.kernel.batch_shape else self.kernel.linearised(num_columns)

    @override
    def _solve(self, rhs: Tensor, preconditioner: Map | None = None, num_tridiag: int | None = 0) -> Any:
        hint_at_loose_solves()
        tolerance, max_steps = float(settings.cg_tolerance.value()), int(settings.max_cg_iterations.value())
        inverse = preconditioner
        if inverse is None and not num_tridiag:
            with torch.no_grad():
                inverse = self.detach()._preconditioner_for(rhs.shape[-1], 1)[0]
        with self.linearised(rhs.shape[-1] * TYPICAL_STEPS):
            solution = conjugate_gradients(
                self._matmul,
                rhs.detach(),
                rtol=tolerance,
                max_steps=max_steps,
                min_steps=0 if tolerance < MOST_RTOL else min(_TYPICAL_SOLVES, max_steps),
                preconditioner=None if inverse is None else Preconditioner(inverse, known_norm(self.kernel)),
                num_tridiagonal=num_tridiag or 0,
                tridiagonal_steps=int(settings.max_lanczos_quadrature_iterations.value()),
            )
        if solution.residuals.numel():
            rounding = float(solution.rounding.max())
            warn_of_residual(float(solution.residuals.max()), tolerance, max_steps, rounding=rounding)
        return (solution.X, solution.tridiagonal) if num_tridiag else solution.X

    @override
    def _solve_preconditioner(self) -> None:
        return None  # made by ``_solve``, which knows the right-hand sides

    @override
    def _preconditioner(self) -> Preconditioning:
        return self._preconditioner_for(int(settings.num_trace_samples.value()) + 1, _TYPICAL_SOLVES)

    def _preconditioner_for(self, right_hand_sides: int, num_solves: int) -> Preconditioning:
        """Woodbury's formula for ``L Lᵀ + I ⊗ S``, whitened by a factor of S; all None if there is no L."""
        S = self.block
        num_examples = self.shape[-1] // S.shape[0]
        factor, info = torch.linalg.cholesky_ex(S)
        root = root_of_kept_pairs(self.kernel)
        if root is None and not bool(info):
            diagonal = S.diagonal().repeat(num_examples)
            rank = preconditioner_rank(self.kernel, diagonal, right_hand_sides=right_hand_sides, num_solves=num_solves)
            root = randomised_root(self.kernel, rank, right_hand_sides=right_hand_sides) if rank else None
        if root is None or bool(info):
            return None, None, None
        W = _by_examples(factor, root)
        inner = torch.linalg.cholesky(torch.eye(W.shape[-1], dtype=torch.float64).to(W.device) + (W.mT @ W).double())
        white, fixed = W.detach(), factor.detach()

        def inverse(V: Tensor) -> Tensor:
            V = _by_examples(fixed, V)
            taken = torch.cholesky_solve((white.mT @ V).double(), inner.detach()).to(V.dtype)
            return _by_examples(fixed, V - white @ taken, transposed=True)

        logdet = 2 * inner.diagonal().log().sum() + 2 * num_examples * factor.diagonal().double().log().sum()
        return inverse, PsdSumLinearOperator(RootLinearOperator(root), self.linear_ops[1]), logdet.to(self.dtype)

    @override
    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        by_root = samples_by_root(self)
        samples: Tensor = (LinearOperator if by_root else PsdSumLinearOperator).zero_mean_mvn_samples(self, num_samples)
        return samples

    @override
    def _root_decomposition(self) -> Tensor:
        return lanczos_root(self)

    @override
    def _root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None
    ) -> Tensor:
        return lanczos_inverse_root(self, initial_vectors)

    @override
    @cached(name="cholesky")  # type: ignore[untyped-decorator]
    def _cholesky(self, upper: bool = False) -> LinearOperator:
        return cholesky_of(self, upper=upper)


def _by_examples(factor: Float[Tensor, "C C"], V: Float[Tensor, "rows k"], *, transposed: bool = False) -> Tensor:
    """Solve with the factor of S, or its transpose, for the rows of each example."""
    rows = V.unflatten(0, (-1, factor.shape[0]))
    return torch.linalg.solve_triangular(factor.mT if transposed else factor, rows, upper=transposed).flatten(0, 1)
