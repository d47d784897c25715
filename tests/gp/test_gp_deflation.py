"""Eigenpairs that are known make the best preconditioner of their rank, and nothing but them is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from linear_operator import settings
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn
from zoo import RIGHT

import ntk_lazy as nl
from ntk_lazy.gp import NTKKernel, big_data
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator
from ntk_lazy.operator.roots import root_of_kept_pairs

N, RANK = 200, 30


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)).double()


@contextmanager
def lazily(rank: int, rtol: float = 1e-6):
    with ExitStack() as stack:
        for setting in (
            settings.max_cholesky_size(0),
            settings.cg_tolerance(rtol),
            settings.max_cg_iterations(2000),
            settings.max_preconditioner_size(rank),
            settings.min_preconditioning_size(1),
            torch.no_grad(),
        ):
            stack.enter_context(setting)
        yield


@pytest.mark.parametrize("name", ["instance norms, train", "image patches", "heads by einsum"])
@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_it_saves_products_beside_a_randomised_one_of_the_same_rank(name: str, noise: float, products: list[int]):
    case, rank = next(case for case in RIGHT if case.name == name), 15
    torch.manual_seed(0)
    model = case.build().double().eval()
    # As many rows as parameters, nearly: with more, the other one gains from eigenvalues that are exactly zero.
    x = case.inputs(6).double()
    per_example = nl.ntk(model, x).shape[0] // 6
    x = case.inputs(min(150, sum(p.numel() for p in model.parameters()) // per_example - 1)).double()
    K = nl.ntk(model, x, engine="gram").detach()
    B, noise = random(K.shape[0], 1, seed=5), torch.tensor(noise * float(K.diagonal().mean()), dtype=torch.float64)
    with lazily(rank):
        products.clear()
        first = K.add_diagonal(noise).solve(B)
        randomised = sum(products) - rank
        pairs = nl.eigsh(K, rank, seed=0)
        K.precondition_with(pairs.values, pairs.vectors)
        products.clear()
        second = K.add_diagonal(noise).solve(B)
    assert set(products) == {1}
    assert sum(products) < randomised
    J = dense_jacobian(model, x)
    dense = J @ J.mT + noise * torch.eye(len(J), dtype=torch.float64)
    for X in (first, second):
        assert (B - dense @ X).norm() <= 1.1e-6 * B.norm()


def test_it_outlives_scale_and_noise_and_settings_and_not_the_parameters(products: list[int]):
    model, x, B = network(), random(N, 3), random(N, 1, seed=5)
    K = nl.ntk(model, x, engine="gram").detach() * torch.tensor(0.5, dtype=torch.float64)
    pairs = nl.eigsh(K, RANK, seed=0)
    K.precondition_with(pairs.values, pairs.vectors)
    J = dense_jacobian(model, x)
    for scale, rank in ((3.0, 0), (0.1, 50)):
        noise, other = torch.tensor(scale, dtype=torch.float64), nl.ntk(model, x, engine="gram").detach()
        root = root_of_kept_pairs(K * noise)
        V = pairs.vectors
        exact = V @ (V.mT @ (0.5 * scale * J @ (J.mT @ V))) @ V.mT
        assert defect(root @ root.mT, exact) < 1e-6
        with lazily(rank):
            products.clear()
            (K * noise).add_diagonal(noise * 1e-4).solve(B)
            deflated = sum(products)
            assert set(products) == {1}  # none for another preconditioner
            products.clear()
            (other * (0.5 * noise)).add_diagonal(noise * 1e-4).solve(B)
            assert deflated < sum(products) / (1 if rank else 2)
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    assert root_of_kept_pairs(K) is None


def test_a_gaussian_process_takes_them(products: list[int]):
    class Regression(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor) -> None:
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.covar_module = ScaleKernel(NTKKernel(network(), engine="gram"))
            self.double()
            self.covar_module.outputscale, self.likelihood.noise = 0.25, 1e-3

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), self.covar_module(x))

    x, y, z = random(N, 3), random(N, seed=3), random(7, 3, seed=2)
    counts, means = [], []
    for is_given in (False, True):
        gp = Regression(x, y)
        if is_given:
            K = gp.covar_module.base_kernel(x).evaluate_kernel()
            pairs = nl.eigsh(K, RANK, seed=0)
            K.precondition_with(pairs.values, pairs.vectors)
        products.clear()
        with big_data(rtol=1e-4, rank=RANK, prediction_rtol=1e-8):
            torch.manual_seed(0)
            loss = -gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(x), y)
            loss.backward()
            gp.eval()
            with torch.no_grad(), gpytorch.settings.fast_pred_var(False):
                means.append(gp(z).mean)
        counts.append(sum(products))
        assert gp.likelihood.raw_noise.grad.isfinite().all()
    J, tests = dense_jacobian(network(), x), dense_jacobian(network(), z)
    exact = 0.25 * tests @ (J.mT @ torch.linalg.solve(0.25 * J @ J.mT + 1e-3 * torch.eye(N).double(), y))
    assert counts[1] < counts[0] - RANK
    assert all(defect(mean, exact) < 1e-5 for mean in means)


def _of_a_kernel(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[NTKLinearOperator, Tensor, Tensor]:
    K = nl.ntk(network(), random(N, 3)).detach()
    pairs = nl.eigsh(K, 10, seed=0)
    return K, *change(pairs.values, pairs.vectors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, V: (w, V[:-1]), "no pairs of a kernel with 200 rows"),
        (lambda w, V: (w[:-1], V), "no pairs of a kernel"),
        (lambda w, V: (w[:0], V[:, :0]), "no pairs of a kernel"),
        (lambda w, V: (w, V.float()), "convert them"),
        (lambda w, V: (-w, V), "not positive"),
        (lambda w, V: (w * float("nan"), V), "not positive"),
        (lambda w, V: (w, 2 * V), "orthonormalise"),
        (lambda w, V: (2 * w, V), "not eigenpairs of this kernel"),
        (lambda w, V: (w, V.roll(1, 0)), "not eigenpairs of this kernel"),
        (lambda w, V: (w.flip(0), V), "not eigenpairs of this kernel"),
    ],
)
def test_what_is_no_pair_of_the_kernel_is_refused(change, message: str):
    K, values, vectors = _of_a_kernel(change)
    with pytest.raises(nl.ArgumentError, match=message):
        K.precondition_with(values, vectors)
    assert root_of_kept_pairs(K) is None


def test_kernels_that_are_not_solved_with_refuse_pairs():
    K, values, vectors = _of_a_kernel(lambda w, V: (w, V))
    x = random(N, 3)
    with pytest.raises(nl.ArgumentError, match="square kernel"):
        nl.ntk(network(), x, x[1:]).precondition_with(values, vectors)
    with pytest.raises(nl.ArgumentError, match="positive scale"):
        (-1.0 * K).precondition_with(-values, vectors)
    with pytest.raises(nl.ShapeError, match="index it"):
        nl.ntk(network(), x.expand(2, N, 3), input_dims=1).precondition_with(values, vectors)
