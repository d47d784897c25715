"""Solves with noise go on until they are right, gradients are those of Cholesky, and nothing is made twice."""

from __future__ import annotations

import math
from pathlib import Path

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from linear_operator import settings
from linear_operator.operators import DiagLinearOperator, LinearOperator
from linear_operator.utils.warnings import NumericalWarning
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.engines.factor_store import FactorStore
from ntk_lazy.engines.factors import FactorEngine
from ntk_lazy.gp import NTKKernel, big_data
from ntk_lazy.operator import job
from ntk_lazy.operator.added_diagonal import AddedDiagonal
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator
from ntk_lazy.operator.preconditioner_rank import preconditioner_rank
from ntk_lazy.operator.roots import kept_root, lanczos_root, randomised_root

N = 150


def network(num_outputs: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, num_outputs)).to(
        dtype
    )


def inputs(n: int = N, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, generator=Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples of each time that factors are captured."""
    found, capture = [], FactorStore.capture

    def spy(self: FactorStore, x: Tensor, **options: object):
        found.append(x.shape[0])
        return capture(self, x, **options)

    monkeypatch.setattr(FactorStore, "capture", spy)
    return found


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [0, 40])
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_solves_reach_the_residual_that_is_asked_for(noise: float, rank: int, scale: float | None):
    model, x, B = network(), inputs(), inputs(N, seed=5)
    K = nl.ntk(model, x).detach()
    J = dense_jacobian(model, x)
    dense = J @ J.mT
    if scale is not None:
        K, dense, noise = K * torch.tensor(scale, dtype=K.dtype), scale * dense, scale * noise
    shifted = K.add_diagonal(torch.tensor(noise, dtype=K.dtype))
    assert isinstance(shifted, AddedDiagonal)
    with (
        settings.max_cholesky_size(0),
        settings.cg_tolerance(1e-6),
        settings.max_cg_iterations(2000),
        settings.max_preconditioner_size(rank),
        settings.min_preconditioning_size(1),
        torch.no_grad(),
    ):
        X = shifted.solve(B)
    residual = B - (dense @ X + noise * X)
    assert (residual.norm(dim=0) <= 1.01e-6 * B.norm(dim=0)).all()


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of K that are written down, each time."""
    found, columns = [], FactorEngine.columns

    def spy(self: FactorEngine, x1: Tensor, x2: Tensor, which: Tensor):
        found.append(len(which))
        return columns(self, x1, x2, which)

    monkeypatch.setattr(FactorEngine, "columns", spy)
    return found


@pytest.mark.usefixtures("usual_machine")
@pytest.mark.parametrize(("engine", "multiplied"), [("autodiff", 40), ("factors", 0)])
def test_a_preconditioner_saves_products_and_is_made_once(
    engine: str, multiplied: int, products: list[int], written: list[int]
):
    K, B = nl.ntk(network(), inputs(), engine=engine).detach(), inputs(N, seed=5)[:, :1]
    counts = {}
    for rank in (0, 40, 40):
        products.clear()
        written.clear()
        with (
            settings.max_cholesky_size(0),
            settings.cg_tolerance(1e-6),
            settings.max_preconditioner_size(rank),
            settings.min_preconditioning_size(1),
            torch.no_grad(),
        ):
            # The scale and the noise of another step, as in training.
            (K * torch.tensor(0.5, dtype=K.dtype)).add_diagonal(torch.tensor(1e-3, dtype=K.dtype)).solve(B)
        counts.setdefault(rank, []).append((sum(products), sum(written)))
    ((plain, _),), ((first, of_first), (second, of_second)) = counts[0], counts[40]
    assert first - second == multiplied
    # Half as many columns again as the root has, if they are cheaper than a product with as many.
    assert (of_first, of_second) == (0 if multiplied else 60, 0)
    assert 2 * second < plain


def test_a_parameter_that_was_changed_in_place_has_a_preconditioner_of_its_own():
    model, x = network(), inputs()
    K = nl.ntk(model, x)
    first = randomised_root(K, 10)
    assert randomised_root(K, 10) is first
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    second = randomised_root(K, 10)
    assert defect(second @ second.mT, first @ first.mT) > 1e-3
    with torch.no_grad():
        expected = randomised_root(nl.ntk(model, x), 10)
    assert defect(second @ second.mT, expected @ expected.mT) < 1e-10


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1.0])
def test_a_rank_that_is_chosen_takes_hardly_more_products_than_the_best_one(noise: float, products: list[int]):
    B = inputs(400, seed=5)
    counts = {}
    for rank in (None, 0, 16, 32, 64, 128):
        # By products that nothing can be spared of.
        K = nl.ntk(network(), inputs(400), engine="autodiff").detach()
        products.clear()
        with big_data(prediction_rtol=1e-6, rank=rank, max_steps=4000), settings.cg_tolerance(1e-6), torch.no_grad():
            K.add_diagonal(noise * K.diagonal().mean()).solve(B)
        counts[rank] = sum(products)
    chosen = counts.pop(None)
    # The counts that the choice is made by are right to a factor of 1.5.
    assert chosen <= 1.5 * min(counts.values())
    assert max(counts.values()) > 2 * min(counts.values())


