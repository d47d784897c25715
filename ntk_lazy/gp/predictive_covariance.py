"""Covariances between test points: factorised while that fits, in their own units."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import Any, final

import torch
from linear_operator import settings
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    TriangularLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.memoize import cached
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor
from typing_extensions import override

from ntk_lazy.linalg.conjugate_gradients import conjugate_gradients
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.operator.cholesky import cholesky_of
from ntk_lazy.operator.indices import is_same_index
from ntk_lazy.operator.roots import lanczos_inverse_root, lanczos_root
from ntk_lazy.operator.shifted_root import shifted_root

_MOST_ROWS = 4096  # up to which BoTorch factorises
_COPIES = 3  # of a matrix while it is factorised
_MOST_MISSING = 0.01  # of a trace that a root of few columns leaves out without a word


@final
class PredictiveCovariance(SumLinearOperator):  # type: ignore[misc]  # linear_operator has no types
    """A sum of operators between test points, that of a posterior with or without noise.

    Solves, roots, samples and log likelihoods go by Cholesky also where ``max_cholesky_size`` is 0, which is meant for
    the training points: a root of few columns lacks what the others have. They go by products beyond 4,096 rows, and
    where the matrix and its factor do not fit ``max_dense_bytes`` of the kernel.
    """

    @classmethod
    def of(cls, covariance: LinearOperator) -> LinearOperator:
        """Take a covariance as it comes."""
        if isinstance(covariance, cls | ZeroLinearOperator):
            return covariance
        return cls(*covariance.linear_ops) if type(covariance) is SumLinearOperator else cls(covariance)

    @property
    def is_written(self) -> bool:
        """Whether the matrix is written down and factorised."""
        n = self.size(-1)
        num_bytes = _COPIES * self.batch_shape.numel() * n * n * self.dtype.itemsize
        limits = [t.settings.max_dense_bytes for t in self.linear_ops if isinstance(t, NTKLinearOperator)]
        return n <= _MOST_ROWS and all(num_bytes <= limit for limit in limits)

    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Nothing is kept between products."""
        return nullcontext()

    # Sums, and parts of them.

    @override
    def __add__(self, other: Any) -> LinearOperator | Tensor:
        is_operator = isinstance(other, LinearOperator) and not isinstance(other, ZeroLinearOperator)
        if is_operator and other.shape == self.shape:
            more = other.linear_ops if isinstance(other, PredictiveCovariance) else (other,)
            return self.__class__(*self.linear_ops, *more)
        return super().__add__(other)

    @override
    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return self.__class__(*self.linear_ops, super().add_diagonal(diag)._diag_tensor)

    @override
    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        found: LinearOperator = super()._getitem(row_index, col_index, *batch_indices)
        return self.__class__(*found.linear_ops) if is_same_index(row_index, col_index) else found

    # What is asked of a covariance.

    @override
    @cached(name="root_decomposition")  # type: ignore[untyped-decorator]
    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        if method is None and len(self.linear_ops) == 1 and isinstance(self.linear_ops[0], RootLinearOperator):
            return _square(self.linear_ops[0])
        if method is None and self.is_written and not (torch.is_grad_enabled() and self.requires_grad):
            return _root(self.to_dense())  # where eigenvalues are equal, a root of them has no gradient
        with self._by_cholesky():
            root: LinearOperator = super().root_decomposition(method)
        return root

    @override
    def root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None, method: str | None = None
    ) -> LinearOperator:
        with self._by_cholesky():
            root: LinearOperator = super().root_inv_decomposition(
                initial_vectors=initial_vectors, test_vectors=test_vectors, method=method
            )
        return root

    @override
    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        with self._by_cholesky():
            X: Tensor = super().solve(right_tensor, left_tensor)
        return X

    @override
    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        with self._by_cholesky():
            quadratic: Tensor = super().inv_quad(inv_quad_rhs, reduce_inv_quad)
        return quadratic

    @override
    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        with self._by_cholesky():
            terms: tuple[Tensor | None, Tensor | None] = super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        return terms

    @override
    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        noise, rest = self._parts()
        if noise and rest and not self.is_written and not settings.ciq_samples.on():
            parts = (*noise, self.__class__(*rest))
            return reduce(add, (part.zero_mean_mvn_samples(num_samples) for part in parts))
        with self._by_cholesky():
            samples: Tensor = super().zero_mean_mvn_samples(num_samples)
        return samples

    @override
    @cached(name="cholesky")  # type: ignore[untyped-decorator]
    def _cholesky(self, upper: bool = False) -> LinearOperator:
        return cholesky_of(self, upper=upper)

    @override
    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        if num_tridiag:
            return super()._solve(rhs, preconditioner, num_tridiag)
        if self.is_written:
            return self.cholesky()._cholesky_solve(rhs)
        batch = torch.broadcast_shapes(self.batch_shape, rhs.shape[:-2])
        solution = conjugate_gradients(
            self._matmul,
            rhs.expand(*batch, *rhs.shape[-2:]),
            rtol=float(settings.cg_tolerance.value()),
            max_steps=int(settings.max_cg_iterations.value()),
        )
        return solution.X

    @override
    def _root_decomposition(self) -> Tensor | LinearOperator:
        noise, rest = self._parts()
        if noise and rest and self._root_decomposition_size() < self.size(-1):
            diagonal = reduce(add, (part._diagonal() for part in noise))
            return shifted_root(self.__class__(*rest)._root_decomposition(), diagonal)
        root = lanczos_root(self)
        total, found = float(self._diagonal().detach().sum()), float(root.detach().square().sum())
        if total - found > _MOST_MISSING * total:
            warnings.warn(
                f"a root of {root.shape[-1]} columns has {found / total:.0%} of the variance of {self.size(-1)} test "
                "points. Draw samples of fewer points, or raise max_dense_bytes of the kernel or variance_rank of "
                "big_data (max_root_decomposition_size).",
                NumericalWarning,
                stacklevel=2,
            )
        return root

    @override
    def _root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None
    ) -> Tensor:
        return lanczos_inverse_root(self, initial_vectors)

    def _by_cholesky(self) -> AbstractContextManager[Any]:
        most = int(settings.max_cholesky_size.value())
        return settings.max_cholesky_size(max(self.size(-1), most)) if self.is_written else nullcontext()

    def _parts(self) -> tuple[list[LinearOperator], list[LinearOperator]]:
        """Diagonals, and all else."""
        noise = [part for part in self.linear_ops if isinstance(part, DiagLinearOperator)]
        return noise, [part for part in self.linear_ops if not isinstance(part, DiagLinearOperator)]


