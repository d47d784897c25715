"""What a solve costs, how accurate float32 is, and what a start, a seed and a display may change."""

from __future__ import annotations

import math

import pytest
import torch
from check_solution import check_solution
from eigen_cases import Factored, Spectrum, Spy, factored, haar, spectrum, study_spectra
from linear_operator.operators import DenseLinearOperator

from ntk_lazy.eigen import LOBPCG, Dense, Lanczos, Solver, SolveState, eigsh
from ntk_lazy.errors import ArgumentError
from ntk_lazy.linalg.tiles import TILE_BYTES
from ntk_lazy.rows import Rows

N, K = 300, 6
A = spectrum("power 1.5", lambda i: i**-1.5, N).matrix()
SOLVERS = [Lanczos(), Lanczos(block_size=3), LOBPCG(), Dense()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spectrum", study_spectra(1200), ids=str)
def test_a_search_needs_no_more_products_than_the_model_says(spectrum: Spectrum, dtype: torch.dtype) -> None:
    k, b = 100, 16
    if dtype is torch.float32 and spectrum.values[k - 1] < 1e-4:
        k = 50  # beyond, residuals of 1e-3 are below the rounding of a product with a dense float32 matrix
    B = spectrum.matrix(dtype)
    spy = Spy(B)
    pairs = eigsh(spy, k, solver=Lanczos(block_size=b))
    check_solution(pairs, B, k)
    model = 1.75 * k + 5 * b
    assert pairs.cost.search_columns <= 1.1 * model
    # In float32, eight products tell the rounding of large and small pairs apart.
    assert pairs.cost.columns <= 1.1 * model + (8 if dtype is torch.float32 else 0)
    assert pairs.cost.columns == sum(spy.widths)
    assert pairs.cost.block_calls == len(spy.widths)
    assert pairs.cost.columns - pairs.cost.search_columns <= 16 + 8
    assert max(spy.widths) <= b + 1
    assert pairs.cost.peak_bytes <= B.shape[0] * B.itemsize * (2 * k + 12 * b) + 2 * TILE_BYTES


@pytest.mark.slow
def test_a_search_on_a_kernel_of_a_network_keeps_to_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 8, generator=generator, dtype=torch.float64)
    w1 = torch.randn(8, 128, generator=generator, dtype=torch.float64)
    w2 = torch.randn(128, generator=generator, dtype=torch.float64)
    hidden = torch.tanh(x @ w1 / 8**0.5)
    backward = (1 - hidden**2) * w2
    kernel = hidden @ hidden.mT + (x @ x.mT / 8) * (backward @ backward.mT)
    pairs = eigsh(kernel, 100, solver=Lanczos(block_size=16))
    check_solution(pairs, kernel, 100)
    assert pairs.cost.search_columns <= 1.1 * (1.75 * 100 + 5 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Lanczos(block_size=16), Lanczos(block_size=4), LOBPCG()], ids=repr)
def test_float32_resolves_values_of_one_hundred_thousandth(solver: Solver) -> None:
    k, n = 100, 600
    values = [1.0, *(10 ** (-1.5 - 3.5 * (i - 2) / 98) for i in range(2, n + 1))]
    assert values[k - 1] == pytest.approx(1e-5)
    operator = factored(values, 900, torch.float32)
    pairs = eigsh(operator, k, solver=solver)
    J = operator.factor.double()
    exact = torch.linalg.svdvals(J)[:k] ** 2
    X = pairs.vectors.double()
    residuals = (J @ (J.mT @ X) - X * pairs.values).norm(dim=0)
    assert pairs.vectors.dtype is torch.float32
    assert float((X.mT @ X - torch.eye(k)).abs().max()) <= 1e-6
    assert float(((pairs.values - exact) / exact).abs().max()) <= 1e-6
    assert float((residuals / exact).max()) <= 5e-4
    assert bool(((residuals <= 2 * pairs.residual_norms) & (pairs.residual_norms <= 4 * residuals + 1e-6)).all())
    assert pairs.cost.half_columns == k
    # Rounding that no product removes must not keep a search going.
    assert pairs.cost.search_columns <= (2 if isinstance(solver, Lanczos) else 4) * k


