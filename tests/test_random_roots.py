"""Randomised roots of K, from a product or from its columns, are as good as the spectrum allows."""

from __future__ import annotations

import pytest
import torch
from known_spectra import decaying, matrix, normal
from torch import Generator, Tensor

from ntk_lazy.linalg.nystrom import extended_root, nystrom_root
from ntk_lazy.linalg.random_pivots import pivoted_root

N = 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nystrom_root_leaves_what_its_spectrum_says(dtype: torch.dtype):
    K = matrix(decaying("1/i^2", N), seed=20, dtype=dtype)
    L = nystrom_root(lambda V: K @ V, K.shape, 20, dtype=dtype, device=K.device)
    rest = torch.linalg.eigvalsh(K.double() - L.double() @ L.double().mT)
    assert rest.min() > -1e3 * torch.finfo(dtype).eps  # below K
    assert rest.max() < 10 * 11**-2.0
    gram = L.double().mT @ L.double()
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-5
    assert torch.equal(L, nystrom_root(lambda V: K @ V, K.shape, 20, dtype=dtype, device=K.device))


def test_a_nystrom_root_in_float32_knows_what_products_know():
    n, values = 1000, torch.logspace(0, -6, 30, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(n, 30, generator=Generator().manual_seed(3), dtype=torch.float64))[0]
    K = (U * values) @ U.mT
    single = K.float()
    L = nystrom_root(lambda V: single @ V, K.shape, 60, dtype=torch.float32, device=K.device).double()
    # Of 60 columns among 1,000 what products are off by counts 17 times. A shift by √n eps ‖Y‖ leaves 600 eps.
    assert torch.linalg.matrix_norm(K - L @ L.mT, 2) < 40 * torch.finfo(torch.float32).eps


def test_a_nystrom_root_has_orthogonal_columns_over_many_decades():
    n, values = 300, torch.logspace(0, -10, 40, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(n, 40, generator=Generator().manual_seed(3), dtype=torch.float64))[0]
    K = (U * values) @ U.mT
    L = nystrom_root(lambda V: K @ V, K.shape, 50, dtype=torch.float64, device=K.device)[:, :40]
    Q = L / L.norm(dim=0)
    assert (L.norm(dim=0).square() / values - 1).abs().max() < 1e-3
    assert (Q.mT @ Q - torch.eye(40)).abs().max() < 1e-12


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_a_nystrom_root_of_nothing_ends(fill: float):
    K = torch.full((N, N), fill, dtype=torch.float64)
    L = nystrom_root(lambda V: K @ V, K.shape, 10, dtype=K.dtype, device=K.device)
    assert (L.abs() < 1e-60).all() if fill == 0 else not L.isfinite().any()


def test_a_nystrom_root_of_a_small_rank_matrix_is_exact():
    U = normal(N, 5, seed=5)
    K = U @ U.mT
    L = nystrom_root(lambda V: K @ V, K.shape, 12, dtype=K.dtype, device=K.device)
    assert (L @ L.mT - K).norm() < 1e-6 * K.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nystrom_root_grows_by_the_columns_it_is_asked_for(dtype: torch.dtype):
    K, widths = matrix(decaying("1/i^2", N), seed=20, dtype=dtype), []

    def matmul(V: torch.Tensor) -> torch.Tensor:
        widths.append(V.shape[-1])
        return K @ V

    L = nystrom_root(matmul, K.shape, 10, dtype=dtype, device=K.device)
    for rank in (20, 30):
        L = extended_root(matmul, L, rank)
    assert widths == [10, 10, 10]
    assert L.shape == (K.shape[0], 30)
    rest = torch.linalg.eigvalsh(K.double() - L.double() @ L.double().mT)
    assert rest.min() > -1e3 * torch.finfo(dtype).eps
    at_once = nystrom_root(matmul, K.shape, 30, dtype=dtype, device=K.device).double()
    assert rest.max() < 2 * torch.linalg.eigvalsh(K.double() - at_once @ at_once.mT).max()
    gram = L.double().mT @ L.double()
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-5
    assert (gram.diagonal().diff() <= 0).all()


def test_a_nystrom_root_that_says_all_grows_by_nothing():
    U = normal(N, 5, seed=5)
    K = U @ U.mT
    L = extended_root(lambda V: K @ V, nystrom_root(lambda V: K @ V, K.shape, 12, dtype=K.dtype, device=K.device), 20)
    assert (L @ L.mT - K).norm() < 1e-6 * K.norm()


