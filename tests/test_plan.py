"""Plans: what they predict of conjugate gradients, which alternative they take, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Generator, Tensor, nn
from zoo import RIGHT

import ntk_lazy as nl
from ntk_lazy.solves import SAMPLED_ROWS, ColumnCosts, PredictedSolve, Solve, Spectrum, cheapest_rank

POINTS = {"tanh": 300, "conv1d": 600, "wide": 900, "wide, float32": 900}
NOISES = (1.0, 1e-2, 1e-3)  # of the mean diagonal


@cache
def kernel(name: str, engine: str = "auto") -> tuple[nl.NTKLinearOperator, Tensor]:
    """Make a kernel with more rows than a plan looks at, and the same written down."""
    if name.startswith("wide"):
        torch.manual_seed(0)
        dtype = torch.float32 if "float32" in name else torch.float64
        module = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
        x = torch.randn(POINTS[name], 2, generator=Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    else:
        (case,) = (case for case in RIGHT if case.name == name)
        module, x = case.module(), case.inputs(POINTS[name])
    K = nl.ntk(module, x, engine=engine).detach()
    assert K.shape[0] > SAMPLED_ROWS
    return K, K.to_dense()


def nystrom(A: Tensor, noise: float, rank: int) -> tuple[Tensor, Tensor]:
    """Return U and ``d`` of the preconditioner ``I + U diag(d) Uᵀ`` of Frangella, Tropp and Udell, algorithm 2.1."""
    sketch = torch.linalg.qr(torch.randn(A.shape[0], rank, generator=Generator().manual_seed(2), dtype=A.dtype)).Q
    image = A @ sketch
    shift = 10 * torch.finfo(A.dtype).eps * image.norm()
    factor = torch.linalg.cholesky(sketch.mT @ image + shift * torch.eye(rank, dtype=A.dtype))
    half = torch.linalg.solve_triangular(factor, (image + shift * sketch).mT, upper=False).mT
    U, S, _ = torch.linalg.svd(half, full_matrices=False)
    return as_inverse(U, (S**2 - shift).clamp_min(0), noise)


def pivoted(A: Tensor, noise: float, rank: int) -> tuple[Tensor, Tensor]:
    """The same from twice as many columns, drawn one by one as Chen, Epperly, Tropp and Webber do, algorithm 2.1."""
    generator, F, left = Generator().manual_seed(2), A[:, :0], A.diagonal().clone()
    for _ in range(2 * rank):
        if not left.max() > 1e-12 * A.diagonal().max():
            break
        s = int(torch.multinomial(left.clamp_min(0), 1, generator=generator))
        g = A[:, s] - F @ F[s]
        F = torch.cat([F, (g / g[s].sqrt())[:, None]], 1)
        left -= F[:, -1] ** 2
        left[s] = 0
    U, S, _ = torch.linalg.svd(F, full_matrices=False)
    return as_inverse(U[:, :rank], S[:rank] ** 2, noise)


def as_inverse(U: Tensor, values: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    return U, (values.min() + noise) / (values + noise) - 1


def iterations(
    K: Tensor,
    noise: float,
    rtol: float,
    rank: int = 0,
    make: Callable[[Tensor, float, int], tuple[Tensor, Tensor]] = nystrom,
) -> int:
    """Count those of textbook conjugate gradients, preconditioned or not."""
    b = torch.randn(K.shape[0], generator=Generator().manual_seed(3), dtype=K.dtype)
    A = K + noise * torch.eye(K.shape[0], dtype=K.dtype)
    U, d = make(K, noise, rank) if rank else (b[:, None][:, :0], b[:0])
    r, z = b, b + U @ (d * (U.mT @ b))
    p, rho, count = z, r @ z, 0
    while r.norm() > rtol * b.norm():
        image = A @ p
        r = r - rho / (p @ image) * image
        z = r + U @ (d * (U.mT @ r))
        before, rho = rho, r @ z
        p, count = z + rho / before * p, count + 1
    return count


def within(predicted: int, counted: int, factor: float) -> bool:
    """Compare counts; one more or less is nothing."""
    return counted / factor - 1 <= predicted <= counted * factor + 1


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_iterations_of_conjugate_gradients_are_predicted_within_a_factor_of_two(name: str, noise: float, rtol: float):
    K, dense = kernel(name)
    noise *= float(dense.diagonal().mean())
    counted = iterations(dense, noise, rtol)
    found = K.explain(solve=Solve(noise=noise, rtol=rtol)).job.solve
    assert within(found.iterations, counted, 2), f"{found.iterations} predicted, {counted} counted"
    assert found.iterations <= found.most_iterations


@pytest.mark.usefixtures("usual_machine")
@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", ["conv1d", "wide"])
@pytest.mark.parametrize("engine", ["autodiff", "factors"])
def test_iterations_with_a_preconditioner_are_predicted_within_a_factor_of_two(name: str, noise: float, engine: str):
    K, dense = kernel(name, engine)
    noise *= float(dense.diagonal().mean())
    counted = iterations(dense, noise, 1e-2, rank=20, make=nystrom if engine == "autodiff" else pivoted)
    plan = K.explain(solve=Solve(noise=noise, rank=20))
    found = plan.job.solve
    assert within(found.iterations, counted, 2), f"{found.iterations} predicted, {counted} counted"
    # A product with a random block, or columns of K that take less.
    made = plan.num_products - (found.iterations + 1)  # with the residual
    assert made == 20 if engine == "autodiff" else 0 < made < 20
    assert ("columns of K" in str(plan)) == (engine == "factors")
    assert found.condition <= K.explain(solve=Solve(noise=noise)).job.solve.condition


@pytest.mark.slow
def test_a_plan_of_a_solve_is_the_same_each_time_and_grows_with_what_is_asked():
    K, dense = kernel("wide")
    unit = float(dense.diagonal().mean())

    def count(**options: float) -> int:
        return K.explain(solve=Solve(**{"noise": 1e-2 * unit, **options})).job.solve.iterations

    assert count() == count()
    assert count() < count(noise=1e-3 * unit)
    assert count() < count(rtol=1e-4)
    assert count(rank=40) < count(rank=10) < count()
    # The kernel's unit is no part of it.
    assert (1e-8 * K).explain(solve=Solve(noise=1e-10 * unit)).job.solve.iterations == count()


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 8.0])
def test_a_stretched_spectrum_has_all_rows_descends_and_keeps_the_trace(power: float):
    sampled = torch.arange(1, 101, dtype=torch.float64) ** -power
    found = Spectrum.of_sample(sampled, 5000)
    assert found.counts.sum() == 5000
    assert (found.values.diff() <= 0).all()
    assert float(found.values @ found.counts) == pytest.approx(50 * float(sampled.sum()), rel=1e-2)
    whole = Spectrum.of_sample(sampled, 100)
    assert torch.equal(whole.values, sampled)


def test_degenerate_spectra_are_solved_at_once():
    for values in (torch.zeros(600, dtype=torch.float64), torch.ones(600, dtype=torch.float64)):
        found = PredictedSolve.of(Solve(noise=0.5), Spectrum.of_sample(values, 600), torch.float32)
        assert found.iterations == 1
    single = Spectrum.of_sample(torch.ones(1, dtype=torch.float64), 1)
    assert PredictedSolve.of(Solve(noise=0.5, rank=1), single, torch.float64).iterations == 1


def test_seconds_grow_with_columns_and_products_and_the_cheapest_that_fits_is_chosen():
    K, _ = kernel("wide")
    for engine in ("autodiff", "factors", "gram"):
        seconds = [
            next(way.seconds for way in K.explain(columns, products).alternatives if way.engine == engine)
            for columns, products in ((1, 1), (4, 1), (16, 1), (16, 10), (16, 1000))
        ]
        assert seconds == sorted(seconds)
    for plan in (K.explain(), K.explain(16, 30), K.explain(eigenpairs=20), K.explain(solve=Solve(noise=1.0))):
        fitting = [way for way in plan.alternatives if way.num_bytes is not None]
        assert plan.engine == min(fitting, key=lambda way: way.seconds).engine
        assert plan.predicted_seconds == min(way.seconds for way in fitting)


@pytest.mark.usefixtures("usual_machine")
def test_a_plan_says_what_it_is_for_and_why_an_engine_was_chosen():
    K, _ = kernel("wide")
    lines = str(K.explain(16, 1000)).splitlines()
    assert "  job      1,000 products of 16 columns each, within K.linearised(16000)" in lines
    assert any("K fits (6.48 MB), and 16,000 columns pay for writing it down" in line for line in lines)
    head, *table = lines[lines.index(next(line for line in lines if line.startswith("  predict"))) :][:4]
    assert {line.split()[0] for line in table} == {"autodiff", "factors", "gram"}
    # Numbers end where their title does.
    assert {len(line[:33].rstrip()) for line in table} == {len(head[:33].rstrip())}
    assert "eigsh(K, 20): about" in str(K.explain(eigenpairs=20))
    text = str(K.explain(3, solve=Solve(noise=0.5, right_hand_sides=3, rank=10)))
    assert "(K + 0.5 I) X = B, 3 right-hand sides, rtol = 0.01" in text
    assert "iterations of conjugate gradients and a preconditioner of rank 10 from " in text
    assert "; condition number about" in text
    small = nl.ntk(nn.Linear(3, 1), torch.randn(300, 3), max_dense_bytes=0)
    assert "is more than may be kept" in str(small.explain(16, 1000))
    own = nl.ntk(nn.Linear(3, 1), torch.randn(5, 3), engine="factors").explain()
    assert "factors: chosen by you" in str(own)
    assert own.alternatives == ()
    assert own.predicted_seconds is None


def test_a_search_that_eigsh_makes_densely_is_planned_so():
    K = nl.ntk(nn.Linear(3, 1), torch.randn(200, 3))
    assert (K.explain(eigenpairs=5).num_columns, K.explain(eigenpairs=5).num_products) == (200, 1)
    assert nl.eigsh(K, 1).method.startswith("Dense")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"noise": 0.0}, "noise"),
        ({"noise": -1.0}, "noise"),
        ({"noise": math.nan}, "noise"),
        ({"noise": "much"}, "noise"),
        ({"noise": 1.0, "rtol": 0.0}, "rtol"),
        ({"noise": 1.0, "rtol": 1.0}, "rtol"),
        ({"noise": 1.0, "right_hand_sides": 0}, "right_hand_sides"),
        ({"noise": 1.0, "rank": -1}, "rank"),
        ({"noise": 1.0, "rank": 2.5}, "rank"),
    ],
    ids=str,
)
def test_a_solve_that_makes_no_sense_is_refused_when_it_is_written(options: dict[str, float], named: str):
    with pytest.raises(nl.ArgumentError, match=named):
        Solve(**options)


def test_jobs_that_a_kernel_cannot_do_are_refused():
    x = torch.randn(6, 3)
    K = nl.ntk(nn.Linear(3, 1), x)
    with pytest.raises(nl.ArgumentError, match="one job at a time"):
        K.explain(eigenpairs=2, solve=Solve(noise=1.0))
    with pytest.raises(nl.ArgumentError, match=r"such as Solve\(noise=0.1\)"):
        K.explain(solve=0.1)
    with pytest.raises(nl.ArgumentError, match="rank is 7, but the kernel has 6 rows"):
        K.explain(solve=Solve(noise=1.0, rank=7))
    with pytest.raises(nl.ArgumentError, match="7, but the kernel has 6 rows"):
        K.explain(eigenpairs=7)
    for other in (nl.ntk(nn.Linear(3, 1), x, x[:4]), nl.ntk(nn.Linear(3, 1), x.expand(2, 6, 3), input_dims=1)):
        with pytest.raises(nl.ArgumentError, match="one symmetric kernel"):
            other.explain(solve=Solve(noise=1.0))
        with pytest.raises(nl.ArgumentError, match="one symmetric kernel"):
            other.explain(eigenpairs=2)
    with pytest.raises(nl.ArgumentError, match="negative scale"):
        (-1.0 * K).explain(solve=Solve(noise=1.0))
    assert (-1.0 * K).explain(eigenpairs=2).job.eigenpairs == 2


@pytest.mark.parametrize("noise", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("num_solves", [1, 10])
def test_the_cheapest_rank_is_that_with_the_fewest_columns_in_all(noise: float, num_solves: int):
    values = 100 * torch.arange(1, 1001, dtype=torch.float64) ** -1.5
    spectrum = Spectrum(values, torch.ones_like(values))
    job = Solve(noise=noise, right_hand_sides=3, num_solves=num_solves)

    def columns(rank: int, known: int = 0) -> int:
        asked = replace(job, rank=rank)
        iterations = PredictedSolve.of(asked, spectrum, torch.float64).iterations
        return 3 * num_solves * iterations + max(0, rank - known)

    ranks = [0, 16, 23, 32, 45, 64, 91, 128, 181, 256, 300]
    best = cheapest_rank(job, spectrum, torch.float64, most=300)
    assert best in ranks
    assert columns(best) == min(map(columns, ranks))
    assert cheapest_rank(job, spectrum, torch.float64, most=15) == 0
    # One that is there goes on, unless more columns pay.
    known = cheapest_rank(job, spectrum, torch.float64, most=300, known=100)
    assert known >= 100
    assert columns(known, known=100) == min(columns(rank, known=100) for rank in (100, 128, 181, 256, 300))


def test_columns_that_are_written_down_make_a_rank_larger_and_what_is_done_with_them_smaller():
    values = 100 * torch.arange(1, 2001, dtype=torch.float64) ** -1.5
    spectrum = Spectrum(values, torch.ones_like(values))
    job = Solve(noise=1e-3, right_hand_sides=3)

    def rank(costs: ColumnCosts | None, known: int = 0) -> int:
        return cheapest_rank(job, spectrum, torch.float64, most=1000, known=known, costs=costs)

    by_product = rank(None)
    assert rank(ColumnCosts(written=0.7)) == by_product  # one and a half for each one of a product are more
    cheap = rank(ColumnCosts(written=0.01))
    assert cheap > by_product
    assert by_product <= rank(ColumnCosts(written=0.01, flop=1e-8, num_rows=1000)) < cheap
    # Where all of them are made anew, those that are there save nothing.
    costs = ColumnCosts(written=0.1, flop=1e-8, num_rows=1000)
    assert costs.root(100, known=50) == costs.root(100) == 15
    assert ColumnCosts().root(100, known=50) == 50
    assert costs.root(100, known=100) == costs.algebra(100, known=100) == 0
    least = cheap // 2
    assert rank(ColumnCosts(written=10.0 / least), known=least) == least


def test_many_solves_and_little_noise_pay_for_a_large_rank():
    values = 100 * torch.arange(1, 1001, dtype=torch.float64) ** -1.5
    spectrum = Spectrum(values, torch.ones_like(values))

    def rank(noise: float, num_solves: int) -> int:
        job = Solve(noise=noise, right_hand_sides=5, num_solves=num_solves)
        return cheapest_rank(job, spectrum, torch.float64, most=1000)

    assert rank(1e3, 1) == 0
    assert 0 < rank(1e-2, 1) < rank(1e-2, 10) <= rank(1e-3, 10)