def test_a_rank_that_was_chosen_stays_until_another_one_pays(products: list[int]):
    K, B = nl.ntk(network(), inputs(400), engine="autodiff").detach(), inputs(400, seed=5)

    def solve(noise: float) -> list[int]:
        products.clear()
        with big_data(), settings.cg_tolerance(1e-4), torch.no_grad():
            K.add_diagonal(noise * K.diagonal().mean()).solve(B)
        return [columns for columns in products if columns > B.shape[1]]

    (first,) = solve(1e-4)
    root = kept_root(K)
    assert root.shape == (400, first)
    assert solve(0.8e-4) == []
    assert solve(1e-1) == []  # one that is there costs nothing
    assert kept_root(K) is root
    (more,) = solve(1e-6)
    assert kept_root(K).shape == (400, first + more)  # what is there is not multiplied again


@pytest.mark.usefixtures("usual_machine")
def test_a_root_of_columns_that_was_chosen_is_made_anew_when_it_grows(products: list[int], written: list[int]):
    K, B = nl.ntk(network(), inputs(400), engine="factors").detach(), inputs(400, seed=5)
    for noise, is_made in ((1e-2, True), (0.8e-2, False), (1.0, False), (1e-7, True)):
        products.clear()
        written.clear()
        with big_data(), settings.cg_tolerance(1e-4), torch.no_grad():
            K.add_diagonal(noise * K.diagonal().mean()).solve(B)
        rank = kept_root(K).shape[1]
        assert sum(written) == (min(math.ceil(1.5 * rank), 400) if is_made else 0)
        assert max(products) == B.shape[1]


@pytest.mark.usefixtures("usual_machine")
def test_a_root_of_columns_runs_the_model_once(captured: list[int]):
    K = nl.ntk(network(), inputs(2000), engine="factors", memory_budget=200_000_000).detach()
    randomised_root(K, 128)
    assert captured.count(2000) == 1
    assert sum(captured) == 2000 + 192


@pytest.mark.usefixtures("usual_machine")
def test_a_root_of_columns_rounds_alike_under_autocast():
    K = nl.ntk(network(dtype=torch.float32), inputs(400, torch.float32), engine="factors").detach()
    expected = randomised_root(K, 50)
    K.settings.root.forget()
    with torch.autocast("cpu", torch.bfloat16):
        found = randomised_root(K, 50)
    assert torch.equal(found, expected)


def test_columns_are_not_taken_where_factors_would_be_made_anew_for_each_round(captured: list[int], written: list[int]):
    x = inputs(2000)
    for options in ({"memory_budget": 2_000_000}, {"memory_budget": 20_000_000, "num_outputs": 10}):
        model = network(options.pop("num_outputs", 1))
        K = nl.ntk(model, x, engine="factors", **options).detach()
        randomised_root(K, 30)
        assert written == []
        captured.clear()


def test_factors_in_files_stay_while_others_come_and_go(captured: list[int], tmp_path: Path):
    x = inputs(2000)
    K = nl.ntk(network(), x, engine="factors", memory_budget=1_000_000, scratch=tmp_path).detach()
    store = K.gramian.engine.store
    assert not store.fits(2000)
    with store.keeping():
        for z in (x, x[:10].clone(), x[:20].clone(), x):
            list(store.chunks(z, is_held=True, together=z.shape[0])())
    assert captured == [2000, 10, 20]


