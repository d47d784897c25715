"""Matrices that are written down: by the operator, by products, at the end of a search, and of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from check_solution import check_solution
from eigen_cases import Spy, haar, hard_spectra, spectrum
from linear_operator.operators import DenseLinearOperator, LinearOperator
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.eigen import LOBPCG, Dense, Lanczos, eigsh
from ntk_lazy.errors import ArgumentError, BudgetError, NonFiniteError, NotConvergedError, ShapeError
from ntk_lazy.linalg.largest_pairs import largest_pairs

N, K = 300, 6
A = spectrum("power 1.5", lambda i: i**-1.5, N).matrix()
DTYPES = [torch.float32, torch.float64]
INDEX = torch.arange(N, dtype=torch.float64)
PATH = sum(torch.diag(torch.ones(N - abs(i), dtype=torch.float64), i) for i in (-1, 1))
HOPELESS = {
    "64 equal top values": spectrum("64", lambda i: 1.0 if i <= 64 else 0.5 / i, N).matrix(),
    "64 equal top values above a plateau": spectrum("64", lambda i: 1.0 if i <= 64 else 1 - i / 400, N).matrix(),
    "Fiedler": (INDEX[:, None] - INDEX).abs(),
    "minus the Laplacian of a path": PATH - 2 * torch.eye(N, dtype=torch.float64),
}


class Writing(Spy):
    """A Spy that can be asked for all entries; ``written`` is what it answers."""

    written: Tensor | Exception
    num_written = 0

    def to_dense(self) -> Tensor:
        self.num_written += 1
        if isinstance(self.written, Exception):
            raise self.written
        return self.written


def writing(matrix: Tensor, written: Tensor | Exception | None = None) -> Writing:
    operator = Writing(matrix)
    operator.written = matrix if written is None else written
    return operator


@pytest.mark.slow
@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("name", HOPELESS)
def test_auto_never_takes_more_than_a_fifth_more_products_than_rows(name: str, k: int) -> None:
    spy = Spy(HOPELESS[name])
    pairs = eigsh(spy, k)
    check_solution(pairs, HOPELESS[name], k)
    assert sum(spy.widths) == pairs.cost.columns <= 1.2 * N
    if pairs.method.startswith("Dense"):
        assert pairs.method == "Dense(block_size=256) after Lanczos(block_size=8, max_basis=300)"
        assert pairs.completeness.method == "exhaustive"


@pytest.mark.parametrize("k", [5, 40])
@pytest.mark.parametrize("name", HOPELESS)
def test_auto_ends_a_search_by_writing_down_what_can_be(name: str, k: int) -> None:
    operator = writing(HOPELESS[name])
    pairs = eigsh(operator, k)
    check_solution(pairs, HOPELESS[name], k)
    assert pairs.cost.columns <= 1.2 * N
    assert pairs.cost.written_columns == N * operator.num_written
    assert operator.num_written == pairs.method.startswith("Dense")


def test_auto_keeps_to_the_products_that_it_was_given() -> None:
    for limit in (50, 120, 250):
        spy = Spy(HOPELESS["Fiedler"])
        with pytest.raises(NotConvergedError, match="max_products"):
            eigsh(spy, K, max_products=limit)
        assert sum(spy.widths) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", hard_spectra(120), ids=str)
def test_what_the_operator_writes_down_gives_the_pairs_of_its_products(spectrum: object, dtype: torch.dtype) -> None:
    B = spectrum.matrix(dtype)  # type: ignore[attr-defined]
    operator = writing(B)
    before = B.clone()
    pairs = eigsh(operator, K, solver=Dense())
    check_solution(pairs, B, K)
    assert torch.equal(B, before)
    assert (operator.num_written, pairs.cost.written_columns) == (1, 120)
    # What certifies it: a product for each of four groups in float32, and one in float64.
    assert sum(operator.widths) == pairs.cost.columns <= (4 if dtype is torch.float32 else 1)


def test_few_rows_of_a_network_take_hardly_a_product() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()), retain_graph=True)])
        for out in model(x).flatten()
    ]
    J = torch.stack(rows)
    pairs = eigsh(nl.ntk(model, x), K)
    check_solution(pairs, J @ J.mT, K)
    assert (pairs.cost.written_columns, pairs.cost.columns) == (32, 1)
    assert "32 columns written down" in str(pairs)
    refused = eigsh(nl.ntk(model, x, max_dense_bytes=100), K)
    check_solution(refused, J @ J.mT, K)
    assert (refused.cost.written_columns, refused.cost.columns) == (0, 33)


def test_only_what_writes_itself_down_in_a_way_of_its_own_is_asked_to() -> None:
    class ByProducts(LinearOperator):
        def _matmul(self, rhs: Tensor) -> Tensor:
            return self._args[0] @ rhs

        def _size(self) -> torch.Size:
            return self._args[0].shape

        def _transpose_nonbatch(self) -> LinearOperator:
            return self

    by_products = eigsh(ByProducts(A), K, solver=Dense())
    assert by_products.cost.columns == N + 2
    assert by_products.cost.written_columns == 0
    own = eigsh(DenseLinearOperator(A), K, solver=Dense())
    assert own.cost.written_columns == N
    assert torch.equal(own.values, by_products.values)


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        (1.001 * A, ArgumentError, "to_dense and the products of the operator disagree"),
        (A + 1e-3 * haar(N), ArgumentError, "not symmetric"),
        (A[:, :5], ShapeError, r"to_dense returned \(300, 5\)"),
        (A.float(), ShapeError, "float32"),
        (A * float("nan"), NonFiniteError, "to_dense"),
        (ZeroDivisionError("mine"), ZeroDivisionError, "mine"),
    ],
    ids=["another matrix", "not symmetric", "a part", "another dtype", "NaN", "an error"],
)
def test_what_is_written_down_wrongly_is_refused(
    written: Tensor | Exception, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        eigsh(writing(A, written), K, solver=Dense())


def test_a_matrix_that_has_no_room_is_found_by_products() -> None:
    no_room = BudgetError("no", requested_bytes=2, available_bytes=1)
    operator = writing(HOPELESS["Fiedler"], no_room)
    pairs = eigsh(operator, K)
    check_solution(pairs, HOPELESS["Fiedler"], K)
    assert operator.num_written == 1
    assert pairs.cost.columns <= 1.2 * N


@pytest.mark.parametrize("k", [1, 7, 59, 60])
@pytest.mark.parametrize("name", ["indefinite", "10 copies inside", "rank below k", "zero", "clusters of 1e-6"])
def test_matrices_too_large_for_one_driver_are_solved_by_another(
    name: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    B = next(s for s in hard_spectra(60) if s.name == name).matrix()
    exact = np.linalg.eigvalsh(B.numpy())
    monkeypatch.setattr("ntk_lazy.linalg.largest_pairs._MOST_ROWS", 59)
    kept = B.clone()
    theta, U, norm = largest_pairs(kept, k)
    assert torch.equal(kept, B)
    assert np.allclose(theta.numpy(), exact[::-1][:k], rtol=0, atol=60 * 2.3e-16 * np.abs(exact).max())
    rounding = 60 * 60 * torch.finfo(torch.float64).eps
    assert float((U.mT @ U - torch.eye(k)).abs().max()) <= rounding
    assert float((B @ U - U * theta).abs().max()) <= rounding
    assert 0.7 * np.abs(exact).max() <= norm <= (1 + 1e-12) * np.abs(exact).max()
    check_solution(eigsh(Spy(B), k, solver=Dense()), B, k)


def test_a_matrix_too_large_for_the_driver_that_is_there_is_refused_before_a_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ntk_lazy.linalg.largest_pairs._MOST_ROWS", N - 1)
    monkeypatch.setattr("ntk_lazy.linalg.largest_pairs.find_spec", lambda name: None)
    spy = Spy(A)
    with pytest.raises(ArgumentError, match=r"300 rows.*Install scipy, or use Lanczos\(\)"):
        eigsh(spy, K, solver=Dense())
    assert spy.widths == []
    check_solution(eigsh(spy, K, solver=Lanczos()), A, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["24 copies at the top", "exponential", "power 1", "power 2"])
def test_lobpcg_sees_where_only_rounding_is_left(name: str, dtype: torch.dtype) -> None:
    B = next(s for s in hard_spectra(120) if s.name == name).matrix(dtype)
    pairs = eigsh(Spy(B), 5, solver=LOBPCG(), rtol=1e-16, on_unconverged="return")
    assert pairs.status == "noise_floor"
    assert float(pairs.residual_norms.max()) <= pairs.noise_floor * pairs.norm
    exact = torch.linalg.eigvalsh(B.double()).flip(0)[:5]
    assert float((pairs.values - exact).abs().max()) <= pairs.noise_floor * pairs.norm


@pytest.mark.slow
def test_lobpcg_goes_on_while_each_digit_costs_what_the_last_did() -> None:
    B = spectrum("linear", lambda i: (N - i) / N, N).matrix()
    check_solution(eigsh(Spy(B), 5, solver=LOBPCG(), rtol=1e-12), B, 5, rtol=1e-12)
