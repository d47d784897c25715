"""Noise that several outputs have in common is solved with as noise of one output is."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator import settings
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.gp import NTKKernel, big_data
from ntk_lazy.operator.added_blocks import AddedBlocks

N, C = 50, 3


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, C)).double()


class Regression(gpytorch.models.ExactGP):
    def __init__(self, rank: int) -> None:
        torch.manual_seed(1)
        super().__init__(draw(N, 3), draw(N, C, seed=3), MultitaskGaussianLikelihood(C, rank=rank))
        self.covar_module = ScaleKernel(NTKKernel(network(), engine="factors"))
        self.double()
        self.likelihood.noise = 0.25

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(torch.zeros(*x.shape[:-1], C, dtype=x.dtype), self.covar_module(x))

    def noise(self) -> Tensor:
        factor = self.likelihood.task_noise_covar_factor.detach()
        return factor @ factor.mT + self.likelihood.noise.detach() * torch.eye(C).double()


@pytest.mark.parametrize("rank", [1, 3])
def test_predictions_with_common_noise_are_those_of_the_dense_matrix(rank: int):
    gp, z = Regression(rank).eval(), draw(7, 3, seed=2)
    J, H, scale = (
        dense_jacobian(network(), draw(N, 3)),
        dense_jacobian(network(), z),
        gp.covar_module.outputscale.detach(),
    )
    train, across = scale * J @ J.mT + torch.kron(torch.eye(N).double(), gp.noise()), scale * H @ J.mT
    solved = torch.linalg.solve(train, torch.cat([gp.train_targets.reshape(-1, 1), across.mT], 1))
    variance = (scale * H @ H.mT - across @ solved[:, 1:]).diagonal()
    with big_data(prediction_rtol=1e-9, variance_rank=N * C), torch.no_grad():
        posterior = gp(z)
        assert isinstance(gp.prediction_strategy.lik_train_train_covar, AddedBlocks)
        assert defect(posterior.mean.reshape(-1), across @ solved[:, 0]) < 1e-7
        assert defect(posterior.variance.reshape(-1), variance) < 1e-7


def test_common_noise_gets_the_preconditioner(products: list[int]):
    gp = Regression(1)
    K = gp.covar_module(draw(N, 3)).evaluate_kernel().detach()
    A = gp.likelihood(MultitaskMultivariateNormal(torch.zeros(N, C).double(), K)).lazy_covariance_matrix.detach()
    counts = []
    for rank in (0, 100):
        products.clear()
        with big_data(rank=rank, rtol=1e-8), torch.no_grad():
            A.solve(draw(N * C, 1, seed=5))
        counts.append(sum(products))
    assert counts[1] < counts[0] / 2


def test_likelihoods_with_common_noise_have_the_gradients_of_cholesky():
    found = []
    for size in (10**6, 0):
        gp = Regression(1)
        torch.manual_seed(2)
        with (
            settings.max_cholesky_size(size),
            settings.cg_tolerance(1e-8),
            settings.num_trace_samples(400),
            settings.max_lanczos_quadrature_iterations(60),
            settings.max_preconditioner_size(40),
            settings.min_preconditioning_size(1),
        ):
            value = ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(*gp.train_inputs), gp.train_targets)
            gradients = torch.autograd.grad(value, list(gp.parameters()))
        found.append([value.detach(), *gradients])
    # The spread of 400 random vectors, measured: 0.4 % of the gradient as a whole, and with 6,400 a quarter of that.
    assert abs(found[1][0] - found[0][0]) < 0.01 * abs(found[0][0])
    estimate, exact = (torch.cat([g.reshape(-1) for g in each[1:]]) for each in found[::-1])
    assert defect(estimate, exact) < 0.02


def test_samples_with_common_noise_have_the_covariance_of_both():
    S = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    model = nn.Linear(3, 2).double()
    K = nl.ntk(model, draw(20, 3)).detach() * 0.1
    noise = gpytorch.likelihoods.MultitaskGaussianLikelihood(2, rank=2, has_global_noise=False).double()
    noise.task_noise_covar_factor.data = torch.linalg.cholesky(S)
    A = noise(MultitaskMultivariateNormal(torch.zeros(20, 2).double(), K)).lazy_covariance_matrix.detach()
    J = dense_jacobian(model, draw(20, 3))
    exact = 0.1 * J @ J.mT + torch.kron(torch.eye(20).double(), S)
    torch.manual_seed(0)
    with big_data(variance_rank=3):
        found = A.zero_mean_mvn_samples(4000)
    # Entries are off by 2 % of the variances in the mean; the worst of 1,600 by less than five times that.
    assert ((found.mT @ found / 4000 - exact).abs() / exact.diagonal().max()).max() < 0.1
