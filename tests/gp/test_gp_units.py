"""Whatever the units of targets, kernel and noise: predictions, likelihoods, samples, roots and solves follow them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

from ntk_lazy.gp import NTKKernel, big_data

N, TESTS = 60, 8
SCALE, NOISE = 0.5, 0.0625
UNITS = [1e-12, 1e-6, 1e6, 1e12]  # of variances: targets have their square root
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "defaults": contextlib.nullcontext,
    "big_data": partial(big_data, prediction_rtol=1e-8, rtol=1e-8),
    "big_data, variance_rank=0": partial(big_data, prediction_rtol=1e-8, rtol=1e-8, variance_rank=0),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


X, Z, Y = draw(N, 3, seed=1), draw(TESTS, 3, seed=2), draw(N, seed=3)
NEW_X, NEW_Y = draw(3, 3, seed=4), draw(3, seed=5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()


class Regression(gpytorch.models.ExactGP):
    def __init__(self, unit: float, engine: str, dtype: torch.dtype = torch.float64) -> None:
        y = (Y * unit**0.5).to(dtype)
        super().__init__(X.to(dtype), y, GaussianLikelihood(noise_constraint=Positive()))
        self.covar_module = ScaleKernel(NTKKernel(network(), engine=engine))
        self.double()
        self.covar_module.outputscale = torch.tensor(SCALE * unit, dtype=torch.float64)
        self.likelihood.noise = torch.tensor(NOISE * unit, dtype=torch.float64)
        self.to(dtype)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


@lru_cache
def dense(*, with_new: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and covariance at Z given X, and the new points if asked for, in units of 1."""
    points, targets = (torch.cat([X, NEW_X]), torch.cat([Y, NEW_Y])) if with_new else (X, Y)
    J, H = dense_jacobian(network(), points), dense_jacobian(network(), Z)
    train, across = SCALE * J @ J.mT + NOISE * torch.eye(len(J)).double(), SCALE * H @ J.mT
    solved = torch.linalg.solve(train, torch.cat([targets.unsqueeze(1), across.mT], 1))
    return across @ solved[:, 0], SCALE * H @ H.mT - across @ solved[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("engine", ["auto", "factors"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_predictions_are_those_of_cholesky_in_any_unit(context: str, engine: str, unit: float):
    gp = Regression(unit, engine).eval()
    mean, covariance = dense()
    more_mean, more_covariance = dense(with_new=True)
    noisy = covariance + NOISE * torch.eye(TESTS).double()
    at = draw(TESTS, seed=9)
    with CONTEXTS[context](), torch.no_grad():
        posterior = gp(Z)
        observed = gp.likelihood(posterior)
        assert defect(posterior.mean / unit**0.5, mean) < 1e-6
        # What is read as variance GPyTorch rounds up to 1e-10, unless it is told otherwise.
        assert defect(posterior.lazy_covariance_matrix.diagonal() / unit, covariance.diagonal()) < 1e-6
        assert context == "defaults" or defect(posterior.variance / unit, covariance.diagonal()) < 1e-6
        assert defect(posterior.covariance_matrix / unit, covariance) < 1e-6
        # Samples are linear in what they are made from: unit vectors give all of their covariance.
        for drawn, expected in ((posterior, covariance), (observed, noisy)):
            S = (drawn.rsample(base_samples=torch.eye(TESTS).double()) - drawn.mean) / unit**0.5
            assert defect(S.mT @ S, expected) < 1e-6
        truth = torch.distributions.MultivariateNormal(mean, noisy).log_prob(mean + at)
        found = observed.log_prob(posterior.mean + at * unit**0.5) + TESTS / 2 * math.log(unit)
        assert abs(found - truth) < 1e-6 * abs(truth)
        fantasy = gp.get_fantasy_model(NEW_X, NEW_Y * unit**0.5)(Z)
        assert defect(fantasy.mean / unit**0.5, more_mean) < 1e-6
        assert defect(fantasy.lazy_covariance_matrix.diagonal() / unit, more_covariance.diagonal()) < 1e-6


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rank", [20, N])
@pytest.mark.parametrize("context", ["defaults", "big_data"])
def test_roots_and_solves_follow_the_units(context: str, rank: int, unit: float):
    kernel = Regression(unit, "factors").covar_module
    J = dense_jacobian(network(), X)
    exact = SCALE * J @ J.mT + NOISE * torch.eye(N).double()

    def shifted() -> Any:
        return kernel(X).evaluate_kernel().add_diagonal(torch.tensor(NOISE * unit, dtype=torch.float64))

    with CONTEXTS[context](), gpytorch.settings.max_root_decomposition_size(rank), torch.no_grad():
        assert defect(shifted().solve(Y) * unit, torch.linalg.solve(exact, Y)) < 1e-6
        # With few columns, the diagonal is there in full, and of K what 20 columns can have.
        root = shifted().root_decomposition().root.to_dense() / unit**0.5
        assert root.shape == (N, N)
        assert defect(root @ root.mT, exact) < (1e-10 if rank == N or context == "defaults" else 1e-2)
        if rank == N or context == "defaults":
            inverse = shifted().root_inv_decomposition().root.to_dense() * unit**0.5
            assert defect(inverse @ inverse.mT, exact.inverse()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "factors"])
@pytest.mark.parametrize("context", ["defaults", "big_data"])
def test_likelihoods_and_their_gradients_follow_the_units(context: str, engine: str):
    found = []
    for unit in (1.0, *UNITS):
        gp = Regression(unit, engine)
        torch.manual_seed(0)  # of the probes
        with CONTEXTS[context]():
            value = ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(X), gp.train_targets)
        logarithms = [raw.detach() for raw in (gp.covar_module.raw_outputscale, gp.likelihood.raw_noise)]
        gradients = torch.autograd.grad(value, (gp.covar_module.raw_outputscale, gp.likelihood.raw_noise))
        # In the logarithms of scale and noise, which have no unit.
        sizes = (gp.covar_module.outputscale.detach(), gp.likelihood.noise.detach())
        relative = [
            float(gradient * size / torch.sigmoid(raw))
            for gradient, size, raw in zip(gradients, sizes, logarithms, strict=True)
        ]
        found.append([float(value.detach() + 0.5 * math.log(unit)), *relative])
    # That of the noise is a difference of terms ten times as large.
    assert all(abs(a - b) < 1e-6 * abs(b) for one in found for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("engine", ["auto", "factors"])
@pytest.mark.parametrize(("unit", "size"), [(1e-12, 1e-12), (1e-12, 1e-6), (1e12, 1e6), (1e12, 1e12), (1.0, 1e12)])
def test_single_precision_follows_the_units_as_well(engine: str, unit: float, size: float):
    gp = Regression(unit, engine, torch.float32)
    gp.set_train_data(targets=(Y * size).float(), strict=False)
    gp.covar_module.base_kernel.model.float()
    mean, covariance = dense()
    # The condition number of K + noise is 1e4, so that rounding leaves residuals of 2e-5.
    with big_data(prediction_rtol=1e-4), torch.no_grad():
        posterior = gp.eval()(Z.float())
        assert defect(posterior.mean.double() / size, mean) < 1e-2
        assert defect(posterior.variance.double() / unit, covariance.diagonal()) < 1e-1
