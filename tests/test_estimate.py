"""Traces, norms and ranks against dense matrices; standard errors against the errors over many seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import DECAYS, KnownPairs, decaying, matrix, normal
from linear_operator.operators import DenseLinearOperator
from oracle import dense_jacobian
from torch import nn

import ntk_lazy as nl
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.estimate import Estimate, effective_rank, frobenius_norm, trace

DTYPES = [torch.float32, torch.float64]
SEEDS = range(60)


class Counting:
    """A matrix that is known by its products alone, and counts them."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.columns = matrix, 0
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        self.columns += V.shape[1]
        return self.matrix @ V

    def diagonal(self) -> torch.Tensor:
        return self.matrix.diagonal()


def _network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def assert_covers(found: list[Estimate], expected: float, *, largest_error: float) -> None:
    """Two standard errors cover most errors, five nearly all, and they are not wide for nothing."""
    deviations = torch.tensor([abs(e.value - expected) / e.standard_error for e in found])
    assert (deviations <= 2).double().mean() >= 0.9
    assert (deviations <= 5).double().mean() >= 0.98
    rms = math.sqrt(sum((e.value - expected) ** 2 for e in found) / len(found))
    assert rms <= largest_error * expected
    assert math.sqrt(sum(e.standard_error**2 for e in found) / len(found)) <= max(8 * rms, 1e-5 * expected)


@pytest.mark.parametrize("wrap", [lambda K: K, DenseLinearOperator, Counting], ids=["tensor", "operator", "products"])
def test_trace_and_norm_of_anything_that_multiplies_are_those_of_the_dense_matrix(wrap):
    K = matrix(decaying("1/i", 40), seed=0)
    exact = trace(wrap(K))
    assert exact.value == pytest.approx(K.trace().item(), rel=1e-14)
    assert (exact.standard_error, exact.num_products) == (0, 0)
    every = frobenius_norm(wrap(K), num_samples=40)
    assert every.value == pytest.approx(K.norm().item(), rel=1e-14)
    assert (every.standard_error, every.num_products) == (0, 40)
    assert float(every) == every.value


def test_estimates_of_a_network_are_those_of_its_dense_kernel():
    net, x = _network(), normal(30, 3, seed=1)
    J = dense_jacobian(net, x)
    K, lazy = J @ J.mT, nl.ntk(net, x)
    pairs = KnownPairs.of(K, 10)
    assert trace(lazy).value == pytest.approx(K.trace().item(), rel=1e-12)
    for found, expected in [
        (trace(lazy, method="stochastic", num_samples=20), K.trace()),
        (frobenius_norm(lazy, pairs=pairs), K.norm()),
        (effective_rank(lazy, pairs=pairs), (K.trace() / K.norm()) ** 2),
    ]:
        assert 0 < found.standard_error <= 0.05 * found.value
        assert abs(found.value - expected.item()) <= 4 * found.standard_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("decay", "largest_error"),
    [("1/i", 0.03), ("1/i^2", 0.007), ("0.7^i", 1e-3), ("one dominates", 5e-4), ("twenty equal", 0.02)],
)
def test_stochastic_trace_has_an_error_that_covers(decay, largest_error, dtype):
    K = matrix(decaying(decay, 300), seed=0, dtype=dtype)
    found = [trace(K, method="stochastic", num_samples=24, seed=s) for s in SEEDS]
    assert_covers(found, K.double().trace().item(), largest_error=largest_error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("known", "largest_error"), [(0, 0.03), (5, 0.02), (20, 2e-3)])
@pytest.mark.parametrize("decay", DECAYS)
def test_norm_has_an_error_that_covers_and_falls_with_the_pairs_that_are_known(decay, known, largest_error, dtype):
    K = matrix(decaying(decay, 300), seed=0, dtype=dtype)
    pairs = KnownPairs.of(K, known) if known else None
    found = [frobenius_norm(K, pairs=pairs, num_samples=16, seed=s) for s in SEEDS]
    loose = {"twenty equal": 0.1, "0.7^i": 0.1}.get(decay, largest_error) if known < 20 else largest_error
    assert_covers(found, K.double().norm().item(), largest_error=loose)


