"""What float32 loses in long sums stays below what eigenpairs a million times smaller than the largest can bear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.engines.written import WrittenKernel

EPS = torch.finfo(torch.float32).eps


def network() -> tuple[nn.Module, Tensor]:
    """Make a network as torch does (one gradient shared by all examples dominates), with 700 points."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), torch.rand(
        700, 2
    ) * 2 - 1


@pytest.mark.parametrize("engine", ["autodiff", "factors", "gram"])
def test_products_within_a_series_keep_small_eigenvectors_clean(engine: str):
    module, x = network()
    K = nl.ntk(module, x, engine=engine)
    exact = nl.ntk(copy.deepcopy(module).double(), x.double(), engine="autodiff").to_dense().detach()
    values, vectors = torch.linalg.eigh(exact)
    small = (values > 1e-6 * values[-1]) & (values < 1e-4 * values[-1])
    assert small.sum() > 5
    v = vectors[:, small].float()
    with K.linearised(100):
        error = (K @ v).detach().double() - exact @ v.double()
    # A plain sum of 700 terms in float32 is off by eps lambda_1 / 5; activations in float32 move J itself by eps.
    assert float(error.norm(dim=0).max()) < 0.05 * EPS * float(values[-1])


@pytest.mark.parametrize("n", [65, 1500])
def test_taking_the_largest_pairs_out_changes_nothing_but_rounding(n: int):
    torch.manual_seed(n)
    Q, _ = torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64) + 1)
    K = ((Q * torch.logspace(0, -6, 40, dtype=torch.float64)) @ Q.mT).float()
    written, plain = WrittenKernel.of_symmetric(K.clone()), WrittenKernel.plain(K)
    V = Q[:, [0, 10, 25, 39]].float()
    exact = K.double() @ V.double()
    errors = [(w.matmul(V).double() - exact).norm(dim=0) for w in (written, plain)]
    assert float(errors[0][1:].max()) < EPS * float(K.double().norm()) / n**0.5
    assert written.rest.norm() < 0.03 * K.norm()  # sigma_17 is 0.004
    assert float((written.rest.double() + (written.U * written.s) @ written.U.mT - K).abs().max()) < EPS * 1e-2
    # An infinity in K must come out of a product, and not be lost on the way.
    K[3, 5] = K[5, 3] = torch.inf
    assert not WrittenKernel.of_symmetric(K).matmul(V).isfinite().all()


@pytest.mark.parametrize("engine", ["factors", "gram"])
def test_eigenpairs_down_to_a_millionth_are_certified(engine: str):
    module, x = network()
    K = nl.ntk(module, x, engine=engine)
    exact = nl.ntk(copy.deepcopy(module).double(), x.double(), engine="autodiff").to_dense().detach()
    values = torch.linalg.eigvalsh(exact).flip(0)
    k = int((values > 4e-6 * values[0]).sum())
    pairs = nl.eigsh(K, k)
    true = (exact @ pairs.vectors.double() - pairs.vectors.double() * pairs.values).norm(dim=0)
    assert pairs.status == "converged"
    assert bool((true < 2 * pairs.residual_norms + 1e-3 * pairs.values).all())
    assert bool(((pairs.values - values[:k]).abs() < 1e-3 * values[:k]).all())


@pytest.mark.parametrize("engine", ["factors", "gram", "auto"])
def test_a_series_of_products_goes_through_the_model_once(engine: str):
    module, x = network()
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    K = nl.ntk(module, x, engine=engine)
    V = torch.randn(700, 3)
    with K.linearised(300):
        first = K @ V
        before = len(calls)
        again = K @ V
        assert len(calls) == before
    assert torch.equal(first, again)
    K @ V
    assert len(calls) > before


@pytest.mark.parametrize("engine", ["autodiff", "factors", "gram", "auto"])
def test_points_that_come_and_go_within_a_series_are_not_taken_for_each_other(engine: str):
    torch.manual_seed(0)
    # Of the convolution rows of J are held, which do not hold the points.
    module = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(124, 1))
    sets = [torch.randn(300, 1, 64) for _ in range(4)]
    K, V = nl.ntk(module, sets[0], engine=engine).detach(), torch.randn(300, 2)
    expected = [nl.ntk(module, points, engine="autodiff").detach() @ V for points in sets]
    with K.linearised(1000):
        for points, exact in zip(sets, expected, strict=True):
            # Memory that one set of points gives back is where the next one lies.
            passing = points.clone()
            found = K.at(passing) @ V
            del passing
            assert float((found - exact).norm()) < 1e-4 * float(exact.norm())
