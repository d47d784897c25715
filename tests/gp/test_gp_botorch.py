"""The kernel in BoTorch: fitted, and followed to the next point by gradients in the inputs."""

from __future__ import annotations

# ruff: noqa: E402
import importlib

import pytest

botorch = pytest.importorskip("botorch", reason="BoTorch is not installed")

import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.kernels import ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

from ntk_lazy.gp import NTKKernel, big_data

BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def settings_of_botorch(usual_settings: None) -> None:
    """Those that it sets when it is imported."""
    importlib.reload(botorch)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 1)).double()


def _inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


X = _inputs(12, 2)
Y = (3 * X[:, :1]).sin() * X[:, 1:] + 2.0


def _model(network: nn.Module, **options) -> SingleTaskGP:
    torch.manual_seed(0)
    return SingleTaskGP(X, Y, covar_module=ScaleKernel(NTKKernel(network)), **options)


def _dense_posterior(network: nn.Module, gp: SingleTaskGP, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance in the units of Y, from rows of J; Y standardised as BoTorch does it unless told not to."""
    J, H = dense_jacobian(network, X), dense_jacobian(network, z)
    scale, noise, constant = (
        t.detach().reshape(()) for t in (gp.covar_module.outputscale, gp.likelihood.noise, gp.mean_module.constant)
    )
    targets = ((Y - Y.mean()) / Y.std() - constant).squeeze(1)
    across = scale * H @ J.mT
    train = scale * J @ J.mT + noise * torch.eye(len(X)).double()
    solve = torch.linalg.solve(train, torch.cat([targets[:, None], across.mT], 1))
    mean = (constant + across @ solve[:, 0]) * Y.std() + Y.mean()
    return mean, (scale * H @ H.mT - across @ solve[:, 1:]) * Y.std() ** 2


@pytest.mark.slow
def test_a_fitted_model_has_the_dense_posterior():
    network = _network()
    gp = _model(network)
    marginal = ExactMarginalLogLikelihood(gp.likelihood, gp)
    before = marginal(gp(*gp.train_inputs), gp.train_targets).item()
    fit_gpytorch_mll(marginal)
    after = marginal(gp.train()(*gp.train_inputs), gp.train_targets).item()
    assert after > before
    z = _inputs(3, 4, 2, seed=2)
    posterior = gp.posterior(z)
    assert posterior.mean.shape == (3, 4, 1)
    for i in range(3):
        mean, covariance = _dense_posterior(network, gp, z[i])
        # A fitted noise of 1e-4 and a scale of 1e3 lose seven digits.
        assert defect(posterior.mean[i, :, 0].detach(), mean) < 1e-6
        error = posterior.distribution.covariance_matrix[i].detach() - covariance
        assert error.abs().max() < 1e-8 * gp.covar_module.outputscale.detach() * Y.var()


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 3])
def test_gradients_in_the_candidates_are_differences_of_the_dense_posterior(q):
    network = _network()
    gp = _model(network).eval()
    z = _inputs(2, q, 2, seed=3).requires_grad_()
    posterior = gp.posterior(z)
    value = posterior.mean.sum() + posterior.distribution.covariance_matrix.sum()
    (gradient,) = torch.autograd.grad(value, z)

    def dense(points: Tensor) -> Tensor:
        return torch.stack([part.sum() for member in points for part in _dense_posterior(network, gp, member)]).sum()

    step = 1e-5
    for index in ((0, 0, 0), (1, q - 1, 1)):
        shift = torch.zeros_like(z)
        shift[index] = step
        difference = (dense(z.detach() + shift) - dense(z.detach() - shift)) / (2 * step)
        assert abs(gradient[index] - difference) < 1e-6 * gradient.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 2])
def test_an_acquisition_step_improves_on_the_random_candidates(q):
    gp = _model(_network(), input_transform=Normalize(2))
    if q == 1:
        acquisition = LogExpectedImprovement(gp, best_f=Y.max())
    else:
        acquisition = qLogExpectedImprovement(gp, Y.max(), SobolQMCNormalSampler(torch.Size([16]), seed=0))
    with torch.no_grad():
        random = acquisition(_inputs(8, q, 2, seed=4))
    candidates, value = optimize_acqf(
        acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=8, options={"maxiter": 15, "seed": 0}
    )
    assert candidates.shape == (q, 2)
    assert ((candidates >= BOUNDS[0]) & (candidates <= BOUNDS[1])).all()
    assert value > random.max()


@pytest.mark.slow
def test_a_network_is_trained_by_the_fit_that_is_asked_for():
    network = _network()
    gp = SingleTaskGP(X, Y, covar_module=ScaleKernel(NTKKernel(network, trainable=True)))
    before = network[0].weight.detach().clone()
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(gp.likelihood, gp), optimizer_kwargs={"options": {"maxiter": 3}}, max_attempts=1
    )
    assert not torch.equal(network[0].weight, before)


def test_conditioning_on_an_observation_is_a_refit_with_it():
    gp = _model(_network(), outcome_transform=None).eval()
    new_x, new_y, z = _inputs(1, 2, seed=5), torch.tensor([[0.3]]).double(), _inputs(5, 2, seed=6)
    gp.posterior(z)
    conditioned = gp.condition_on_observations(new_x, new_y).posterior(z)
    again = SingleTaskGP(
        torch.cat([X, new_x]), torch.cat([Y, new_y]), covar_module=gp.covar_module, outcome_transform=None
    )
    again.likelihood, again.mean_module = gp.likelihood, gp.mean_module
    expected = again.eval().posterior(z)
    assert defect(conditioned.mean.detach().squeeze(), expected.mean.detach().squeeze()) < 1e-6
    assert defect(conditioned.variance.detach().squeeze(), expected.variance.detach().squeeze()) < 1e-6


def test_big_data_goes_by_products_although_botorch_turned_them_off():
    network = _network()
    x = _inputs(60, 2, seed=4)
    kernel = ScaleKernel(NTKKernel(network, max_dense_bytes=8 * 59**2))
    K = kernel(x).evaluate_kernel()
    with big_data():
        total = K.add_diagonal(torch.tensor(0.1, dtype=torch.float64))
        # To write K down would be an error.
        X = total.solve(x)
        _, log_determinant = total.inv_quad_logdet(x, logdet=True)
        total.root_decomposition()
    J, scale = dense_jacobian(network, x), kernel.outputscale.detach()
    dense = scale * J @ J.mT + 0.1 * torch.eye(60).double()
    assert defect(dense @ X.detach(), x) < 1e-2  # the tolerance of training
    # There are 49 parameters: solved in their space, and exact.
    assert abs(log_determinant.detach() - dense.logdet()) < 1e-8 * abs(dense.logdet())