class Diagonal:
    """A diagonal matrix: directions of the samples are uniform, so that any other eigenvectors make no difference."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.shape, self.dtype, self.device = (len(values), len(values)), values.dtype, values.device

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        return self.values[:, None] * V

    def diagonal(self) -> torch.Tensor:
        return self.values


TEN_SPECTRA = DECAYS | {
    "1e4 and ones": lambda i: torch.where(i == 1, 1e4, 1.0).double(),
    "1e4, 100 and ones": lambda i: torch.where(i == 1, 1e4, torch.where(i == 2, 100.0, 1.0)).double(),
    "1/i^3": lambda i: i**-3,
    "1/√i": lambda i: i**-0.5,
    "one more than the leading vectors": lambda i: 1e-3 + 0.999 * (i <= 17).double(),
}


@pytest.mark.slow
@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("spectrum", TEN_SPECTRA)
def test_two_standard_errors_cover_93_of_100_also_where_one_direction_is_left(spectrum, known):
    values = TEN_SPECTRA[spectrum](torch.arange(1, 301, dtype=torch.float64))
    K, eye = Diagonal(values), torch.eye(300, dtype=torch.float64)
    pairs = (
        KnownPairs(values[:known], eye[:, :known], torch.zeros(known, dtype=torch.float64), 1e-15) if known else None
    )
    total, norm = trace(K), math.sqrt(math.fsum(values.square().tolist()))
    rank, num_norms, num_ranks, num_seeds = (total.value / norm) ** 2, 0, 0, 200
    for seed in range(num_seeds):
        found = frobenius_norm(K, pairs=pairs, seed=seed)
        num_norms += abs(found.value - norm) <= 2 * found.standard_error
        other = effective_rank(K, trace=total, frobenius=found)
        num_ranks += abs(other.value - rank) <= 2 * other.standard_error
    assert min(num_norms, num_ranks) >= 0.93 * num_seeds


@pytest.mark.slow
@given(n=st.integers(2, 30), seed=st.integers(0, 1000), exponent=st.integers(-996, 996))
@settings(max_examples=20, deadline=None)
def test_estimates_scale_with_the_matrix(n, seed, exponent):
    K = matrix(decaying("1/i^2", n), seed=seed)
    factor, pairs = 2.0**exponent, KnownPairs.of(K, 2)
    scaled = KnownPairs(pairs.values * factor, pairs.vectors, pairs.residual_norms * factor, pairs.noise_floor)
    y = normal(n, seed=seed)
    for power, measure in [
        (1, lambda A, p: trace(A)),
        (1, lambda A, p: trace(A, method="stochastic", num_samples=5, seed=seed)),
        (1, lambda A, p: frobenius_norm(A, num_samples=4, num_leading=2, seed=seed)),
        (1, lambda A, p: frobenius_norm(A, pairs=p, num_samples=4, seed=seed)),
        (0, lambda A, p: effective_rank(A, num_samples=4, seed=seed)),
        (0, lambda A, p: effective_rank(A, definition="trace", pairs=p)),
        (0, lambda A, p: effective_rank(A, definition="stable", pairs=p, num_samples=4, seed=seed)),
        (0, lambda A, p: nl.kernel_target_alignment(A, y, num_samples=4, seed=seed)),
        (0, lambda A, p: nl.kernel_target_alignment(A, y, pairs=p, num_samples=4, seed=seed)),
        (0, lambda A, p: nl.spectral_position(A, y)),
        (0, lambda A, p: nl.kernel_distance(A, K, num_leading=2, num_samples=4, seed=seed)),
    ]:
        one, other = measure(K, pairs), measure(factor * K, scaled)
        expected = factor**power
        assert other.value / expected == pytest.approx(one.value, rel=1e-6, abs=1e-12)
        assert other.standard_error / expected == pytest.approx(one.standard_error, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trace_of_a_matrix_of_low_rank_is_found_to_rounding(dtype):
    values = torch.cat([torch.arange(5, 0, -1), torch.zeros(195)]).double()
    found = trace(matrix(values, seed=0, dtype=dtype), method="stochastic", num_samples=12)
    assert found.value == pytest.approx(15, rel=1e3 * max(torch.finfo(dtype).eps, 1e-10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trace_of_a_multiple_of_the_identity_takes_no_luck(dtype):
    found = trace(3 * torch.eye(400, dtype=dtype), method="stochastic", num_samples=8)
    assert found.value == pytest.approx(1200, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_samples", [19, 20, 50])
def test_the_trace_is_right_when_samples_are_as_many_as_rows(num_samples, dtype):
    K = matrix(decaying("1/i", 20), seed=0, dtype=dtype)
    found = trace(K, method="stochastic", num_samples=num_samples)
    assert abs(found.value - K.double().trace().item()) <= max(3 * found.standard_error, 20 * torch.finfo(dtype).eps)
    assert found.num_products == min(num_samples, 20)


def test_products_are_counted_seeds_repeat_and_the_global_generator_is_left_alone():
    K = matrix(decaying("1/i", 200), seed=0)
    before = torch.get_rng_state()
    for measure in (
        lambda A, seed: trace(A, method="stochastic", num_samples=10, seed=seed),
        lambda A, seed: frobenius_norm(A, num_samples=10, seed=seed),
        lambda A, seed: frobenius_norm(A, pairs=KnownPairs.of(K, 5), num_samples=10, seed=seed),
        lambda A, seed: effective_rank(A, num_samples=10, seed=seed),
    ):
        counting = Counting(K)
        assert measure(counting, 3).num_products == counting.columns
        assert measure(K, 3) == measure(K, 3)
        assert measure(K, 3) != measure(K, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_zero_has_trace_and_norm_zero_and_no_rank():
    zero = torch.zeros(100, 100)
    assert trace(zero, method="stochastic") == Estimate(value=0.0, standard_error=0.0, num_products=32)
    assert frobenius_norm(zero).value == 0
    for definition in ("participation", "trace", "stable"):
        with pytest.raises(DegenerateError, match="no"):
            effective_rank(zero, definition=definition, pairs=KnownPairs.of(zero, 1))


def test_pairs_that_are_all_of_them_leave_nothing_to_sample():
    K = matrix(decaying("1/i", 50), seed=0)
    found = frobenius_norm(K, pairs=KnownPairs.of(K, 50))
    assert found.value == pytest.approx(K.norm().item(), rel=1e-13)
    assert (found.standard_error, found.num_products) == (0, 0)


def test_residuals_of_the_pairs_are_part_of_the_norm():
    K = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    v = torch.tensor([[0.8], [0.6]], dtype=torch.float64)
    value = v.mT @ K @ v
    rough = KnownPairs(value[0], v, (K @ v - v * value).norm(dim=0), 0.0)
    found = [frobenius_norm(K, pairs=rough, num_samples=4, seed=s).value for s in range(3)]
    assert found == pytest.approx([math.sqrt(10)] * 3, rel=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_ranks_follow_their_definitions_and_their_order(decay):
    K = matrix(decaying(decay, 200), seed=0)
    pairs = KnownPairs.of(K, 200)
    values = decaying(decay, 200)
    total, square, largest = values.sum().item(), values.square().sum().item(), values.max().item()
    expected = {"stable": square / largest**2, "trace": total / largest, "participation": total**2 / square}
    found = {name: effective_rank(K, definition=name, pairs=pairs).value for name in expected}
    assert found == pytest.approx(expected, rel=1e-12)
    assert 1 <= found["stable"] <= found["trace"] <= found["participation"] <= 200
    assert found["trace"] ** 2 == pytest.approx(found["stable"] * found["participation"], rel=1e-12)
    sampled = effective_rank(K, trace=trace(K, method="stochastic"), frobenius=frobenius_norm(K))
    assert sampled.num_products == 0
    assert abs(sampled.value - expected["participation"]) <= 4 * sampled.standard_error


def test_errors_of_trace_and_norm_go_into_the_error_of_a_rank():
    total = Estimate(value=10.0, standard_error=1.0, num_products=5)
    norm = Estimate(value=2.0, standard_error=0.1, num_products=7)
    K = torch.eye(30)
    both = effective_rank(K, trace=total, frobenius=norm)
    assert both.value == pytest.approx(25)
    assert both.standard_error == pytest.approx(25 * 2 * math.hypot(0.1, 0.05))
    pairs = KnownPairs.of(K, 1)
    one = effective_rank(K, definition="trace", pairs=pairs, trace=total)
    assert (one.value, one.standard_error) == (pytest.approx(10), pytest.approx(1))
    other = effective_rank(K, definition="stable", pairs=pairs, frobenius=norm)
    assert (other.value, other.standard_error) == (pytest.approx(4), pytest.approx(0.4))
    assert str(norm) == "2 ± 0.1"
    assert str(effective_rank(K, frobenius=frobenius_norm(K, num_samples=30))) == "30"


def test_what_cannot_be_measured_is_refused():
    K = matrix(decaying("1/i", 50), seed=0)
    with pytest.raises(ArgumentError, match="not positive semi-definite"):
        trace(K - 0.5 * torch.eye(50), method="stochastic", num_samples=20)
    with pytest.raises(ArgumentError, match="at least 4"):
        trace(K, method="stochastic", num_samples=3)
    with pytest.raises(ArgumentError, match="'exact' or 'stochastic'"):
        trace(K, method="hutchinson")
    with pytest.raises(ArgumentError, match="0 and 4"):
        frobenius_norm(K, num_samples=3)
    with pytest.raises(ArgumentError, match="pairs=eigsh"):
        effective_rank(K, definition="stable")
    with pytest.raises(ArgumentError, match="participation, trace, stable"):
        effective_rank(K, definition="entropy")
    with pytest.raises(ShapeError, match=r"\(50, 20\)"):
        trace(K[:, :20])
    with pytest.raises(ShapeError, match="40 rows"):
        frobenius_norm(K, pairs=KnownPairs.of(K[:40, :40], 5))


@pytest.mark.parametrize("measure", [trace, lambda K: trace(K, method="stochastic"), frobenius_norm])
def test_a_nan_in_the_operator_is_an_error(measure):
    K = torch.eye(100)
    K[3, 3] = math.nan
    with pytest.raises(NonFiniteError):
        measure(K)