@pytest.mark.usefixtures("usual_machine")
def test_a_root_does_not_decide_for_a_series_that_has_not_begun():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 1)).double()
    K = nl.ntk(model, torch.randn(400, 20, dtype=torch.float64)).detach()
    engine = K.gramian.engine
    with K.linearised(2000):
        assert job.column_costs(K, 1).is_written
        randomised_root(K, 20)
        K @ torch.ones(400, 1, dtype=torch.float64)
        assert engine._series is engine.gram_engine
        K.settings.root.forget()
        randomised_root(K, 20)  # now it goes along
        assert engine._series is engine.gram_engine


def test_factors_of_several_sets_are_held_while_they_fit(captured: list[int]):
    x = inputs(300)
    K = nl.ntk(network(), x, engine="factors", memory_budget=100_000_000).detach()
    store = K.gramian.engine.store
    few = [x[i : i + 10].clone() for i in range(0, 50, 10)]
    budget, store.budget = store.budget, round(320 * store.bytes_per_example / 0.125)  # of which so much is for sets
    try:
        with store.keeping():
            for z in (x, few[0], x[:20], few[1], few[2], x, few[3], few[3], few[0]):
                list(store.chunks(z, is_held=True, together=z.shape[0])())
    finally:
        store.budget = budget
    # What was asked for longest ago has gone: few[0] for few[2], and never x, which was asked for in between.
    assert captured == [300, 10, 10, 10, 10, 10]


@pytest.mark.usefixtures("usual_machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_root_of_columns_is_that_of_the_rows_that_were_selected(num_outputs: int, dtype: torch.dtype):
    x = inputs(dtype=dtype)
    K = nl.ntk(network(num_outputs, dtype), x, engine="factors").detach()
    rows = torch.randperm(K.shape[0], generator=Generator().manual_seed(0))[: K.shape[0] // 2]
    for part in (K, K[rows][:, rows], 0.5 * K):
        assert job.column_costs(part, 1).is_written
        dense = part.to_dense().double()
        L = randomised_root(part, 60).double()
        U, values, _ = torch.linalg.svd(dense)
        best = dense - (U[:, :60] * values[:60]) @ U[:, :60].mT
        # Of half as many columns again; sums of rounding count where hardly anything is left.
        floor = 10 * torch.finfo(dtype).eps * dense.norm()
        assert torch.linalg.matrix_norm(dense - L @ L.mT, 2) < 3 * torch.linalg.matrix_norm(best, 2) + floor


@pytest.mark.usefixtures("usual_machine")
def test_a_rank_that_is_chosen_fits_half_of_the_budget():
    ranks = []
    for budget in (8_000_000, 2_000_000_000):
        K = nl.ntk(network(), inputs(2000), memory_budget=budget, engine="factors").detach()
        with big_data(), torch.no_grad():
            noise = 1e-4 * K.diagonal().mean().expand(2000)
            ranks.append(preconditioner_rank(K, noise, right_hand_sides=5, num_solves=10))
    assert 0 < ranks[0] * 2000 * 8 <= 4_000_000
    assert ranks[1] > ranks[0]


def test_a_preconditioner_of_orthogonal_columns_is_what_it_says():
    K = nl.ntk(network(), inputs()).detach() * torch.tensor(0.5, dtype=torch.float64)
    noise = torch.tensor(1e-2, dtype=torch.float64, requires_grad=True)
    with settings.max_preconditioner_size(20), settings.min_preconditioning_size(1):
        inverse, operator, logdet = K.add_diagonal(noise)._preconditioner()
    dense = operator.to_dense()
    assert defect(inverse(dense.detach()), torch.eye(N).double()) < 1e-9
    assert abs(logdet - dense.logdet()) < 1e-9 * N
    (expected,) = torch.autograd.grad(dense.logdet(), noise, retain_graph=True)
    (found,) = torch.autograd.grad(logdet, noise)
    assert abs(found - expected) < 1e-9 * expected


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-9), (torch.float64, 1e-9), (torch.float64, 1e-20)])
def test_an_inverse_is_positive_where_rounding_exceeds_the_noise(dtype: torch.dtype, share: float):
    K = nl.ntk(network(dtype=dtype), inputs(dtype=dtype)).detach()
    with settings.max_preconditioner_size(20), settings.min_preconditioning_size(1):
        root = randomised_root(K, 20)
        values = root.double().square().sum(0)
        noise = (share * values[0]).to(dtype)
        inverse, _, _ = K.add_diagonal(noise)._preconditioner()
    # Of unit vectors along the columns, in units of what the inverse is there.
    units = root / values.sqrt().to(dtype)
    sizes = (values + noise.double()).sqrt()
    found = sizes.unsqueeze(1) * (units.double().mT @ inverse(units).double()) * sizes
    assert (found - torch.eye(20).double()).abs().max() < 1e-2


