"""What a Gaussian process asks of a kernel that is its covariance: roots, samples, entries times entries."""

from __future__ import annotations

from math import prod
from typing import Self

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from linear_operator.utils.memoize import cached
from torch import Tensor
from typing_extensions import override

from ntk_lazy.operator.cholesky import cholesky_of
from ntk_lazy.operator.representation import KernelRepresentation
from ntk_lazy.operator.roots import lanczos_inverse_root, lanczos_root, samples_by_root


class KernelCovariance(KernelRepresentation):
    """A kernel whose roots and samples are in its own units."""

    @override
    def _mul_matrix(self, other: LinearOperator) -> LinearOperator:
        if prod(self.shape) * self.dtype.itemsize > self._settings.max_dense_bytes:
            return super()._mul_matrix(other)
        # linear_operator multiplies roots, and a singular K has one after something was added to its diagonal.
        return to_linear_operator(self.to_dense() * other.to_dense())

    @override
    @cached(name="cholesky")  # type: ignore[untyped-decorator]
    def _cholesky(self, upper: bool = False) -> LinearOperator:
        return cholesky_of(self, upper=upper)

    @override
    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draw from N(0, K), shape ``(num_samples, *batch, n)``: as ``J w`` with random w where K is not factorised.

        Cost: half a product with ``num_samples`` columns.
        """
        scale = self._gramian.scale
        is_trained = torch.is_grad_enabled() and any(t.requires_grad for t in self.representation() if t is not scale)
        if not self.is_gram_matrix or is_trained or samples_by_root(self):
            samples: Tensor = super().zero_mean_mvn_samples(num_samples)
            return samples
        drawn = self._gramian.random_columns(num_samples).mT
        return drawn if scale is None else drawn * scale.sqrt()

    @override
    def _root_decomposition(self) -> Tensor:
        return lanczos_root(self)

    @override
    def _root_inv_decomposition(
        self, initial_vectors: Tensor | None = None, test_vectors: Tensor | None = None
    ) -> Tensor:
        return lanczos_inverse_root(self, initial_vectors)

    def with_common_columns(self, x: Tensor) -> Self:
        """The same kernel, known to have these points for columns in all of its batch; itself where it has not.

        Args:
            x: Points without batch dimensions, which ask for no gradient.
        """
        side = self._gramian.columns
        if side.selected is not None or x.requires_grad or x.shape != side.x.shape[side.axis :]:
            return self
        common = x.expand_as(side.x)
        return self._rebuild(self._gramian.side1, side.with_x(common)) if torch.equal(side.x, common) else self