def test_a_nystrom_root_that_grows_by_what_is_no_number_is_none():
    root = torch.eye(N, 4, dtype=torch.float64)
    assert extended_root(lambda V: V * torch.nan, root, 8).isnan().all()


def of_columns(K: Tensor, rank: int) -> Tensor:
    return pivoted_root(lambda which: K[:, which], K.diagonal(), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", ["1/i", "1/i^2", "0.7^i", "one dominates"])
def test_a_root_of_columns_leaves_no_more_than_one_of_products(decay: str, dtype: torch.dtype):
    K, rank = matrix(decaying(decay, 300), seed=3, dtype=dtype), 40
    L = of_columns(K, rank)
    assert L.shape == (300, rank)
    assert L.dtype == dtype
    size, eps = float(K.double().norm()), torch.finfo(dtype).eps
    rest = torch.linalg.eigvalsh(K.double() - L.double() @ L.double().mT)
    assert rest.min() > -30 * eps * size  # below K
    other = nystrom_root(lambda V: K @ V, K.shape, rank, dtype=dtype, device=K.device).double()
    assert rest.max() <= torch.linalg.eigvalsh(K.double() - other @ other.mT).max() + 30 * eps * size
    gram = L.double().mT @ L.double()
    lengths = gram.diagonal().sqrt()
    assert (gram - gram.diagonal().diag()).abs().max() < 10 * eps * lengths[0] ** 2
    assert (lengths.diff() <= eps * lengths[0]).all()
    assert torch.equal(L, of_columns(K, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_root_of_columns_finds_the_few_that_are_unlike_the_others(dtype: torch.dtype):
    # One point in a hundred has a hundred times the length and a direction of its own: what is drawn evenly misses it.
    n = 2000
    J = normal(n, 5, seed=1) @ normal(5, 60, seed=2) / 60**0.5
    J[::100] = 100 * normal(n // 100, 60, seed=3)
    K = (J @ J.mT).to(dtype)
    L = of_columns(K, 30).double()
    rest = K.double() - L @ L.mT
    assert rest.norm() < 1000 * torch.finfo(dtype).eps * K.double().norm()
    assert rest.diagonal().max() < 1000 * torch.finfo(dtype).eps * K.diagonal().max()


@pytest.mark.parametrize("rank", [1, 3, 50, N, 2 * N])
def test_a_root_of_columns_has_as_many_as_were_asked_for(rank: int):
    K = matrix(decaying("0.7^i", N), seed=3)
    L = of_columns(K, rank)
    assert L.shape == (N, min(rank, N))
    left = torch.linalg.matrix_norm(K - L @ L.mT, 2)
    assert left < 3 * 0.7 ** (rank + 1) + 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_root_of_columns_of_a_small_rank_matrix_is_exact_and_ends_with_zeros(dtype: torch.dtype):
    U = normal(N, 5, seed=5)
    K = (U @ U.mT).to(dtype)
    asked = []

    def columns(which: Tensor) -> Tensor:
        asked.append(which)
        return K[:, which]

    L = pivoted_root(columns, K.diagonal(), 30).double()
    assert torch.linalg.matrix_norm(K.double() - L @ L.mT) < 100 * torch.finfo(dtype).eps * K.norm()
    assert (L[:, 6:].norm(dim=0) <= 3 * torch.finfo(dtype).eps ** 0.5 * L[:, 0].norm()).all()
    pivots = torch.cat(asked)
    assert len(pivots.unique()) == len(pivots)  # none twice


def test_a_root_of_columns_changes_nothing_it_was_given():
    K = matrix(decaying("1/i", N), seed=3)
    before = K.clone()
    of_columns(K, 20)
    assert torch.equal(K, before)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_root_of_columns_knows_no_unit(unit: float):
    K = matrix(decaying("1/i^2", N), seed=3, dtype=torch.float32)
    L = of_columns(K * unit, 20).double()
    assert torch.linalg.matrix_norm(K.double() - L @ L.mT / unit, 2) < 3 * 21**-2.0


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_a_root_of_columns_of_nothing_ends(fill: float):
    K = torch.full((N, N), fill, dtype=torch.float64)
    L = of_columns(K, 10)
    assert L.shape == (N, 10)
    assert (L == 0).all() if fill == 0 else not L.isfinite().any()


def test_a_root_of_columns_that_are_no_numbers_is_none():
    K = matrix(decaying("1/i", N), seed=3)
    diagonal = K.diagonal().clone()
    K[0, 1:] = K[1:, 0] = torch.nan
    assert not pivoted_root(lambda which: K[:, which], diagonal, 20).isfinite().any()