def test_factors_are_captured_once_for_a_solve(captured: list[int]):
    K = nl.ntk(network(), inputs(), engine="factors").detach()
    with settings.max_cholesky_size(0), settings.cg_tolerance(1e-6), torch.no_grad():
        K.add_diagonal(torch.tensor(1e-2, dtype=K.dtype)).solve(inputs(N, seed=5))
    assert captured == [N]


@pytest.mark.parametrize("is_shifted", [False, True])
def test_factors_are_captured_once_for_a_root(captured: list[int], *, is_shifted: bool):
    K = nl.ntk(network(), inputs(), engine="factors").detach()
    A = K.add_diagonal(torch.tensor(1e-1, dtype=K.dtype)) if is_shifted else K
    with settings.max_cholesky_size(0), settings.max_root_decomposition_size(N), torch.no_grad():
        root = A.root_decomposition(method="lanczos").root.to_dense()
        assert captured == [N]
        # Also where eigenvalues are equal, as those are that noise alone makes.
        assert defect(root @ root.mT, A.to_dense()) < 1e-10
        captured.clear()
        again = K.add_diagonal(torch.tensor(1e-1, dtype=K.dtype)) if is_shifted else K.detach()
        inverse = again.root_inv_decomposition(method="lanczos").root.to_dense()
        assert captured == [N]
        # Both are of one process.
        root = again.root_decomposition().root.to_dense()
        assert captured == [N]
        expected = torch.eye(root.shape[1], dtype=K.dtype)
        assert not is_shifted or defect(root.mT @ inverse, expected) < 1e-6


@pytest.mark.parametrize("is_shifted", [False, True])
def test_roots_have_the_gradient_that_linear_operator_gives_them(*, is_shifted: bool):
    model, gradients = network(), []
    for decompose in (LinearOperator._root_decomposition, lanczos_root):
        noise = torch.tensor(1e-1, dtype=torch.float64, requires_grad=True)
        K = nl.ntk(model, inputs())
        A = K.add_diagonal(noise) if is_shifted else K
        with settings.max_root_decomposition_size(20), settings.tridiagonal_jitter(0.0):
            torch.manual_seed(0)  # both start from the same vector
            root = decompose(A)
        wanted = [*model.parameters(), noise][: None if is_shifted else -1]
        gradients.append(torch.autograd.grad((root.mT @ inputs(seed=5)).square().sum(), wanted, materialize_grads=True))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8 * float(two.abs().max()))


def test_float32_says_when_it_does_not_get_there():
    K = nl.ntk(network(dtype=torch.float32), inputs(dtype=torch.float32)).detach()
    shifted = K.add_diagonal(torch.tensor(1e-6))
    with (
        settings.max_cholesky_size(0),
        settings.cg_tolerance(1e-7),
        torch.no_grad(),
        pytest.warns(NumericalWarning, match="conjugate gradients ended with a relative residual"),
    ):
        shifted.solve(inputs(dtype=torch.float32, seed=5))


@pytest.mark.parametrize("noise", [0.0, -1.0])
@pytest.mark.parametrize("size", [0, 10**6])
def test_noise_that_leaves_k_singular_or_indefinite_is_refused(noise: float, size: int):
    small = nn.Linear(3, 1).double()
    shifted = nl.ntk(small, inputs()).detach().add_diagonal(torch.tensor(noise, dtype=torch.float64))
    with settings.max_cholesky_size(size), pytest.raises(nl.ArgumentError, match="Add a positive noise"):
        shifted.solve(inputs(seed=5))


