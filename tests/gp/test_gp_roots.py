"""Roots have what a matrix has, however often its eigenvalues repeat; samples have its covariance."""

from __future__ import annotations

import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from linear_operator import settings
from linear_operator.operators import DenseLinearOperator
from linear_operator.utils.warnings import NumericalWarning
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.gp import big_data
from ntk_lazy.gp.predictive_covariance import PredictiveCovariance
from ntk_lazy.linalg.krylov import krylov_bases
from ntk_lazy.operator.cholesky import cholesky_factor
from ntk_lazy.operator.shifted_root import shifted_root

N = 60


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(draw(len(values), len(values), seed=7))[0]
    return Q @ values.diag() @ Q.mT


def small() -> nn.Module:
    """Of 26 parameters, so that K with 60 rows is singular."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


SPECTRA = {
    "repeated": torch.tensor([4.0] * 3 + [1.0] * 9).double(),
    "one value": torch.ones(12).double(),
    "shifted": torch.cat([2.0 ** -torch.arange(6).double(), torch.zeros(6).double()]) + 1e-3,
    "low rank": torch.cat([2.0 ** -torch.arange(5).double(), torch.zeros(7).double()]),
    "zero": torch.zeros(12).double(),
}


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_krylov_basis_is_complete(spectrum: str, unit: float):
    A = unit * with_values(SPECTRA[spectrum])
    starts = torch.stack([draw(12, 2), draw(12, 2, seed=2)])  # two matrices, two starts for each
    both = torch.stack([A, 2 * A])
    Q, T = krylov_bases(lambda V: both @ V, starts, 20)
    rank = int((SPECTRA[spectrum] > 0).sum())
    # One more vector than the rank shows that nothing is left.
    assert Q.shape[-2] <= min(12, rank + 2)
    restored = Q.mT @ T @ Q
    assert (restored - both.unsqueeze(1)).abs().max() <= 1e-12 * unit
    lengths = Q @ Q.mT
    assert (lengths - torch.diag_embed(lengths.diagonal(dim1=-2, dim2=-1).round())).abs().max() < 1e-13


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_a_singular_matrix_is_factorised_in_its_own_units(unit: float):
    J = draw(2, 12, 5)
    A = J @ J.mT * torch.tensor([1.0, 1e3]).double()[:, None, None]
    with pytest.warns(NumericalWarning, match="added jitter"):
        L = cholesky_factor(A * unit)
    # The first jitter is 1e-8 of a power of four near the mean of the diagonal: at most twice that mean.
    least = 2 * 1e-8 * A.diagonal(dim1=-2, dim2=-1).mean(-1)
    assert bool(((L @ L.mT / unit - A).abs().amax((-2, -1)) < 1.01 * least).all())


@pytest.mark.parametrize("is_constant", [True, False])
def test_a_shifted_root_is_one_and_has_its_gradient(*, is_constant: bool):
    Q = torch.linalg.qr(draw(7, 7))[0]
    # Two values are equal, and one is zero.
    L = (Q[:, :4] * torch.tensor([2.0, 1.0, 1.0, 0.0]).double()).requires_grad_()
    d = (torch.full((7,), 0.3).double() if is_constant else 0.1 + draw(7, seed=3).abs()).requires_grad_()
    R = shifted_root(L, d).to_dense()
    assert defect((R @ R.mT).detach(), (L @ L.mT + d.diag()).detach()) < 1e-12
    assert torch.autograd.gradcheck(lambda L, d: shifted_root(L, d).to_dense(), (L, d))


def test_appended_rows_have_the_roots_of_the_whole():
    J = torch.cat([dense_jacobian(small(), draw(N, 3)), draw(2, 26, seed=9)])
    whole = J @ J.mT + 0.01 * torch.eye(N + 2).double()
    for unit in (1e-12, 1.0):
        A = (nl.ntk(small(), draw(N, 3)).detach() * unit).add_diagonal(torch.tensor(0.01 * unit, dtype=torch.float64))
        with settings.max_cholesky_size(0), torch.no_grad():
            joined = A.cat_rows(whole[N:, :N] * unit, whole[N:, N:] * unit)
            root, inverse = (f().root.to_dense() for f in (joined.root_decomposition, joined.root_inv_decomposition))
        assert defect(root @ root.mT / unit, whole) < 1e-9
        assert defect(inverse @ inverse.mT * unit, whole.inverse()) < 1e-9


def test_samples_of_a_kernel_are_random_weights_times_j(monkeypatch: pytest.MonkeyPatch):
    J = dense_jacobian(small(), draw(N, 3))
    K = nl.ntk(small(), draw(N, 3), max_dense_bytes=1).detach() * torch.tensor(0.25, requires_grad=True)
    randn = torch.randn

    def units(*shape: int, **options: object) -> Tensor:
        return torch.eye(26, dtype=torch.float64) if shape == (26, 26) else randn(*shape, **options)

    # With unit vectors in the place of random weights all of the covariance is seen.
    monkeypatch.setattr(torch, "randn", units)
    with settings.max_cholesky_size(0):
        S = K.zero_mean_mvn_samples(26)
    assert S.shape == (26, N)
    assert S.requires_grad
    assert defect((S.mT @ S).detach(), 0.25 * J @ J.mT) < 1e-12


def test_samples_with_noise_have_the_variance_of_both():
    J = dense_jacobian(small(), draw(N, 3))
    exact = J.square().sum(1) + 0.5
    K = nl.ntk(small(), draw(N, 3), max_dense_bytes=1).detach()
    torch.manual_seed(0)
    with big_data(variance_rank=5):
        S = K.add_diagonal(torch.tensor(0.5, dtype=torch.float64)).zero_mean_mvn_samples(2000)
    # Variances of 2,000 samples are off by 3 % in the mean; the worst of 60 by less than five times that.
    assert bool(((S.var(0) / exact - 1).abs() < 0.16).all())


def test_test_points_that_are_not_written_down_are_sampled_by_their_parts():
    J = dense_jacobian(small(), draw(N, 3))
    kernel = nl.ntk(small(), draw(N, 3), max_dense_bytes=1).detach()
    likelihood = GaussianLikelihood().double()
    noisy, again = (likelihood(MultivariateNormal(draw(N), PredictiveCovariance.of(kernel))) for _ in range(2))
    noise = noisy.lazy_covariance_matrix.diagonal().detach() - J.square().sum(1)
    torch.manual_seed(0)
    with big_data(variance_rank=30), torch.no_grad():
        # K has a rank of 26: nothing is missing.
        S = noisy.sample(torch.Size([2000]))
        B = noisy.sample(base_samples=torch.eye(N).double()) - noisy.mean
    assert bool((S.var(0) / (J.square().sum(1) + noise) - 1).abs().max() < 0.16)
    assert defect(B.mT @ B, J @ J.mT + noise.diag()) < 1e-9
    with big_data(variance_rank=3), torch.no_grad(), pytest.warns(NumericalWarning, match="3 columns has"):
        again.sample(base_samples=torch.eye(N).double())


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_a_singular_covariance_is_sampled_without_a_jitter(unit: float):
    R = draw(6, 3)
    covariance = PredictiveCovariance.of(DenseLinearOperator(unit * R @ R.mT))
    root = covariance.root_decomposition().root.to_dense()
    assert defect(root @ root.mT, unit * R @ R.mT) < 1e-12
    indefinite = PredictiveCovariance.of(DenseLinearOperator(unit * (R @ R.mT - torch.eye(6).double())))
    with pytest.warns(NumericalWarning, match="samples take it for zero"):
        indefinite.root_decomposition()


def test_a_root_of_more_columns_than_test_points_makes_a_square_one():
    R = draw(5, 26)
    covariance = PredictiveCovariance.of(DenseLinearOperator(R @ R.mT))
    assert covariance.root_decomposition().root.shape == (5, 5)
    with settings.max_cholesky_size(0):
        lower = covariance[:3, :3].root_decomposition().root.to_dense()
        X = covariance.solve(draw(5, 2))
    assert defect(lower @ lower.mT, (R @ R.mT)[:3, :3]) < 1e-12
    assert defect(R @ R.mT @ X, draw(5, 2)) < 1e-9
