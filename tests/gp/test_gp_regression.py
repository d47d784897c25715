"""Gaussian processes with the kernel equal Bayesian linear regression on the rows of J, in float64."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from oracle import defect, dense_jacobian
from torch import Tensor, nn

from ntk_lazy.gp import NTKKernel
from ntk_lazy.operator.gramian import Gramian
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator

# GPyTorch reads numbers in float32, so that others would be rounded.
SCALE, NOISE = 0.25, 0.0625


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel, num_tasks: int = 1) -> None:
        self.num_tasks = num_tasks
        is_multitask = num_tasks > 1
        likelihood = MultitaskGaussianLikelihood(num_tasks, has_task_noise=False) if is_multitask else None
        super().__init__(x, y, likelihood or GaussianLikelihood())
        self.covar_module = ScaleKernel(kernel)
        self.double()
        self.covar_module.outputscale = SCALE
        self.likelihood.noise = NOISE

    def forward(self, x: Tensor) -> MultivariateNormal:
        zeros = torch.zeros(*x.shape[:-1], self.num_tasks, dtype=torch.float64)
        if self.num_tasks > 1:
            return MultitaskMultivariateNormal(zeros, self.covar_module(x))
        return MultivariateNormal(zeros[..., 0], self.covar_module(x))


def _network(num_outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, num_outputs)).double()


def _inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _linear_regression(J: Tensor, y: Tensor, tests: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``J* w`` given ``y = J w + e``, from the posterior of the weights w ~ N(0, SCALE)."""
    precision = J.mT @ J / NOISE + torch.eye(J.shape[1], dtype=J.dtype) / SCALE
    mean = tests @ torch.linalg.solve(precision, J.mT @ y / NOISE)
    return mean, tests @ torch.linalg.solve(precision, tests.mT)


def test_a_posterior_is_that_of_linear_regression_on_the_jacobian():
    network, x, z, y = _network(), _inputs(60, 3), _inputs(20, 3, seed=2), _inputs(60, seed=3)
    gp = _Regression(x, y, NTKKernel(network)).eval()
    with torch.no_grad():
        posterior = gp(z)
    mean, covariance = _linear_regression(dense_jacobian(network, x), y, dense_jacobian(network, z))
    assert defect(posterior.mean, mean) < 1e-8
    assert defect(posterior.variance, covariance.diagonal()) < 1e-8
    assert defect(posterior.covariance_matrix, covariance) < 1e-8
    with torch.no_grad():
        noisy = gp.likelihood(posterior)
    assert defect(noisy.variance, covariance.diagonal() + NOISE) < 1e-8


def test_a_posterior_of_several_outputs_couples_them():
    network, x, z, y = _network(3), _inputs(20, 3), _inputs(7, 3, seed=2), _inputs(20, 3, seed=3)
    gp = _Regression(x, y, NTKKernel(network), num_tasks=3).eval()
    with torch.no_grad():
        posterior = gp(z)
    mean, covariance = _linear_regression(dense_jacobian(network, x), y.flatten(), dense_jacobian(network, z))
    assert posterior.mean.shape == (7, 3)
    assert defect(posterior.mean, mean.reshape(7, 3)) < 1e-8
    assert defect(posterior.variance, covariance.diagonal().reshape(7, 3)) < 1e-8


def test_a_posterior_of_a_batch_is_that_of_its_members():
    network, x, z, y = _network(), _inputs(2, 15, 3), _inputs(2, 4, 3, seed=2), _inputs(2, 15, seed=3)
    gp = _Regression(x, y, NTKKernel(network)).eval()
    with torch.no_grad():
        posterior = gp(z)
    for i in range(2):
        mean, covariance = _linear_regression(dense_jacobian(network, x[i]), y[i], dense_jacobian(network, z[i]))
        assert defect(posterior.mean[i], mean) < 1e-8
        assert defect(posterior.variance[i], covariance.diagonal()) < 1e-8


