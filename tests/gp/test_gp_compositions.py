"""The kernel beneath other kernels and models, which choose columns and count outputs in their own order."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MultitaskKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator import settings
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

from ntk_lazy.gp import LooseSolveWarning, NTKKernel, big_data

TIGHT = 1e-10


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def network(width: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, 1)).double()


X, Z = draw(8, 3), draw(4, 3, seed=2)
DIMS = (2, 0)
RBF = RBFKernel(active_dims=(1,)).double()


def ntk_of(x: Tensor, z: Tensor) -> Tensor:
    return dense_jacobian(network(), x[..., list(DIMS)]) @ dense_jacobian(network(), z[..., list(DIMS)]).mT


def rbf_of(x: Tensor, z: Tensor) -> Tensor:
    return (-((x[:, None, 1] - z[None, :, 1]).square()) / (2 * RBF.lengthscale.detach() ** 2)).exp()


def kernel() -> NTKKernel:
    return NTKKernel(network(), active_dims=DIMS)


@pytest.mark.parametrize(
    ("composed", "expected"),
    [
        (lambda: kernel() + RBF, lambda x, z: ntk_of(x, z) + rbf_of(x, z)),
        (lambda: RBF + kernel(), lambda x, z: ntk_of(x, z) + rbf_of(x, z)),
        (lambda: kernel() * RBF, lambda x, z: ntk_of(x, z) * rbf_of(x, z)),
        (
            lambda: ScaleKernel(kernel()).double() * RBF,
            lambda x, z: math.log(2) * ntk_of(x, z) * rbf_of(x, z),
        ),
        (lambda: kernel() + kernel(), lambda x, z: 2 * ntk_of(x, z)),
        (lambda: kernel() * kernel() + RBF, lambda x, z: ntk_of(x, z) ** 2 + rbf_of(x, z)),
    ],
)
def test_sums_and_products_leave_the_kernel_its_columns(composed, expected):
    square, wide = expected(X, X), expected(X, Z)
    with torch.no_grad():
        # A fresh kernel each time: what is asked first is the number of outputs, or the diagonal, or the whole.
        assert defect(composed()(X).to_dense(), square) < TIGHT
        assert defect(composed()(X, Z).to_dense(), wide) < TIGHT
        assert defect(composed()(X)[2:5, 1:7].to_dense(), square[2:5, 1:7]) < TIGHT
        assert defect(composed()(X, diag=True), square.diagonal()) < TIGHT


def test_tasks_leave_the_kernel_its_columns():
    tasks = MultitaskKernel(kernel(), num_tasks=2, rank=1).double()
    B = tasks.task_covar_module.covar_matrix.to_dense().detach()
    assert defect(tasks(X).to_dense().detach(), torch.kron(ntk_of(X, X), B)) < TIGHT


@pytest.mark.slow
# torch asks whoever makes sparse tensors, as linear_operator does of indices, whether it should check them.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("choose", [True, False])
def test_a_model_of_tasks_of_botorch_leaves_the_kernel_its_columns(*, choose: bool):
    botorch = pytest.importorskip("botorch.models")
    tasks = torch.arange(12) % 2
    x, y, z = torch.stack([draw(12), tasks.double(), draw(12, seed=2)], 1), draw(12, 1, seed=3), draw(5, 2, seed=4)
    inner = NTKKernel(network(), active_dims=(0, 2) if choose else None)
    gp = botorch.MultiTaskGP(
        x,
        y,
        task_feature=1,
        covar_module=ScaleKernel(inner),
        mean_module=ZeroMean(),
        likelihood=GaussianLikelihood(),
        outcome_transform=None,
    )
    found = gp.eval().posterior(z).mean.detach()
    J, H = dense_jacobian(network(), x[:, [0, 2]]), dense_jacobian(network(), z)
    base, task = gp.covar_module.kernels
    B = (base.outputscale * task._eval_covar_matrix()).detach()
    train = J @ J.mT * B[tasks][:, tasks] + gp.likelihood.noise.detach() * torch.eye(12).double()
    for number in range(2):
        expected = H @ J.mT * B[number, tasks] @ torch.linalg.solve(train, y)
        assert defect(found[:, number], expected.squeeze(1)) < 1e-8


class Regression(gpytorch.models.ExactGP):
    def __init__(self, n: int) -> None:
        super().__init__(draw(n, 2), draw(n, seed=3), GaussianLikelihood())
        # In an engine of its own, so that no solve goes by the parameters.
        self.covar_module = ScaleKernel(NTKKernel(network(), engine="factors"))
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


def predict(gp: Regression) -> None:
    with torch.no_grad():
        _ = gp.eval()(Z[:, :2]).mean


def train(gp: Regression) -> None:
    ExactMarginalLogLikelihood(gp.likelihood, gp.train())(gp(*gp.train_inputs), gp.train_targets)


@pytest.mark.parametrize("job", [predict, train])
def test_solves_at_the_tolerances_of_gpytorch_hint_at_big_data(job):
    gp = Regression(40)
    with settings.max_cholesky_size(39), pytest.warns(LooseSolveWarning, match=r"ntk_lazy\.gp\.big_data\(\)"):
        job(gp)


@pytest.mark.parametrize("job", [predict, train])
def test_nobody_is_told_who_chose_or_factorises(job):
    job(Regression(40))
    with big_data():
        job(Regression(40))
    with settings.max_cholesky_size(39), settings.cg_tolerance(1e-6), gpytorch.settings.eval_cg_tolerance(1e-6):
        job(Regression(40))
