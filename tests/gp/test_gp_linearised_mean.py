"""With the linearised mean a Gaussian process is Bayesian regression on the weights, centred at zero."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.gp import LinearisedMean, NTKKernel

SCALE, NOISE = 0.25, 0.0625


def network(num_outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, num_outputs)).double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_a_posterior_is_that_of_the_weights_of_the_linearised_network():
    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, kernel: NTKKernel) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module, self.covar_module = LinearisedMean(kernel), ScaleKernel(kernel)
            self.double()
            self.covar_module.outputscale, self.likelihood.noise = SCALE, NOISE

        def forward(self, x: Tensor) -> MultivariateNormal:
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model, x, z, y = network(), draw(40, 3), draw(9, 3, seed=2), draw(40, seed=3)
    gp = Model(x, y, NTKKernel(model)).eval()
    assert "mean_module" not in {name.split(".")[0] for name in gp.state_dict()}
    with torch.no_grad():
        posterior = gp(z)
    J, Jz, w0 = dense_jacobian(model, x), dense_jacobian(model, z), weights(model)
    with torch.no_grad():
        offset, fz = y - model(x).squeeze(1) + J @ w0, model(z).squeeze(1)
    precision = J.mT @ J / NOISE + torch.eye(len(w0), dtype=torch.float64) / SCALE
    w = torch.linalg.solve(precision, J.mT @ offset / NOISE)
    assert defect(posterior.mean, fz + Jz @ (w - w0)) < 1e-8
    assert defect(posterior.covariance_matrix, Jz @ torch.linalg.solve(precision, Jz.mT)) < 1e-8


@pytest.mark.parametrize("outputs", ["full", "sum", 1])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_means_follow_the_outputs_of_the_kernel(outputs: str | int, batch: tuple[int, ...]):
    model, x = network(2), draw(*batch, 5, 3)
    kernel = NTKKernel(model, outputs=outputs)
    J = dense_jacobian(model, x.reshape(-1, 3))
    with torch.no_grad():
        full = model(x.reshape(-1, 3)) - (J @ weights(model)).reshape(-1, 2)
    expected = {"full": full, "sum": full.sum(1) / 2**0.5, 1: full[:, 1]}[outputs]
    found = LinearisedMean(kernel)(x)
    assert found.shape == (*batch, 5, 2) if outputs == "full" else (*batch, 5)
    assert defect(found.reshape(expected.shape), expected) < 1e-12


def test_a_mean_follows_the_network_of_its_kernel():
    model, x = network(), draw(5, 3)
    mean = LinearisedMean(NTKKernel(model))
    before = mean(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert defect(mean(x), before) > 1e-3
    again = LinearisedMean(copy.deepcopy(NTKKernel(model)))
    assert torch.equal(mean(x), again(x))


def test_kernels_without_one_function_are_refused():
    with pytest.raises(nl.ArgumentError, match="trainable=True"):
        LinearisedMean(NTKKernel(network(), trainable=True))
    with pytest.raises(nl.ArgumentError, match="no one function"):
        LinearisedMean(NTKKernel(network(2), outputs="trace"))
    with pytest.raises(nl.ArgumentError, match="takes the NTKKernel"):
        LinearisedMean(ScaleKernel(NTKKernel(network())))