def test_flattened_images_and_their_numbers_give_the_posterior_of_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    images, y = _inputs(25, 1, 4, 4), _inputs(18, seed=3)
    J = dense_jacobian(network, images)
    mean, covariance = _linear_regression(J[:18], y, J[18:])
    numbers = torch.arange(25)[:, None]
    for kernel, inputs in (
        (NTKKernel(network, input_shape=(1, 4, 4)), images.flatten(1)),
        (NTKKernel(network, dataset=images), numbers),
    ):
        gp = _Regression(inputs[:18], y, kernel).eval()
        with torch.no_grad():
            posterior = gp(inputs[18:])
        assert defect(posterior.mean, mean) < 1e-8
        assert defect(posterior.variance, covariance.diagonal()) < 1e-8


def test_the_covariances_of_a_prediction_are_slices_that_stay_lazy(monkeypatch):
    seen = []
    original = gpytorch.models.exact_prediction_strategies.DefaultPredictionStrategy.exact_prediction

    def watch(self, test_mean, test_test_covar, test_train_covar):
        seen.extend([test_test_covar, test_train_covar])
        return original(self, test_mean, test_test_covar, test_train_covar)

    monkeypatch.setattr(
        gpytorch.models.exact_prediction_strategies.DefaultPredictionStrategy, "exact_prediction", watch
    )
    gp = _Regression(_inputs(12, 3), _inputs(12, seed=3), NTKKernel(_network())).eval()
    with torch.no_grad():
        gp(_inputs(5, 3, seed=2))
    assert [type(K) for K in seen] == [NTKLinearOperator, NTKLinearOperator]
    assert [tuple(K.shape) for K in seen] == [(5, 5), (5, 12)]
    assert seen[0].is_symmetric


def _negative_likelihood(network: nn.Module, scale: Tensor, noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss that GPyTorch minimises, through a dense K whose graph reaches the network."""
    rows = []
    for point in x:
        grads = torch.autograd.grad(network(point[None])[0, 0], list(network.parameters()), create_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    covariance = scale * (J @ J.mT) + noise * torch.eye(len(y), dtype=torch.float64)
    return -torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) / len(y)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_step_up_the_marginal_likelihood_moves_what_is_listed(trainable):
    network, x, y = _network(), _inputs(12, 3), _inputs(12, seed=3)
    before = copy.deepcopy(network)
    gp = _Regression(x, y, NTKKernel(network, trainable=trainable)).train()
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    listed = dict(gp.named_parameters())
    assert len(listed) == (2 + 4 if trainable else 2)
    optimiser = torch.optim.Adam(gp.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = -likelihood(gp(x), y)
        loss.backward()
        expected = _negative_likelihood(network, gp.covar_module.outputscale, gp.likelihood.noise[0], x, y)
        assert abs(loss.item() - expected.item()) < 1e-8 * abs(expected.item())
        wanted = torch.autograd.grad(expected, list(listed.values()), allow_unused=True)
        for parameter, gradient in zip(listed.values(), wanted, strict=True):
            assert gradient is None or defect(parameter.grad, gradient.reshape(parameter.shape)) < 1e-8
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    is_moved = not torch.equal(network[0].weight, before[0].weight)
    assert is_moved == trainable
    gp.eval()
    with torch.no_grad():
        assert gp(x[:3] + 0.1).mean.shape == (3,)


def test_a_process_is_restored_from_its_state():
    x, z, y = _inputs(12, 3), _inputs(4, 3, seed=2), _inputs(12, seed=3)
    gp = _Regression(x, y, NTKKernel(_network())).eval()
    torch.manual_seed(5)
    other = _Regression(x, y, NTKKernel(nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 1)).double())).eval()
    other.load_state_dict(gp.state_dict())
    twin = copy.deepcopy(gp)
    with torch.no_grad():
        expected = gp(z).mean
        assert torch.equal(other(z).mean, expected)
        assert torch.equal(twin(z).mean, expected)


def test_training_a_scale_differentiates_no_network(monkeypatch):
    def refuse(self, *args, **options):
        raise AssertionError("the network was differentiated twice")

    monkeypatch.setattr(Gramian, "bilinear", refuse)
    gp = _Regression(_inputs(12, 3), _inputs(12, seed=3), NTKKernel(_network())).train()
    gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(*gp.train_inputs), gp.train_targets).backward()
    assert gp.covar_module.raw_outputscale.grad.abs() > 0