def test_half_products_make_values_more_accurate() -> None:
    values = [10.0 ** (-i / 16) for i in range(200)]
    with_half = factored(values, 300, torch.float32)
    without = Spy(with_half.factor, tamper=lambda call, V, image: with_half.factor @ (with_half.factor.mT @ V))
    without.matrix = torch.zeros(200, 200)
    exact = torch.linalg.svdvals(with_half.factor.double())[:70] ** 2
    errors = [
        float(((eigsh(op, 70, solver=Lanczos(), rtol=5e-4).values - exact).abs() / exact).max())
        for op in (with_half, without)
    ]
    assert errors[0] < 1e-6 < errors[1]


def test_half_products_of_another_matrix_are_refused() -> None:
    operator = factored([1 / i for i in range(1, N + 1)], 400, torch.float64)

    class Wrong(Factored):
        def half_gram(self, V: torch.Tensor) -> torch.Tensor:
            return 1.01 * super().half_gram(V)

    wrong = Wrong(matrix=operator.matrix, factor=operator.factor)
    with pytest.raises(ArgumentError, match="disagree"):
        eigsh(wrong, K, solver=Lanczos())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_seed_makes_a_solve_repeatable_to_the_bit(solver: Solver) -> None:
    first, second = (eigsh(A, K, solver=solver, seed=5) for _ in range(2))
    other = eigsh(A, K, solver=solver, seed=6)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.residual_norms, second.residual_norms)
    assert solver == Dense() or not torch.equal(first.vectors, other.vectors)


