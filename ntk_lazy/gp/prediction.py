"""Predictions from parameters: what the training points know is one change of the parameters."""

from __future__ import annotations

from typing import Any, final

import torch
from gpytorch import settings
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator.operators import AddedDiagLinearOperator, LinearOperator, RootLinearOperator
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.gp.predictive_covariance import PredictiveCovariance
from ntk_lazy.gp.targets import several_outputs
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.operator.added_blocks import AddedBlocks
from ntk_lazy.operator.added_diagonal import AddedDiagonal
from ntk_lazy.operator.weight_space import WeightSpace

_ROOT_SHARE = 0.25  # of the budget: a root in weights, which is kept, or made once more while it is gathered
_PIECES = 8


@final
class NTKPredictionStrategy(DefaultPredictionStrategy):  # type: ignore[misc]  # gpytorch has no types
    """Exact prediction with a tangent kernel, scaled or not; with sums of kernels as GPyTorch does it.

    A mean is ``K(test, train) α``, and ``K(test, train) = J* Jᵀ``: ``w = Jᵀ α`` is one vector of parameters, made once,
    and each mean is a product of J* with it, which goes through no training point. The same for the root that
    ``fast_pred_var`` multiplies with, if its columns as parameter vectors fit a quarter of the memory budget.

    Where the training points are solved with in the space of weights, covariances are made there too, exactly and
    with or without ``fast_pred_var``, from a root of as many columns as J has.

    Means and variances through which a gradient is wanted are GPyTorch's own.
    """

    def __init__(
        self, train_inputs: Any, train_prior_dist: Any, train_labels: Tensor, likelihood: Any, **roots: Any
    ) -> None:
        # Evaluated now, so that noise is added to the operator itself and solves are those of its class.
        covariance = train_prior_dist.lazy_covariance_matrix.evaluate_kernel()
        num_targets = train_prior_dist.event_shape.numel()
        if covariance.shape[-1] != num_targets:
            raise several_outputs(num_targets, covariance.shape[-1])
        evaluated = train_prior_dist.__class__(train_prior_dist.mean, covariance)
        super().__init__(train_inputs, evaluated, train_labels, likelihood, **roots)
        self._weights: tuple[Tensor, Tensor] | None = None
        self._root_weights: tuple[Tensor, Tensor] | None = None

    @override
    def exact_prediction(self, test_mean: Tensor, test_test_covar: Any, test_train_covar: Any) -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = super().exact_prediction(
            test_mean, test_test_covar, self._with_own_points(test_train_covar)
        )
        return found

    def _with_own_points(self, covariance: Any) -> Any:
        """The same with the training points themselves: GPyTorch repeats them for each batch, beside the test points.

        So it is known that all kernels of a batch have them in common, and that nobody wants a gradient in them.
        """
        kernel, train = covariance.evaluate_kernel(), self._train_kernel()
        if not isinstance(kernel, NTKLinearOperator) or not kernel.batch_shape or train is None:
            return covariance
        points = train.gramian.side1
        return covariance if points.selected is not None else kernel.with_common_columns(points.x)

    @override
    def exact_predictive_mean(self, test_mean: Tensor, test_train_covar: Any) -> Tensor:
        tests = _evaluated(test_train_covar)
        train = self._train_kernel()
        is_plain = settings.observation_nan_policy.value() == "ignore"
        if tests is None or train is None or not is_plain or _wants_gradient(tests, train):
            mean: Tensor = super().exact_predictive_mean(test_mean, test_train_covar)
            return mean
        alpha = self.mean_cache
        if self._weights is None or self._weights[0] is not alpha:
            self._weights = alpha, train.jacobian_rmatmul(alpha.detach().unsqueeze(-1))
        return test_mean + tests.jacobian_matmul(self._weights[1]).squeeze(-1)

    @override
    def exact_predictive_covar(self, test_test_covar: Any, test_train_covar: Any) -> Any:
        tests, weights = _evaluated(test_train_covar), None
        if tests is not None and not settings.skip_posterior_variances.on():
            weights = self._weight_space(tests)
        if tests is not None and weights is not None:
            return PredictiveCovariance.of(RootLinearOperator(weights.posterior_root(tests.gramian)))
        own = _evaluated(test_test_covar)
        tests_alone = test_test_covar if own is None else own
        return PredictiveCovariance.of(super().exact_predictive_covar(tests_alone, test_train_covar))

    def _weight_space(self, tests: NTKLinearOperator) -> WeightSpace | None:
        """The training points in the space of weights, if solves go by that and the root of the tests fits."""
        covariance, train = self.lik_train_train_covar, self._train_kernel()
        is_plain = settings.observation_nan_policy.value() == "ignore"
        if train is None or not isinstance(covariance, AddedDiagonal) or not is_plain or _wants_gradient(tests, train):
            return None
        by_cholesky = settings.fast_computations.solves.off() or train.shape[-1] <= settings.max_cholesky_size.value()
        num_bytes = tests.shape[-2] * train.num_features * train.dtype.itemsize
        if by_cholesky or num_bytes > _ROOT_SHARE * train.gramian.engine.budget:
            return None
        return covariance.weights(1 if settings.fast_pred_var.on() else tests.shape[-2])

    @override
    def _exact_predictive_covar_inv_quad_form_root(self, precomputed_cache: Tensor, test_train_covar: Any) -> Any:
        tests, train = _evaluated(test_train_covar), self._train_kernel()
        is_plain = isinstance(precomputed_cache, Tensor) and precomputed_cache.ndim == 2
        if tests is None or train is None or not is_plain or _wants_gradient(tests, train):
            return super()._exact_predictive_covar_inv_quad_form_root(precomputed_cache, test_train_covar)
        num_bytes = train.num_features * precomputed_cache.shape[1] * precomputed_cache.element_size()
        budget = _ROOT_SHARE * train.gramian.engine.budget
        if num_bytes > budget:
            return super()._exact_predictive_covar_inv_quad_form_root(precomputed_cache, test_train_covar)
        if self._root_weights is None or self._root_weights[0] is not precomputed_cache:
            cache = precomputed_cache.detach()
            weights = cache.new_empty(train.num_features, cache.shape[1])
            # Some columns at a time: while they are made, there are two of each.
            for columns in slices(cache.shape[1], max(1, cache.shape[1] * int(budget) // (_PIECES * num_bytes))):
                weights[:, columns] = train.jacobian_rmatmul(cache[:, columns])
            self._root_weights = precomputed_cache, weights
        return tests.jacobian_matmul(self._root_weights[1])

    def _train_kernel(self) -> NTKLinearOperator | None:
        covariance = self.lik_train_train_covar
        kernel = covariance._linear_op if isinstance(covariance, AddedDiagLinearOperator) else None
        kernel = covariance.kernel if isinstance(covariance, AddedBlocks) else kernel
        return kernel if isinstance(kernel, NTKLinearOperator) and not kernel.batch_shape else None


def _evaluated(covariance: Any) -> NTKLinearOperator | None:
    if not isinstance(covariance, LinearOperator):
        return None
    kernel = covariance.evaluate_kernel()
    return kernel if isinstance(kernel, NTKLinearOperator) and not kernel.batch_shape else None


def _wants_gradient(*kernels: NTKLinearOperator) -> bool:
    return torch.is_grad_enabled() and any(kernel.requires_grad for kernel in kernels)
