"""Models of GPyTorch beyond regression with one output: tasks, classification heads, inducing points, fantasies."""

from __future__ import annotations

from contextlib import nullcontext

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from oracle import defect
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from ntk_lazy.gp import NTKKernel, big_data


def network(num_outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, num_outputs)).double()


def convolution(num_outputs: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, num_outputs)]
    return nn.Sequential(*layers).double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


class Model(gpytorch.models.ExactGP):
    """Zero mean; as many tasks as the network has outputs."""

    def __init__(self, x: Tensor, y: Tensor, kernel: NTKKernel, num_tasks: int = 1) -> None:
        self.num_tasks = num_tasks
        is_multitask = num_tasks > 1
        super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks) if is_multitask else GaussianLikelihood())
        self.covar_module = ScaleKernel(kernel)
        self.double()
        self.covar_module.outputscale = 0.25

    def forward(self, x: Tensor) -> MultivariateNormal:
        zeros = torch.zeros(*x.shape[:-1], self.num_tasks, dtype=torch.float64)
        if self.num_tasks > 1:
            return MultitaskMultivariateNormal(zeros, self.covar_module(x))
        return MultivariateNormal(zeros[..., 0], self.covar_module(x))


def test_images_with_ten_outputs_are_ten_tasks_by_products_as_by_cholesky():
    images, tests = draw(30, 1, 6, 6), draw(5, 1, 6, 6, seed=2)
    classes = torch.randint(10, (30,), generator=Generator().manual_seed(3))
    y = nn.functional.one_hot(classes, 10).double() - 0.1
    kernel = NTKKernel(convolution(10), input_shape=(1, 6, 6))
    posteriors = []
    for context in (gpytorch.settings.max_cholesky_size(10**6), big_data(prediction_rtol=1e-8, variance_rank=300)):
        gp = Model(images.flatten(1), y, kernel, num_tasks=10).eval()
        with torch.no_grad(), context:
            found = gp(tests.flatten(1))
            posteriors.append((found.mean, found.variance))
    (mean, variance), (by_products, its_variance) = posteriors
    assert mean.shape == (5, 10)
    assert defect(by_products, mean) < 1e-5
    assert defect(its_variance, variance) < 1e-4


def test_the_marginal_likelihood_of_tasks_trains_by_products():
    x, y = draw(40, 3), draw(40, 2, seed=2)
    gp = Model(x, y, NTKKernel(network(2)), num_tasks=2)
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    gradients = []
    for context in (gpytorch.settings.max_cholesky_size(10**6), big_data(rtol=1e-6, probes=300, rank=40)):
        gp.zero_grad()
        torch.manual_seed(0)
        with context:
            loss = -marginal(gp(x), y)
            loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in gp.parameters()]))
    assert defect(gradients[1], gradients[0]) < 1e-2


@pytest.mark.parametrize("is_big", [False, True])
def test_a_fantasy_is_the_posterior_with_one_more_point(is_big: bool):
    x, y, z = draw(50, 3), draw(50, seed=2), draw(6, 3, seed=4)
    new_x, new_y = draw(1, 3, seed=5), draw(1, seed=6)
    gp = Model(x, y, NTKKernel(network())).eval()
    by_products = big_data(prediction_rtol=1e-9, variance_rank=60) if is_big else nullcontext()
    with torch.no_grad(), by_products:
        _ = gp(z).mean
        fantasy = gp.get_fantasy_model(new_x, new_y)(z)
        again = Model(torch.cat([x, new_x]), torch.cat([y, new_y]), NTKKernel(network())).eval()(z)
        assert defect(fantasy.mean, again.mean) < 1e-6
        assert defect(fantasy.variance, again.variance) < 1e-6


def test_inducing_points_are_trained_through_the_kernel():
    class Variational(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(12)
            super().__init__(gpytorch.variational.VariationalStrategy(self, draw(12, 3, seed=7), distribution))
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), ScaleKernel(NTKKernel(network()))

        def forward(self, x: Tensor) -> MultivariateNormal:
            return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    x = draw(80, 3)
    y = x[:, 0].sin()
    gp, likelihood = Variational().double(), GaussianLikelihood().double()
    bound = gpytorch.mlls.VariationalELBO(likelihood, gp, num_data=80)
    optimiser = torch.optim.Adam([*gp.parameters(), *likelihood.parameters()], lr=0.05)
    losses = []
    for step in range(16):
        batch = slice(40 * (step % 2), 40 * (step % 2) + 40)  # minibatches, which inducing points are for
        optimiser.zero_grad()
        loss = -bound(gp(x[batch]), y[batch])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    inducing = gp.variational_strategy.inducing_points
    assert inducing.grad.abs().max() > 0
    assert sum(losses[-2:]) < sum(losses[:2])


@pytest.mark.slow
def test_ten_classes_of_digits_are_told_apart_by_the_kernel_of_a_trained_network():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=Generator().manual_seed(0))
    images = torch.tensor(data.images)[order].unsqueeze(1) / 16
    labels = torch.tensor(data.target)[order]
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 10)]
    net = nn.Sequential(*layers).double()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(images[1000:]), labels[1000:])
        loss.backward()
        optimiser.step()
    train, tests, held_out = slice(0, 80), slice(80, 180), labels[80:180]
    y = nn.functional.one_hot(labels[train], 10).double() - 0.1
    found = []
    for kernel, inputs in (
        (NTKKernel(net, input_shape=(1, 8, 8)), images[:180].flatten(1)),
        (NTKKernel(net, dataset=images), torch.arange(180)[:, None]),
    ):
        gp = Model(inputs[train], y, kernel, num_tasks=10).train()
        optimiser = torch.optim.Adam(gp.parameters(), lr=0.1)
        marginal, losses = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp), []
        for _ in range(3):
            optimiser.zero_grad()
            loss = -marginal(gp(inputs[train]), y)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            posterior = gp.eval()(inputs[tests])
        found.append((posterior.mean, posterior.variance))
    assert (found[0][0].argmax(1) == held_out).double().mean() > 0.8
    assert (found[0][1] > 0).all()
    assert defect(found[1][0], found[0][0]) < 1e-8
    assert defect(found[1][1], found[0][1]) < 1e-8
