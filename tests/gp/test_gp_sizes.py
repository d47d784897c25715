"""The answers at N = 500 by products equal those by Cholesky, and those of linear regression on the rows of J."""

from __future__ import annotations

from functools import cache

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

from ntk_lazy.gp import NTKKernel, big_data

N, SCALE, NOISE = 500, 0.25, 0.0625
pytestmark = pytest.mark.slow


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


X, Y, Z = draw(N, 3), draw(N, seed=3), draw(40, 3, seed=2)


class Regression(gpytorch.models.ExactGP):
    def __init__(self, *, trainable: bool = False) -> None:
        super().__init__(X, Y, GaussianLikelihood())
        self.covar_module = ScaleKernel(NTKKernel(network(), trainable=trainable))
        self.double()
        self.covar_module.outputscale = SCALE
        self.likelihood.noise = NOISE

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1)).double()


@cache
def regression() -> tuple[Tensor, Tensor]:
    """Mean and variance at the tests, from the posterior of the weights."""
    J, H = dense_jacobian(network(), X), dense_jacobian(network(), Z)
    precision = J.mT @ J / NOISE + torch.eye(J.shape[1], dtype=J.dtype) / SCALE
    mean = H @ torch.linalg.solve(precision, J.mT @ Y / NOISE)
    return mean, (H * torch.linalg.solve(precision, H.mT).mT).sum(1)


def test_cholesky_is_linear_regression_on_the_jacobian():
    mean, variance = regression()
    with torch.no_grad():
        posterior = Regression().eval()(Z)
        assert defect(posterior.mean, mean) < 1e-8
        assert defect(posterior.variance, variance) < 1e-8


@pytest.mark.parametrize("variance_rank", [0, 200])
def test_predictions_by_products_are_those_of_cholesky(variance_rank):
    mean, variance = regression()
    gp = Regression().eval()
    with torch.no_grad(), big_data(prediction_rtol=1e-8, rank=1, variance_rank=variance_rank):
        posterior = gp(Z)
        assert defect(posterior.mean, mean) < 1e-5
        assert defect(posterior.variance, variance) < 1e-4


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_by_products_are_those_of_cholesky(trainable):
    gradients = []
    for context in (gpytorch.settings.max_cholesky_size(10**6), big_data(rtol=1e-6, probes=200, rank=100)):
        gp = Regression(trainable=trainable).train()
        torch.manual_seed(0)
        with context:
            (-gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(X), Y)).backward()
        gradients.append({name: p.grad for name, p in gp.named_parameters() if p.grad is not None})
    exact, found = gradients
    assert exact.keys() == found.keys()
    assert len(exact) == (2 + 3 if trainable else 2)  # the last bias moves nothing in J
    hyperparameters = [name for name in exact if "raw_" in name]
    for name in hyperparameters:
        assert defect(found[name], exact[name]) < 1e-2
    if trainable:
        weights = [name for name in exact if name not in hyperparameters]
        of_network = [torch.cat([g[name].reshape(-1) for name in weights]) for g in gradients]
        assert defect(of_network[1], of_network[0]) < 1e-2
