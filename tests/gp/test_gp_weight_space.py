"""Where J has fewer columns than rows: solves, likelihoods, gradients, predictions from a matrix of its columns."""

from __future__ import annotations

from dataclasses import replace

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from linear_operator import settings
from linear_operator.operators import DiagLinearOperator
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.engines.weight_gram import WeightGram
from ntk_lazy.gp import NTKKernel, big_data
from ntk_lazy.operator.added_diagonal import AddedDiagonal
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator
from ntk_lazy.operator.weight_space import WeightSpace

N = 600
SCALE, NOISE = 0.25, 0.0625


def network(num_outputs: int = 1, dtype: torch.dtype = torch.float64, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, num_outputs)).to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples of each time that the matrix of the columns is added up."""
    found, of = [], WeightGram.of.__func__

    def spy(cls, engine, x: Tensor, v: Tensor | None) -> WeightGram:
        found.append(x.shape[0])
        return of(cls, engine, x, v)

    monkeypatch.setattr(WeightGram, "of", classmethod(spy))
    return found


def make_diagonal(kind: str, n: int, noise: float) -> Tensor:
    if kind == "one number":
        return torch.tensor(noise, dtype=torch.float64)
    if kind == "equal numbers":
        return torch.full((n,), noise, dtype=torch.float64)
    return noise * torch.linspace(0.2, 3.0, n, dtype=torch.float64)


def added(K: NTKLinearOperator, diagonal: Tensor) -> AddedDiagonal:
    return K + DiagLinearOperator(diagonal) if diagonal.ndim else K.add_diagonal(diagonal)


KINDS = ["one number", "equal numbers", "numbers"]


@pytest.mark.parametrize("noise", [1e-3, 1.0])
@pytest.mark.parametrize(
    ("outputs", "kind"), [*(("full", kind) for kind in KINDS), *((way, "numbers") for way in ("trace", "sum", 1))]
)
def test_solves_reach_the_residual_that_is_asked_for(kind: str, noise: float, outputs, grams: list[int]):
    model, x = network(3), random(N // 3 if outputs == "full" else N, 3)
    K = (nl.ntk(model, x, outputs=outputs) * torch.tensor(SCALE, dtype=torch.float64)).detach()
    J = dense_jacobian(model, x)
    if outputs != "full":
        by_output = J.unflatten(0, (-1, 3))
        J = {"trace": by_output.flatten(1) / 3**0.5, "sum": by_output.sum(1) / 3**0.5}.get(outputs, by_output[:, 1])
    B, diagonal = random(N, 2, seed=5), make_diagonal(kind, N, noise)
    with settings.max_cholesky_size(0), settings.cg_tolerance(1e-8), torch.no_grad():
        X = added(K, diagonal).solve(B)
    assert len(grams) == 1
    full = diagonal.expand(N).unsqueeze(1)
    residual = B - (SCALE * J @ (J.mT @ X) + full * X)
    assert (residual.norm(dim=0) <= 1.1e-8 * B.norm(dim=0)).all()
    exact = torch.linalg.solve(SCALE * J @ J.mT + full.squeeze(1).diag(), B)
    assert defect(X, exact) < 1e-6


@pytest.mark.parametrize("rows", [torch.arange(0, 2 * N, 2), torch.arange(N - 1, -1, -1), torch.arange(N) % (N // 2)])
def test_rows_that_are_chosen_or_repeated_are_solved_with(rows: Tensor, grams: list[int]):
    model, x = network(2), random(N, 3)
    K, J = nl.ntk(model, x).detach()[rows][:, rows], dense_jacobian(model, x)[rows]
    diagonal, B = make_diagonal("numbers", N, 0.1), random(N, 1, seed=5)
    with settings.max_cholesky_size(0), settings.cg_tolerance(1e-10), torch.no_grad():
        shifted = added(K, diagonal)
        X, log_determinant = shifted.solve(B), shifted.inv_quad_logdet(B, logdet=True)[1]
    assert set(grams) == {x.shape[0] if len(rows.unique()) == N else N // 4} or len(grams) == 1
    dense = J @ J.mT + diagonal.diag()
    assert defect(X, torch.linalg.solve(dense, B)) < 1e-8
    assert abs(log_determinant - dense.logdet()) < 1e-8 * abs(dense.logdet())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_reduced", [True, False])
def test_marginal_likelihoods_and_their_gradients_are_exact(kind: str, is_reduced: bool, grams: list[int]):
    model, x = network(), random(N, 3)
    J, weight = dense_jacobian(model, x), torch.tensor([1.0, -0.5], dtype=torch.float64)
    found = []
    for is_dense in (False, True):
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        diagonal = make_diagonal(kind, N, 0.1).requires_grad_()
        B = random(N, 2, seed=5).requires_grad_()
        if is_dense:
            dense = scale * J @ J.mT + diagonal.expand(N).diag()
            quadratic, log_determinant = (B * torch.linalg.solve(dense, B)).sum(0), dense.logdet()
            quadratic = quadratic.sum() if is_reduced else quadratic
        else:
            shifted = added(nl.ntk(model, x).detach() * scale, diagonal)
            with settings.max_cholesky_size(0), settings.cg_tolerance(1e-12):
                quadratic, log_determinant = shifted.inv_quad_logdet(B, logdet=True, reduce_inv_quad=is_reduced)
        value = (quadratic if is_reduced else quadratic @ weight) + 0.7 * log_determinant
        found.append((quadratic, log_determinant, *torch.autograd.grad(value, (scale, diagonal, B))))
    assert grams == [N]
    for mine, exact in zip(*found, strict=True):
        assert mine.shape == exact.shape
        assert defect(mine, exact) < 1e-8


def test_a_log_determinant_alone_is_exact():
    model, x = network(), random(N, 3)
    J = dense_jacobian(model, x)
    exact = (J @ J.mT + 0.1 * torch.eye(N, dtype=torch.float64)).logdet()
    with settings.max_cholesky_size(0), torch.no_grad():
        found = nl.ntk(model, x).detach().add_diagonal(torch.tensor(0.1, dtype=torch.float64)).logdet()
    assert abs(found - exact) < 1e-8 * abs(exact)


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: NTKKernel, num_tasks: int = 1) -> None:
        self.num_tasks = num_tasks
        several = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks) if num_tasks > 1 else None
        super().__init__(x, y, several or gpytorch.likelihoods.GaussianLikelihood())
        self.covar_module = ScaleKernel(kernel)
        self.double()
        self.covar_module.outputscale, self.likelihood.noise = SCALE, NOISE
        if several is not None:
            several.task_noises = torch.linspace(0.05, 0.2, num_tasks)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        zeros = torch.zeros(*x.shape[:-1], self.num_tasks, dtype=torch.float64)
        if self.num_tasks > 1:
            return gpytorch.distributions.MultitaskMultivariateNormal(zeros, self.covar_module(x))
        return gpytorch.distributions.MultivariateNormal(zeros[..., 0], self.covar_module(x))


def test_ten_steps_of_training_take_one_matrix_and_go_where_cholesky_goes(grams: list[int], products: list[int]):
    x, y = random(N, 3), random(N, seed=3)
    paths = []
    for size in (0, N):
        gp = _Regression(x, y, NTKKernel(network()))
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
        optimiser, losses = torch.optim.Adam(gp.parameters(), lr=0.1), []
        products.clear()
        # A preconditioner of as many columns as J has would be as good.
        with big_data(rtol=1e-10, rank=0), settings.max_cholesky_size(size):
            for _ in range(10):
                optimiser.zero_grad()
                loss = -mll(gp(x), y)
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        if size == 0:
            assert sum(products) <= 20
        paths.append(torch.tensor([*losses, *(float(p.detach()) for p in gp.parameters())], dtype=torch.float64))
    assert grams == [N]
    assert defect(*paths) < 1e-8


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_a_posterior_is_that_of_linear_regression_on_the_jacobian(
    is_fast: bool, num_tasks: int, grams: list[int], monkeypatch: pytest.MonkeyPatch
):
    to_dense = NTKLinearOperator.to_dense

    def watch(self: NTKLinearOperator, **options: int) -> Tensor:
        assert max(self.shape) < N
        return to_dense(self, **options)

    monkeypatch.setattr(NTKLinearOperator, "to_dense", watch)
    model, x, z = network(num_tasks), random(N, 3), random(20, 3, seed=2)
    y = random(N, num_tasks, seed=3)
    gp = _Regression(x, y if num_tasks > 1 else y[:, 0], NTKKernel(model), num_tasks).eval()
    noise = torch.full((num_tasks,), NOISE, dtype=torch.float64)
    if num_tasks > 1:
        noise = noise + gp.likelihood.task_noises.detach()
    J, tests, weight = dense_jacobian(model, x), dense_jacobian(model, z), 1 / noise.repeat(N)
    precision = J.mT @ (weight[:, None] * J) + torch.eye(J.shape[1], dtype=J.dtype) / SCALE
    mean = tests @ torch.linalg.solve(precision, J.mT @ (weight * y.flatten()))
    covariance = tests @ torch.linalg.solve(precision, tests.mT)
    with torch.no_grad(), big_data(prediction_rtol=1e-10, variance_rank=10 if is_fast else 0):
        posterior = gp(z)
        assert defect(posterior.mean.flatten(), mean) < 1e-8
        assert defect(posterior.variance.flatten(), covariance.diagonal()) < 1e-8
        assert defect(posterior.covariance_matrix, covariance) < 1e-8
        assert posterior.rsample(torch.Size([2])).isfinite().all()
    assert grams == [N]


def test_parameters_that_change_in_place_are_noticed_also_behind_the_back_of_autograd(grams: list[int]):
    model, x, B = network(), random(N, 3), random(N, 1, seed=5)
    K, noise = nl.ntk(model, x).detach(), torch.tensor(1e-2, dtype=torch.float64)
    for write in (lambda t: None, lambda t: t.mul_(1.5), lambda t: t.data.mul_(1 + 1e-6)):
        with torch.no_grad():
            write(model[0].weight)
        J = dense_jacobian(model, x)
        dense = J @ J.mT + noise * torch.eye(N, dtype=torch.float64)
        with settings.max_cholesky_size(0), settings.cg_tolerance(1e-10), torch.no_grad():
            quadratic, log_determinant = K.add_diagonal(noise).inv_quad_logdet(B, logdet=True)
        assert abs(log_determinant - dense.logdet()) < 1e-9 * abs(dense.logdet())
        assert abs(quadratic - (B * torch.linalg.solve(dense, B)).sum()) < 1e-8 * abs(quadratic)
    assert len(grams) == 3


def test_a_network_that_is_trained_gets_the_gradients_of_conjugate_gradients(monkeypatch: pytest.MonkeyPatch):
    x, y, gradients = random(200, 3), random(200, seed=3), []
    for size in (0, 200):
        model = network()
        gp = _Regression(x, y, NTKKernel(model, trainable=True))
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
        torch.manual_seed(1)
        with (
            big_data(rtol=1e-8, probes=400, rank=30),
            settings.max_cholesky_size(size),
            settings.max_lanczos_quadrature_iterations(60),
        ):
            mll(gp(x), y).backward()
        gradients.append(model[0].weight.grad)
    assert gradients[1].norm() > 0
    assert defect(*gradients) < 0.05


@pytest.mark.parametrize("noise", [1.0, 100.0])
def test_float32_gets_there_too(noise: float, grams: list[int]):
    model, x, B = network(dtype=torch.float32), random(N, 3, dtype=torch.float32), random(N, 2, seed=5)
    J = dense_jacobian(model, x)
    dense = J @ J.mT + noise * torch.eye(N, dtype=torch.float64)
    shifted = nl.ntk(model, x).detach().add_diagonal(torch.tensor(noise))
    with settings.max_cholesky_size(0), settings.cg_tolerance(1e-4), torch.no_grad():
        X = shifted.solve(B.float())
        log_determinant = shifted.inv_quad_logdet(B.float(), logdet=True)[1]
    assert len(grams) == 1
    assert ((B - dense @ X.double()).norm(dim=0) <= 1.1e-4 * B.norm(dim=0)).all()
    assert abs(log_determinant - dense.logdet()) < 1e-5 * abs(dense.logdet())


@pytest.mark.parametrize("wrong", [1.3, 50.0])
def test_a_factor_that_is_off_is_refined_or_becomes_a_preconditioner(wrong: float):
    model, x, B, noise = network(), random(N, 3), random(N, 2, seed=5), 1e-2
    K, J = nl.ntk(model, x).detach(), dense_jacobian(model, x)
    options = {"right_hand_sides": 1, "rtol": 1e-2, "rank": lambda: 0, "num_solves": 1}
    weights = WeightSpace.of(K, torch.full((N,), noise, dtype=torch.float64), **options)
    spoilt = replace(weights, factor=weights.gram.factor(wrong * noise))
    solution = spoilt.solve(lambda V: J @ (J.mT @ V) + noise * V, B, rtol=1e-8, max_steps=200)
    residual = B - J @ (J.mT @ solution.X) - noise * solution.X
    assert (residual.norm(dim=0) <= 1.1e-8 * B.norm(dim=0)).all()
    assert solution.worst <= 1e-8
    assert solution.first > 1e-3
    assert spoilt.is_doubtful(solution)
    assert not weights.is_doubtful(weights.solve(lambda V: J @ (J.mT @ V) + noise * V, B, rtol=1e-8, max_steps=200))


def test_what_it_is_not_for_is_left_to_conjugate_gradients(grams: list[int]):
    x, B = random(N, 3), random(N, 1, seed=5)
    noise = torch.tensor(10.0, dtype=torch.float64)
    small = network()
    for K in (
        nl.ntk(small, x, engine="factors"),  # the user named how K is multiplied
        nl.ntk(small, x.expand(2, N, 3), input_dims=1),
        nl.ntk(network(width=400), x),  # P = 2,001
        nl.ntk(small, x, memory_budget=30_000),  # P² numbers do not fit
    ):
        shifted = K.detach().add_diagonal(noise)
        with settings.max_cholesky_size(0), settings.cg_tolerance(1e-4), torch.no_grad():
            X = shifted.solve(B.expand(*K.batch_shape, N, 1))
        assert (B - shifted._matmul(X)).norm() <= 2e-4 * B.norm()
    assert not grams


def test_below_the_size_of_cholesky_nothing_changes(grams: list[int]):
    x, y = random(300, 3), random(300, seed=3)
    gp = _Regression(x, y, NTKKernel(network()))
    gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(x), y).backward()
    gp.eval()
    with torch.no_grad():
        assert gp(random(5, 3, seed=2)).variance.shape == (5,)
    assert not grams


def test_plans_choose_by_the_number_of_parameters_and_say_why():
    x, noise = random(2000, 3), 1e-3
    small = nl.ntk(network(), x).explain(solve=nl.Solve(noise=noise))
    assert small.engine == "weights"
    assert small.predicted_seconds == min(way.seconds for way in small.alternatives)
    assert small.predicted_bytes >= 3 * 8 * 41**2
    assert "J has fewer columns than rows" in str(small)
    assert "JᵀJ, 41 x 41, written down once and factorised" in str(small)
    # As many parameters as rows, and noise that conjugate gradients make short work of: not worth P³.
    wide = nl.ntk(network(width=390), x).explain(solve=nl.Solve(noise=1e4))
    assert wide.engine != "weights"
    assert "weights" in {way.engine for way in wide.alternatives}
    more = nl.ntk(network(width=450), x).explain(solve=nl.Solve(noise=noise))
    assert "weights" not in {way.engine for way in more.alternatives}
    scarce = nl.ntk(network(), x, memory_budget=50_000).explain(solve=nl.Solve(noise=noise))
    assert {way.engine: way.num_bytes for way in scarce.alternatives}["weights"] is None
    many = nl.ntk(network(width=390), x).explain(solve=nl.Solve(noise=noise, num_solves=10))
    assert many.num_products == 10 * (many.job.solve.iterations + 1)  # each measures its residual
    assert "10 times" in str(many)


def test_a_factor_that_rounding_spoils_is_not_used(grams: list[int]):
    model, x = network(), random(N, 3)
    tiny = torch.full((N,), 1e-16, dtype=torch.float64)
    K = nl.ntk(model, x).detach()
    assert WeightSpace.of(K, tiny, right_hand_sides=1, rtol=1e-2, rank=lambda: 0, num_solves=1) is None
    assert WeightSpace.of(K, 1e13 * tiny, right_hand_sides=1, rtol=1e-2, rank=lambda: 0, num_solves=1) is not None
    single = nl.ntk(network(dtype=torch.float32), x.float()).detach()
    assert (
        WeightSpace.of(single, 1e11 * tiny.float(), right_hand_sides=1, rtol=1e-2, rank=lambda: 0, num_solves=1) is None
    )
    assert grams == [N, N]