def test_the_global_generator_and_flags_are_left_alone() -> None:
    state = torch.get_rng_state()
    eigsh(A, K, solver=Lanczos())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_display_changes_nothing(solver: Solver, capsys: pytest.CaptureFixture[str]) -> None:
    states: list[SolveState] = []
    silent = eigsh(A, K, solver=solver)
    told = eigsh(A, K, solver=solver, progress=states.append)
    shown = eigsh(A, K, solver=solver, progress=True)
    assert torch.equal(silent.vectors, told.vectors)
    assert torch.equal(silent.vectors, shown.vectors)
    captured = capsys.readouterr()
    assert f"{K}/{K} pairs" in captured.err
    assert captured.out == ""
    assert states[-1].num_converged == K
    assert [s.columns for s in states] == sorted(s.columns for s in states)
    assert states[-1].values == pytest.approx(told.values.tolist(), rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_linear_operators_give_what_tensors_give(solver: Solver) -> None:
    wrapped = DenseLinearOperator(A.clone().requires_grad_())
    pairs = eigsh(wrapped, K, solver=solver)
    plain = eigsh(A, K, solver=solver)
    # Each is an eigenvalue to its residual, which is all that two orders of summation leave.
    allowed = pairs.residual_norms + plain.residual_norms + 10 * A.shape[0] * torch.finfo(A.dtype).eps * plain.values[0]
    assert ((pairs.values - plain.values).abs() <= allowed).all()
    assert not pairs.vectors.requires_grad


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("kind", ["one", "many", "zero", "copies", "none", "exact", "lowest"])
def test_any_finite_start_ends_at_the_same_pairs(kind: str, solver: Solver) -> None:
    vectors = torch.linalg.eigh(A)[1]
    start = {
        "one": haar(N)[:, :1],
        "many": haar(N)[:, :120],
        "zero": torch.zeros(N, 4, dtype=torch.float64),
        "copies": haar(N)[:, :1].expand(-1, 9),
        "none": torch.zeros(N, 0, dtype=torch.float64),
        "exact": vectors[:, -K:],
        "lowest": vectors[:, :K],
    }[kind]
    check_solution(eigsh(A, K, solver=solver, start=start.float()), A, K)


@pytest.mark.parametrize("solver", [Lanczos(block_size=8), LOBPCG()], ids=repr)
def test_a_warm_start_saves_products(solver: Solver) -> None:
    k = 20
    B = spectrum("power 1.5", lambda i: i**-1.5, 600).matrix()
    drift = haar(600, seed=9)[:, :40]
    later = B + 1e-4 * drift @ drift.mT
    old = eigsh(B, k, solver=solver, rtol=1e-4)
    cold = eigsh(later, k, solver=solver, rtol=1e-2)
    warm = eigsh(later, k, solver=solver, rtol=1e-2, start=old)
    check_solution(warm, later, k, rtol=1e-2)
    assert warm.cost.search_columns < 0.9 * cold.cost.search_columns


def test_a_restart_keeps_the_basis_small_and_the_answer() -> None:
    k = 40
    B = spectrum("power 1.3", lambda i: i**-1.3, 800).matrix()
    free = eigsh(B, k, solver=Lanczos(block_size=8))
    short = eigsh(B, k, solver=Lanczos(block_size=8, max_basis=64))
    check_solution(short, B, k)
    assert short.cost.peak_bytes < free.cost.peak_bytes
    assert short.cost.search_columns <= 2 * free.cost.search_columns


def test_the_block_is_never_narrower_than_the_outputs_ask_for() -> None:
    spy = Spy(A, num_outputs=30)
    pairs = eigsh(spy, 40, solver=Lanczos())
    assert "block_size=32" in pairs.method
    narrow = Spy(spectrum("copies", lambda i: 1.0 if i <= 12 else 0.1 / i, N).matrix(), num_outputs=12)
    found = eigsh(narrow, 12, solver=Lanczos(block_size=2), verify=False)
    assert max(narrow.widths) <= max(3, 8)
    assert float(found.values[-1]) > 0.999


def test_a_timed_block_is_reported_and_repeats_the_solve() -> None:
    B = spectrum("power 1.3", lambda i: i**-1.3, 800).matrix()
    timed = eigsh(B, 30, solver=Lanczos(block_size="timed"))
    check_solution(timed, B, 30)
    chosen = int(timed.method.split("block_size=")[1].split(",")[0])
    assert chosen in (8, 16, 32, 64)


@pytest.mark.parametrize(("n", "k", "expected"), [(200, 5, "Dense"), (1000, 5, "Lanczos"), (1000, 300, "Dense")])
def test_auto_picks_the_cheaper_method(n: int, k: int, expected: str) -> None:
    B = spectrum("power 1", lambda i: 1 / i, n).matrix()
    assert eigsh(B, k).method.startswith(expected)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 20), (torch.float64, 20), (torch.float64, 498)])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_result_scales_with_the_operator_to_the_bit(solver: Solver, dtype: torch.dtype, exponent: int) -> None:
    pairs = eigsh(A.to(dtype), K, solver=solver)
    for sign in (-1, 1):
        factor = 4.0 ** (sign * exponent)
        scaled = eigsh(A.to(dtype) * factor, K, solver=solver)
        assert torch.equal(scaled.vectors, pairs.vectors)
        assert torch.equal(scaled.values, pairs.values * factor)
        assert torch.equal(scaled.residual_norms, pairs.residual_norms * factor)
        assert torch.equal(scaled.bounds.value, pairs.bounds.value * factor)
        assert scaled.norm == pairs.norm * factor
        assert scaled.bounds.residual_norm == pairs.bounds.residual_norm * factor


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize("solver", [Lanczos(block_size="timed"), LOBPCG(), Dense()], ids=repr)
def test_values_are_right_at_any_scale_that_float64_holds(solver: Solver, scale: float) -> None:
    found = eigsh(Spy(A * scale), K, solver=solver)
    exact = torch.linalg.eigvalsh(A).flip(0)[:K]
    assert found.status == "converged"
    assert torch.allclose(found.values / scale, exact, rtol=1e-6)
    assert bool(((found.values / scale - exact).abs() <= found.bounds.value / scale).all())


@pytest.mark.parametrize("num_processes", [2, 3])
def test_rows_of_an_operator_decide_where_sums_are_made(num_processes: int) -> None:
    class Watched(Rows):
        calls = 0

        def sum(self, partial: torch.Tensor) -> torch.Tensor:
            Watched.calls += 1
            return partial

    class Sharded(Spy):
        @property
        def rows(self) -> Rows:
            return Watched(N)

    check_solution(eigsh(Sharded(A), K, solver=Lanczos()), A, K)
    assert Watched.calls >= num_processes


def test_loose_tolerances_cost_less() -> None:
    B = spectrum("power 1.3", lambda i: i**-1.3, 800).matrix()
    costs = [eigsh(B, 20, solver=Lanczos(block_size=8), rtol=rtol).cost.search_columns for rtol in (1e-1, 1e-3, 1e-6)]
    assert costs == sorted(costs)
    assert costs[0] < costs[2]
    assert math.isfinite(costs[0])
