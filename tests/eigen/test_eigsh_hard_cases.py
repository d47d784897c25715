"""Sets reported as converged are right: every hard spectrum, seed, dtype, scale and solver."""

from __future__ import annotations

import pytest
import torch
from check_solution import check_solution
from eigen_cases import Spectrum, Spy, haar, hard_spectra, named_matrices, spectrum

from ntk_lazy.eigen import LOBPCG, Dense, Lanczos, Solver, eigsh
from ntk_lazy.errors import NotConvergedError
from ntk_lazy.rows import Rows

N, K = 120, 10
SOLVERS = [Lanczos(), Lanczos(block_size=1), Lanczos(block_size=8, max_basis=32), LOBPCG(), Dense()]
DTYPES = [torch.float32, torch.float64]
SCALES = [1.0, 1e-30, 1e30]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", hard_spectra(N), ids=str)
def test_no_seed_gives_a_wrong_set(spectrum: Spectrum, dtype: torch.dtype) -> None:
    for seed in range(20):
        A = spectrum.matrix(dtype, SCALES[seed % 3])
        check_solution(eigsh(A, K, solver=Lanczos(), seed=seed), A, K)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("spectrum", hard_spectra(N), ids=str)
def test_no_solver_gives_a_wrong_set(spectrum: Spectrum, solver: Solver) -> None:
    for dtype in DTYPES:
        for scale in SCALES:
            A = spectrum.matrix(dtype, scale)
            check_solution(eigsh(A, K, solver=solver, seed=3), A, K)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", named_matrices(N))
