"""A kernel with a diagonal added, as a Gaussian process has it: solves that go on until they are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, final

import torch
from linear_operator import settings
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    LinearOperator,
    PsdSumLinearOperator,
    RootLinearOperator,
)
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from typing_extensions import override

from ntk_lazy.errors import ArgumentError
from ntk_lazy.gemm import times_transposed
from ntk_lazy.linalg.conjugate_gradients import FROM_ROUNDING, Preconditioner, conjugate_gradients
from ntk_lazy.linalg.tiles import row_tiles
from ntk_lazy.operator.differentiation import differentiable_once, once, solve_for
from ntk_lazy.operator.log_likelihood import log_likelihood_terms
from ntk_lazy.operator.ordinary import in_ordinary_mode
from ntk_lazy.operator.preconditioner_rank import preconditioner_rank
from ntk_lazy.operator.roots import known_norm, lanczos_inverse_root, lanczos_root, randomised_root, root_of_kept_pairs
from ntk_lazy.operator.weight_space import WeightSolution, WeightSpace
from ntk_lazy.precision import ieee_precision
from ntk_lazy.solves import MOST_RTOL, TYPICAL_STEPS

Preconditioning: TypeAlias = tuple[Callable[[Tensor], Tensor] | None, LinearOperator | None, Tensor | None]

_LEAST_STEPS = 10  # as linear_operator takes, whose default tolerance of 1 asks for none
_TYPICAL_SOLVES = 10  # of a training: what is made of K alone pays for all of them


@final
@in_ordinary_mode
class AddedDiagonal(AddedDiagLinearOperator):  # type: ignore[misc]  # linear_operator has no types
    """``K + D`` with a tangent kernel K.

    Where linear_operator solves by Cholesky (up to ``max_cholesky_size`` rows) this does too. Beyond, it differs in:

    - Conjugate gradients stop by the measured residual of each column, relative to its right-hand side, at
      ``cg_tolerance``; linear_operator's stop at steps whose curvature is below 1e-10 in absolute terms.
    - The preconditioner is a randomised Nyström approximation of rank ``max_preconditioner_size``, or of one that pays
      (``chosen_rank``), from one product or from columns of K that are drawn at random, whichever costs less, in place
      of a Cholesky factor with the largest pivots; it is kept while parameters and inputs stay the same, whatever
      becomes of scale and diagonal. Gradients of log determinants do not go through it, and stay unbiased. Eigenpairs
      of K that were given (``precondition_with``) take its place.
    - A diagonal of equal numbers that is not one number keeps the gradient of each.
    - Where J has fewer columns than rows, and the plan finds it cheaper, solves go by a Gram matrix of the columns,
      and log determinants with their gradients in scale and diagonal are exact. See ``WeightSpace``.
    """

    @property
    def kernel(self) -> Any:
        """K, an ``NTKLinearOperator``; it makes operators of this class, and so is not known by name here."""
        return self._linear_op

    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Keep what products have in common within the context, while nothing changes."""
        return nullcontext() if self.kernel.batch_shape else self.kernel.linearised(num_columns)

    @override
    def _matmul(self, rhs: Tensor) -> Tensor:
        diagonal = self._diag_tensor._diagonal()
        return self.kernel._matmul(rhs) + (diagonal * rhs if rhs.ndim == 1 else diagonal.unsqueeze(-1) * rhs)

    @override
    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        if not (isinstance(other, Tensor) and torch.is_grad_enabled() and (other.requires_grad or self.requires_grad)):
            return super().matmul(other)
        # Part by part: each follows the graph of a gradient, where linear_operator's sum saves vectors without theirs.
        return self.kernel.matmul(other) + self._diag_tensor.matmul(other)

    @override
    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        found = solve_for(self, right_tensor, left_tensor)
        return super().solve(right_tensor, left_tensor) if found is None else found

    def bilinear_gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate ``sum_d left_dᵀ (K + D) right_d`` in all tensors of both; in the caller's grad mode."""
        of_diagonal = self._diag_tensor._bilinear_derivative(left, right)
        of_kernel = self.kernel.bilinear_gradients(left, right)
        is_first = self.linear_ops[0] is self.kernel
        return (*of_kernel, *of_diagonal) if is_first else (*of_diagonal, *of_kernel)

    @override
    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        # As for K: with vectors that linear_operator has saved without their graph.
        with torch.no_grad():
            found: tuple[Tensor | None, ...] = super()._bilinear_derivative(left_vecs, right_vecs)
        return differentiable_once(found, (left_vecs, right_vecs, *self.representation()))

    @override
    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        value: Tensor = super().inv_quad(*once(inv_quad_rhs, of=self.representation()), reduce_inv_quad)
        return value

    @override
    def _solve(
        self, rhs: Tensor, preconditioner: Callable[[Tensor], Tensor] | None = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._check_diagonal()
        tolerance = float(settings.cg_tolerance.value())
        max_steps = int(settings.max_cg_iterations.value())
        steps = int(settings.max_lanczos_quadrature_iterations.value())
        columns = rhs if rhs.ndim > 1 else rhs.unsqueeze(-1)
        by_weights = None if num_tridiag or preconditioner is not None else self._solve_by_weights(columns.detach(), 1)
        if by_weights is not None:
            X = by_weights[1].X
            return X if rhs.ndim > 1 else X.squeeze(-1)
        inverse = preconditioner
        if inverse is None and not num_tridiag:
            with torch.no_grad():
                inverse = self.detach()._preconditioner_for(columns.shape[-1], 1)[0]
        batch = torch.broadcast_shapes(columns.shape[:-2], self.batch_shape)
        columns = columns.expand(*batch, *columns.shape[-2:])
        with self.linearised(columns.shape[-1] * TYPICAL_STEPS):
            solution = conjugate_gradients(
                self._matmul,
                columns.detach(),
                rtol=tolerance,
                max_steps=max_steps,
                # With Lanczos matrices there are steps enough, unless the tolerance asks for hardly any.
                min_steps=0 if num_tridiag and tolerance < MOST_RTOL else min(_LEAST_STEPS, max_steps),
                preconditioner=None if inverse is None else Preconditioner(inverse, known_norm(self.kernel)),
                num_tridiagonal=num_tridiag or 0,
                tridiagonal_steps=steps,
            )
        if solution.residuals.numel():
            _warn(float(solution.residuals.max()), tolerance, max_steps, rounding=float(solution.rounding.max()))
        X = solution.X if rhs.ndim > 1 else solution.X.squeeze(-1)
        return (X, solution.tridiagonal) if num_tridiag else X

    @override
    def _solve_preconditioner(self) -> None:
        # Made by ``_solve``, which knows the right-hand sides, and may do without.
        return None

    @override
    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        by_cholesky = settings.fast_computations.log_prob.off() or self.size(-1) <= settings.max_cholesky_size.value()
        if inv_quad_rhs is not None and not by_cholesky:
            (inv_quad_rhs,) = once(inv_quad_rhs, of=self.representation())
        found = None
        if logdet and not by_cholesky and not self._trains_network():
            self._check_diagonal()
            rhs = inv_quad_rhs
            if rhs is None:
                # Any right-hand side shows whether the Gram matrix is that of this kernel.
                rhs = torch.randn(self.size(-1), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                rhs = rhs.to(self.device, self.dtype)
            columns = rhs if rhs.ndim > 1 else rhs.unsqueeze(-1)
            found = self._solve_by_weights(columns.detach(), _TYPICAL_SOLVES)
        if found is None:
            terms: tuple[Tensor | None, Tensor | None] = super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
            return terms
        weights, solution = found
        is_one = isinstance(self._diag_tensor, ConstantDiagLinearOperator)
        diagonal = self._diag_tensor.diag_values if is_one else self._diag_tensor._diagonal()
        quadratic, log_determinant = log_likelihood_terms(
            weights, solution.X, columns, self.kernel.gramian.scale, diagonal
        )
        if inv_quad_rhs is None:
            return torch.zeros_like(log_determinant), log_determinant
        return quadratic.sum(-1) if reduce_inv_quad else quadratic, log_determinant

    def weights(self, right_hand_sides: int = 1, num_solves: int = 1) -> WeightSpace | None:
        """Return the sum with its factor in the space of weights, if solves go by that; None if they do not.

        Args:
            right_hand_sides: What is planned for.
            num_solves: With other noise and scale.
        """
        if self.batch_shape:
            return None
        rtol = float(settings.cg_tolerance.value())
        with torch.no_grad():
            return WeightSpace.of(
                self.kernel,
                self._diag_tensor._diagonal().detach(),
                right_hand_sides=right_hand_sides,
                rtol=min(max(rtol, torch.finfo(self.dtype).eps), MOST_RTOL),
                rank=lambda: self._rank(right_hand_sides, num_solves),
                num_solves=num_solves,
            )

    def _solve_by_weights(self, B: Tensor, num_solves: int) -> tuple[WeightSpace, WeightSolution] | None:
        if B.ndim != 2:
            return None
        tolerance, max_steps = float(settings.cg_tolerance.value()), int(settings.max_cg_iterations.value())
        while True:
            weights = self.weights(max(B.shape[1], 1), num_solves)
            if weights is None:
                return None
            with torch.no_grad(), self.linearised(3 * B.shape[1]):
                solution = weights.solve(self._matmul, B, rtol=tolerance, max_steps=max_steps)
            if not (weights.was_kept and weights.is_doubtful(solution)):
                _warn(solution.worst, tolerance, max_steps)
                return weights, solution
            # Somebody wrote to the parameters where their versions do not show it.
            self.kernel.settings.gram.forget()

    def _trains_network(self) -> bool:
        """Whether gradients are wanted in anything of K but its scale."""
        scale = self.kernel.gramian.scale
        tensors = (t for t in self.kernel.representation() if t is not scale)
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def _rank(self, right_hand_sides: int, num_solves: int) -> int:
        """The rank of the preconditioner that a solve would get."""
        # Pairs that are given cost no product; the plan takes them for a Nyström approximation of their rank.
        known = root_of_kept_pairs(self.kernel)
        if known is not None:
            return int(known.shape[1])
        diagonal = self._diag_tensor._diagonal()
        return preconditioner_rank(self.kernel, diagonal, right_hand_sides=right_hand_sides, num_solves=num_solves)

    @override
    def _preconditioner(self) -> Preconditioning:
        # Asked for by log determinants, whose probes are solved for together with one right-hand side.
        return self._preconditioner_for(int(settings.num_trace_samples.value()) + 1, _TYPICAL_SOLVES)

    def _preconditioner_for(self, right_hand_sides: int, num_solves: int) -> Preconditioning:
        """Make the inverse, the operator and the log determinant of a preconditioner; all None if there is none."""
        if self.preconditioner_override is not None:
            found: Preconditioning = super()._preconditioner()
            return found
        root = root_of_kept_pairs(self.kernel)
        if root is None:
            self._check_diagonal()
            rank = self._rank(right_hand_sides, num_solves)
            root = randomised_root(self.kernel, rank, right_hand_sides=right_hand_sides) if rank else None
        if root is None:
            return None, None, None
        # Of a diagonal of n numbers that happen to be equal each has a gradient of its own.
        if isinstance(self._diag_tensor, ConstantDiagLinearOperator):
            return self._by_orthogonal_columns(root)
        self._piv_chol_self = root
        self._noise, self._constant_diag = self._diag_tensor._diagonal().unsqueeze(-1), False
        *batch_shape, n, k = root.shape
        eye = torch.eye(k, dtype=self.dtype, device=self.device).expand(*batch_shape, k, k)
        self._init_cache_for_non_constant_diag(eye, batch_shape, n)
        self._precond_lt = PsdSumLinearOperator(RootLinearOperator(root), self._diag_tensor)
        # There is one now: the settings have been asked.
        with settings.max_preconditioner_size(k), settings.min_preconditioning_size(0):
            made: Preconditioning = super()._preconditioner()
        return made

    def _by_orthogonal_columns(self, root: Tensor) -> Preconditioning:
        """Invert ``L Lᵀ + σ² I`` with orthogonal columns of L: noise enters k numbers, and nothing is factorised.

        What the columns span is taken out of V twice, as Gram and Schmidt would: what rounding leaves of it at first,
        divided by the noise, would make an inverse that is not positive where ``λ_1 / σ²`` nears 1/eps. In float32 a
        third fewer products are needed there.

        Cost: ``8 n k`` operations for each column; L is read three times.
        """
        n, k = root.shape[-2:]
        noise = self._diag_tensor.diag_values
        fixed = noise.detach().double().unsqueeze(-1)
        values = torch.linalg.vector_norm(root, dim=-2, dtype=torch.float64).square().unsqueeze(-2)
        units = torch.where(values > 0, 1 / values, 0)
        tiles = [(tile, root[..., tile, :]) for tile in row_tiles(n, k, device=root.device)]

        @ieee_precision()
        def inverse(V: Tensor) -> Tensor:
            # As VᵀL: LᵀV takes several times as long, whoever multiplies. L is read three times and not four.
            first = torch.stack([times_transposed(V[..., tile, :].mT, L.mT) for tile, L in tiles]).sum(
                0, dtype=torch.float64
            )
            taken, again, rest = (units * first).to(V.dtype), torch.zeros_like(first), torch.empty_like(V)
            for tile, L in tiles:
                rest[..., tile, :] = V[..., tile, :] - times_transposed(L, taken)
                again += times_transposed(rest[..., tile, :].mT, L.mT)
            inside = (units * (fixed / (values + fixed) * (first + again) - again)).to(V.dtype)
            for tile, L in tiles:
                rest[..., tile, :] += times_transposed(L, inside)
            return rest / noise.detach().unsqueeze(-1)

        logdet = (values.squeeze(-2) + noise.double()).log().sum(-1) + (n - k) * noise.double().log().squeeze(-1)
        operator = PsdSumLinearOperator(RootLinearOperator(root), self._diag_tensor)
        return inverse, operator, logdet.to(self.dtype)

    @override
    def _root_decomposition(self) -> Tensor:
        return lanczos_root(self)

    @override
    def _root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None
    ) -> Tensor:
        return lanczos_inverse_root(self, initial_vectors)

    @override
    def _cholesky(self, upper: bool = False) -> Any:
        self._check_diagonal()
        return super()._cholesky(upper)

    def _check_diagonal(self) -> None:
        """Refuse what no solve could be right for."""
        least = float(self._diag_tensor._diagonal().detach().min())
        n, rank = self.size(-1), self.kernel.num_features
        if not least >= 0 or (least == 0 and rank < n):
            reason = (
                f"K has {n} rows and at most rank {rank}, that of the Jacobian, so that it is singular"
                if least == 0
                else "so that the sum may be indefinite"
            )
            raise ArgumentError(
                f"the diagonal that is added to K goes down to {least:g}: {reason}. Add a positive noise: a thousandth "
                "of the mean of K's diagonal is a start."
            )


def _warn(worst: float, tolerance: float, max_steps: int, *, rounding: float = 0.0) -> None:
    if worst <= tolerance:
        return
    cure = (
        "That is what rounding leaves of it: use a float64 model"
        if worst <= FROM_ROUNDING * rounding
        else "Raise max_cg_iterations or max_preconditioner_size, use a float64 model"
    )
    warnings.warn(
        f"conjugate gradients ended with a relative residual of {worst:.1e}, where {tolerance:.1e} was asked for, "
        f"after at most {max_steps} steps. {cure}, or ask for less (cg_tolerance, eval_cg_tolerance).",
        NumericalWarning,
        stacklevel=3,
    )