def _root(A: Tensor) -> RootLinearOperator:
    """A Cholesky factor, or the root of eigenvalues where rounding made some of them negative."""
    L, info = torch.linalg.cholesky_ex(A)
    if not bool(info.any()):
        return RootLinearOperator(TriangularLinearOperator(L))
    values, V = torch.linalg.eigh(A.double())
    if bool((values[..., 0] < -(torch.finfo(A.dtype).eps ** 0.5) * values[..., -1]).any()):
        warnings.warn(
            f"a covariance of {A.shape[-1]} test points has an eigenvalue of {float(values.min()):.1e} beside one of "
            f"{float(values.max()):.1e}, and samples take it for zero. Solve to a smaller tolerance "
            "(eval_cg_tolerance, prediction_rtol), or in float64.",
            NumericalWarning,
            stacklevel=2,
        )
    return RootLinearOperator((V * values.clamp_min(0).sqrt().unsqueeze(-2)).to(A.dtype))


def _square(covariance: RootLinearOperator) -> RootLinearOperator:
    """A root with no more columns than rows: samples are made from as many numbers as there are points."""
    root = covariance.root.to_dense()
    if root.shape[-1] <= root.shape[-2]:
        return covariance
    return RootLinearOperator(torch.linalg.qr(root.mT)[1].mT)