def test_matrices_of_the_textbooks_are_solved(name: str, solver: Solver) -> None:
    A = named_matrices(N)[name]
    check_solution(eigsh(A, K, solver=solver, seed=3), A, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["auto", *SOLVERS], ids=repr)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_any_number_of_pairs_up_to_all_is_found(n: int, solver: Solver, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    J = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    A = (J @ J.mT).to(dtype)
    A = (A + A.mT) / 2
    for k in sorted({1, 2, n // 2, n - 1, n} & set(range(1, n + 1))):
        chosen = Lanczos(block_size=8) if solver == SOLVERS[2] and n == 40 else solver
        check_solution(eigsh(A, k, solver=chosen, seed=1), A, k)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("multiplicity", [2, 5, 12])
def test_copies_on_a_slowly_falling_spectrum_are_found_by_narrow_blocks(multiplicity: int, block_size: int) -> None:
    values = (0.8 ** torch.arange(300, dtype=torch.float64)).repeat_interleave(multiplicity)[:300]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
        A = (Q * values) @ Q.mT
        A = (A + A.mT) / 2
        check_solution(eigsh(A, K, solver=Lanczos(block_size=block_size), seed=seed), A, K)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Lanczos(block_size=8, max_basis=25), Lanczos(block_size=4)], ids=repr)
@pytest.mark.parametrize("num_steps", [950, 1000])
def test_neighbours_a_tolerance_apart_are_not_mistaken_at_the_cut(num_steps: int, solver: Solver) -> None:
    plateau = spectrum("plateau", lambda i: 1 - i / num_steps, 160)
    for dtype in DTYPES:
        A = plateau.matrix(dtype)
        for seed in range(20):
            check_solution(eigsh(A, 5, solver=solver, seed=seed), A, 5)


class Diagonal:
    """A diagonal operator: random starts make no difference between it and one with any other eigenvectors."""

    num_outputs = 1
    dtype = torch.float64
    device = torch.device("cpu")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.rows = Rows(len(values))

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        return self.values[:, None] * V


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.3, 0.5])
def test_copies_above_a_heavy_tail_are_found(power: float) -> None:
    values = torch.arange(1, 50_001, dtype=torch.float64) ** -power
    values[5:10] = values[5].item()
    for seed in range(2):
        for block_size in (1, 4):
            pairs = eigsh(Diagonal(values), 10, solver=Lanczos(block_size=block_size), seed=seed)
            assert pairs.values.tolist() == pytest.approx(values[:10].tolist(), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_null_vectors_are_named_as_such(dtype: torch.dtype) -> None:
    A = hard_spectra(N)[3].matrix(dtype)  # rank 5
    pairs = eigsh(A, K, solver=Lanczos())
    assert pairs.is_below_noise.tolist() == [False] * 5 + [True] * 5
    assert "cannot be told from zero" in str(pairs)


def dominated_from_below() -> dict[str, torch.Tensor]:
    """Matrices whose negative eigenvalues are the large ones."""
    v = haar(N)[:, :1]
    ends = torch.ones(N, dtype=torch.float64)
    ends[0] = ends[-1] = 0
    path = torch.diag(1 + ends) - sum(torch.diag(torch.ones(N - 1, dtype=torch.float64), i) for i in (-1, 1))
    return {
        "one huge negative value": spectrum("huge", lambda i: -1e10 if i == 1 else float(i), N).matrix(),
        "minus a projection": -(v @ v.mT + (v @ v.mT).mT) / 2,
        "minus the Laplacian of a path": -path,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["auto", *SOLVERS], ids=repr)
@pytest.mark.parametrize("name", dominated_from_below())
def test_values_within_rounding_of_the_norm_are_named_where_that_is_of_a_negative_value(
    name: str, solver: Solver, dtype: torch.dtype
) -> None:
    A = dominated_from_below()[name].to(dtype)
    exact = torch.linalg.eigvalsh(A.double()).flip(0)
    norm = float(exact.abs().max())
    pairs = eigsh(Spy(A), 3, solver=solver, rtol=1e-2, on_unconverged="return")
    assert norm / 1.1 <= pairs.norm <= norm * (1 + 1e-6)
    floor = pairs.noise_floor * norm
    assert bool((pairs.is_below_noise == (pairs.values.abs() <= pairs.noise_floor * pairs.norm)).all())
    assert bool(pairs.is_below_noise[exact[:3].abs() < floor / 10].all())
    errors = (pairs.values - exact[:3]).abs()
    assert bool((errors <= pairs.bounds.value).all())
    found = pairs.converged & ~pairs.is_below_noise
    assert bool((errors <= 1e-2 * exact[:3].abs())[found].all())
    if pairs.status == "converged":
        assert bool((errors <= floor)[pairs.is_below_noise].all())


def test_a_repeated_eigenvalue_is_complete_whatever_the_block_and_only_thanks_to_the_probe() -> None:
    spectrum = next(s for s in hard_spectra(N) if s.name == "24 copies at the top")
    A = spectrum.matrix()
    assert eigsh(A, K, solver=Lanczos(block_size=4), verify=False).values[-1] < 0.5
    assert eigsh(A, K, solver=Lanczos(block_size=4)).values[-1] > 0.999
    # All that a probe found is multiplied before the next one: three probes find the copies, not one each.
    pairs = eigsh(A, 24, solver=Lanczos(block_size=1))
    assert pairs.values[-1] > 0.999
    assert pairs.cost.columns - pairs.cost.search_columns <= 3 * 48 + 1


def test_the_rigorous_probe_states_a_bound_that_holds() -> None:
    A = hard_spectra(N)[11].matrix()
    pairs = eigsh(A, K, solver=Lanczos(), verify="rigorous")
    assert pairs.completeness.method == "rigorous"
    assert pairs.completeness.failure_probability <= 1e-3
    assert float(torch.linalg.eigvalsh(A)[-K]) <= pairs.completeness.factor * float(pairs.values[-1])


def test_small_eigenvalues_in_float32_are_either_right_or_not_reported_as_converged() -> None:
    values = [10.0 ** (-i / 10) for i in range(N)]
    A = Spectrum("down to rounding", tuple(values)).matrix(torch.float32)
    with pytest.raises(NotConvergedError, match="rounding") as caught:
        eigsh(A, 70, solver=Lanczos(block_size=8))
    pairs = caught.value.result
    exact = torch.linalg.eigvalsh(A.double()).flip(0)[:70]
    good = pairs.converged & ~pairs.is_below_noise
    assert 40 < int(good.sum()) < 70
    assert bool(((pairs.values - exact).abs() <= 1e-3 * exact)[good].all())


def test_a_start_without_the_wanted_directions_still_finds_them() -> None:
    spectrum = hard_spectra(N)[13]
    A = spectrum.matrix()
    lowest = torch.linalg.eigh(A)[1][:, :20]
    check_solution(eigsh(Spy(A), K, solver=Lanczos(), start=lowest), A, K)


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "multiplicity"), [(0.9, 10), (0.95, 20)])
@pytest.mark.parametrize("solver", [Lanczos(), Lanczos(block_size=8), LOBPCG()], ids=repr)
def test_more_copies_than_columns_in_a_block_are_found(solver: Solver, ratio: float, multiplicity: int) -> None:
    values = (ratio ** torch.arange(400, dtype=torch.float64)).repeat_interleave(multiplicity)[:400]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64))[0]
        A = (Q * values) @ Q.mT
        A = (A + A.mT) / 2
        check_solution(eigsh(A, multiplicity, solver=solver, seed=seed), A, multiplicity)