@pytest.mark.parametrize("is_diagonal", [False, True])
def test_gradients_of_noise_and_scale_are_those_of_cholesky(is_diagonal: bool):
    x, y = inputs(), inputs(seed=5)[:, :1]
    gradients = []
    for size in (10**6, 0):
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        noise = torch.full((N,) if is_diagonal else (), 0.1, dtype=torch.float64, requires_grad=True)
        K = nl.ntk(network(), x).detach() * scale
        shifted = K + DiagLinearOperator(noise) if is_diagonal else K.add_diagonal(noise)
        torch.manual_seed(1)
        with (
            settings.max_cholesky_size(size),
            settings.cg_tolerance(1e-8),
            settings.num_trace_samples(400),
            settings.max_lanczos_quadrature_iterations(60),
            settings.max_preconditioner_size(20),
            settings.min_preconditioning_size(1),
        ):
            quadratic, logdet = shifted.inv_quad_logdet(y, logdet=True)
            value = quadratic + logdet
            gradients.append((float(logdet.detach()), *torch.autograd.grad(value, (scale, noise))))
    (exact, *expected), (estimate, *found) = gradients
    assert abs(estimate - exact) < 0.02 * abs(exact)
    for a, b in zip(found, expected, strict=True):
        assert defect(a, b) < (0.05 if is_diagonal else 0.02)


@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
def test_the_gradient_of_a_scale_is_right_where_products_would_lose_it(engine: str):
    model, x = network(2, torch.float32), inputs(dtype=torch.float32)
    K = nl.ntk(model, x, engine=engine).detach()
    J = dense_jacobian(network(2), x.double())
    A = J @ J.mT
    # As solves leave them: what is along the largest eigenvectors is divided by their eigenvalues.
    noise = 1e-6 * A.diagonal().mean()
    B = torch.randn(2 * N, 4, generator=Generator().manual_seed(3), dtype=torch.float64)
    X = torch.linalg.solve(A + noise * torch.eye(2 * N, dtype=torch.float64), B).float()
    scale = torch.tensor(1.0, requires_grad=True)
    with K.linearised(1000):  # where it pays, K is written down
        (found,) = torch.autograd.grad((X * ((K * scale) @ X)).sum(), scale)
    expected = (X.double() * (A @ X.double())).sum()
    assert abs(float(found) - expected) < 1e-3 * expected


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), ScaleKernel(kernel)
        self.double()
        self.covar_module.outputscale, self.likelihood.noise = 0.25, 0.0625

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_big_data_predicts_what_cholesky_predicts():
    x, z, y = inputs(), inputs(40, seed=2), inputs(seed=3)[:, 0]
    with torch.no_grad():
        exact = _Regression(x, y, NTKKernel(network())).eval()(z)
        mean, variance = exact.mean, exact.variance
    for rank in (0, N):
        gp = _Regression(x, y, NTKKernel(network())).eval()
        with torch.no_grad(), big_data(prediction_rtol=1e-8, rank=40, variance_rank=rank):
            found = gp(z)
            assert defect(found.mean, mean) < 1e-5
            assert defect(found.variance, variance) < 1e-4


def test_later_means_go_through_no_training_point(captured: list[int], products: list[int]):
    gp = _Regression(inputs(), inputs(seed=3)[:, 0], NTKKernel(network(), engine="factors")).eval()
    with torch.no_grad(), big_data():
        _ = gp(inputs(40, seed=2)).mean
        captured.clear()
        products.clear()
        _ = gp(inputs(40, seed=4)).mean
        assert set(captured) == {40}  # for the mean, and for the variance
        assert not products


def test_big_data_never_writes_down_what_is_as_large_as_k(monkeypatch: pytest.MonkeyPatch):
    written = []
    to_dense = NTKLinearOperator.to_dense
    monkeypatch.setattr(
        NTKLinearOperator, "to_dense", lambda self, **o: written.append(self.shape) or to_dense(self, **o)
    )
    gp = _Regression(inputs(), inputs(seed=3)[:, 0], NTKKernel(network(), max_dense_bytes=N * N * 8 - 1))
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimiser = torch.optim.Adam(gp.parameters(), lr=0.1)
    with big_data(rank=20, variance_rank=30):
        for _ in range(2):
            optimiser.zero_grad()
            loss = -mll(gp(*gp.train_inputs), gp.train_targets)
            loss.backward()
            optimiser.step()
        assert loss.isfinite()
        gp.eval()
        with torch.no_grad():
            posterior = gp.likelihood(gp(inputs(7, seed=2)))
            assert (posterior.variance > 0).all()
    assert all(max(shape) < N for shape in written)


@pytest.mark.parametrize("options", [{"rtol": 0.0}, {"prediction_rtol": 2}, {"rank": -1}, {"probes": 0}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, float]):
    with pytest.raises(nl.ArgumentError), big_data(**options):
        pass
