"""Steps, stability and flow, against gradient descent carried out with autograd and torch's own losses."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import KnownPairs, decaying, matrix, normal
from oracle import dense_jacobian
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.dynamics import (
    first_order_error,
    first_order_step,
    information_flow,
    loss_factor,
    stability,
)
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError

EPS = torch.finfo(torch.float64).eps
# What each reduction means, in torch's words.
LOSSES = {
    "half_mean": lambda f, y: (f - y).square().sum() / (2 * len(f)),
    "mean": nn.MSELoss(),
    "half_sum": lambda f, y: (f - y).square().sum() / 2,
    "sum": nn.MSELoss(reduction="sum"),
}


def _network(outputs: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, outputs)).double()


def _descend(net: nn.Module, x: Tensor, y: Tensor, reduction: str, lr: float) -> tuple[nn.Module, float]:
    """Take one step of gradient descent with autograd; return the new network and the squared gradient norm."""
    moved = copy.deepcopy(net)
    LOSSES[reduction](moved(x), y).backward()
    with torch.no_grad():
        for p in moved.parameters():
            p.sub_(lr * p.grad)
    return moved, sum(p.grad.square().sum().item() for p in moved.parameters())


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("C", [1, 3])
def test_the_factor_of_a_loss_is_what_autograd_finds(reduction, C):
    f, y = normal(5, C, seed=0).requires_grad_(), normal(5, C, seed=1)
    gradient = torch.autograd.grad(LOSSES[reduction](f, y), f)[0]
    factor = loss_factor(reduction, num_examples=5, num_outputs=C)
    assert (gradient - factor * (f - y)).abs().max() <= 10 * EPS * gradient.abs().max()


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize(("share_of_bound", "ends_below"), [(0.98, True), (1.02, False)])
def test_gradient_descent_on_a_linear_model_converges_exactly_below_the_bound(reduction, C, share_of_bound, ends_below):
    net, x = nn.Linear(4, C).double(), normal(8, 4, seed=0)
    J = dense_jacobian(net, x)
    largest = torch.linalg.eigvalsh(J @ J.mT)[-1].item()
    lr = 2.0 / (loss_factor(reduction, num_examples=8, num_outputs=C) * largest) * share_of_bound
    found = stability(largest, lr, num_examples=8, num_outputs=C, reduction=reduction)
    assert found.is_stable is ends_below
    assert found.value == pytest.approx(2 * share_of_bound, rel=1e-12)
    assert found.critical_eigenvalue * share_of_bound == pytest.approx(largest, rel=1e-12)
    y = net(x).detach() + J.matmul(normal(J.shape[1], seed=1)).reshape(8, C)  # within reach, so that the loss can be 0
    before = LOSSES[reduction](net(x), y).item()
    for _ in range(400):
        net, _ = _descend(net, x, y, reduction, lr)
    after = LOSSES[reduction](net(x), y).item()
    assert (after < before) is ends_below
    assert (after > 10 * before) is not ends_below


def test_pairs_and_their_largest_value_say_the_same_about_stability():
    pairs = KnownPairs.of(matrix(decaying("1/i", 12), seed=0), 3)
    for reduction in LOSSES:
        by_value = stability(float(pairs.values[0]), 0.1, num_examples=4, num_outputs=3, reduction=reduction)
        assert stability(pairs, 0.1, num_examples=4, reduction=reduction) == by_value
    paper = stability(1.6e4, 0.25, num_examples=2000)
    assert (paper.value, paper.bound, paper.critical_eigenvalue) == (2.0, 2.0, 16000.0)
    assert not paper.is_stable


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1.0, 0.1), {"num_examples": 10, "reduction": "mean"}, "num_outputs=C"),
        ((1.0, 0.1), {"num_examples": 10, "reduction": "batchmean"}, "half_mean, mean, half_sum, sum"),
        ((1.0, -0.1), {"num_examples": 10}, "positive"),
        ((1.0, math.nan), {"num_examples": 10}, "positive"),
        ((math.nan, 0.1), {"num_examples": 10}, "finite"),
        ((-1.0, 0.1), {"num_examples": 10}, "not negative"),
        ((1.0, 0.1), {"num_examples": 0}, "no terms"),
    ],
)
def test_stability_refuses_what_would_put_the_bound_in_the_wrong_place(arguments, options, words):
    with pytest.raises(ArgumentError, match=words):
        stability(*arguments, **options)


def test_stability_refuses_pairs_of_other_rows():
    with pytest.raises(ShapeError, match="12 rows are not 5 examples"):
        stability(KnownPairs.of(torch.eye(12), 1), 0.1, num_examples=5)


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("C", [1, 3])
def test_the_predicted_step_is_the_taken_one_up_to_second_order(reduction, C):
    net, x, y = _network(C), normal(10, 2, seed=0), normal(10, C, seed=1)
    elsewhere = normal(6, 2, seed=2)
    K = nl.ntk(net, x)
    errors = []
    for lr in (1e-3, 1e-4):
        moved, _ = _descend(net, x, y, reduction, lr)
        predicted = first_order_step(K, net(x) - y, lr, reduction=reduction)
        assert predicted.shape == (10, C)
        errors.append(first_order_error(moved(x) - net(x), predicted).error)
        off_the_points = first_order_step(K.at(elsewhere, x), net(x) - y, lr, reduction=reduction)
        assert off_the_points.shape == (6, C)
        assert first_order_error(moved(elsewhere) - net(elsewhere), off_the_points).error <= 3 * errors[-1]
    assert errors[0] <= 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_the_step_of_a_linear_model_is_predicted_exactly_in_every_shape():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
    x, y = normal(7, 3, seed=0), normal(7, 2, seed=1)
    moved, _ = _descend(net, x, y, "mean", 0.3)
    actual, residual, K = (moved(x) - net(x)).detach(), (net(x) - y).detach(), nl.ntk(net, x)
    J = dense_jacobian(net, x)
    for kernel, options in [(K, {}), (J @ J.mT, {"num_examples": 7})]:
        for shape in [(7, 2), (14,), (14, 1)]:
            step = first_order_step(kernel, residual.reshape(shape), 0.3, reduction="mean", **options)
            assert step.shape == shape
            assert (step.reshape(7, 2) - actual).abs().max() <= 100 * EPS * actual.abs().max()
    both = first_order_step(K, torch.stack([residual.reshape(14), 2 * residual.reshape(14)], 1), 1.0)
    assert both.shape == (14, 2)
    assert (both[:, 1] - 2 * both[:, 0]).abs().max() <= 10 * EPS * both.abs().max()


def test_a_dense_kernel_counts_examples_by_the_first_dimension_of_the_residual():
    K, m = matrix(decaying("1/i", 12), seed=0), normal(4, 3, seed=1)
    expected = -0.5 / 4 * (K @ m.reshape(12))
    assert (first_order_step(K, m, 0.5).reshape(12) - expected).abs().max() <= 10 * EPS
    assert (first_order_step(K, m.reshape(12), 0.5) * 3 - expected).abs().max() <= 10 * EPS


def test_a_step_needs_a_finite_residual_on_the_rows():
    K = torch.eye(6)
    with pytest.raises(ShapeError, match="6 rows"):
        first_order_step(K, torch.ones(5), 0.1)
    with pytest.raises(ShapeError, match="not 4 examples"):
        first_order_step(K, torch.ones(6), 0.1, num_examples=4)
    with pytest.raises(NonFiniteError, match="residual"):
        first_order_step(K, torch.full((6,), math.nan), 0.1)
    with pytest.raises(NonFiniteError, match="operator returned"):
        first_order_step(K * 1e38, torch.full((6,), 1e3), 1.0)
    with pytest.raises(ShapeError, match="batch"):
        first_order_step(torch.ones(2, 6, 6), torch.ones(6), 0.1)


@given(n=st.integers(1, 20), seed=st.integers(0, 999), exponent=st.integers(-150, 150))
@settings(max_examples=40, deadline=None)
def test_the_error_of_a_prediction_follows_its_triangle_at_any_scale(n, seed, exponent):
    actual, predicted = normal(n, seed=seed), normal(n, seed=seed + 1)
    found = first_order_error(actual * 10.0**exponent, predicted * 10.0**exponent)
    assert found.error == pytest.approx(((actual - predicted).norm() / actual.norm()).item(), rel=1e-12)
    assert found.norm_ratio == pytest.approx((predicted.norm() / actual.norm()).item(), rel=1e-12)
    law_of_cosines = 1 + found.norm_ratio**2 - 2 * found.norm_ratio * found.cosine
    assert found.error**2 == pytest.approx(law_of_cosines, abs=1e-10 * (1 + found.norm_ratio**2))
    assert first_order_error(actual, actual).cosine == pytest.approx(1, abs=10 * EPS)
    assert first_order_error(actual, -2 * actual).error == pytest.approx(3, rel=1e-14)


def test_an_array_is_refused_by_name_and_torch_from_numpy_is_the_cure():
    K, m = torch.eye(6), torch.ones(6)
    pairs = KnownPairs.of(K, 2)
    wrong = [
        ("residual", lambda: first_order_step(K, m.numpy(), 0.1)),
        ("K", lambda: first_order_step(K.numpy(), m, 0.1)),
        ("actual", lambda: first_order_error(m.numpy(), m)),
        ("predicted", lambda: first_order_error(m, m.numpy())),
        ("residual", lambda: information_flow(pairs, m.numpy(), 0.1, kernel=K)),
        ("kernel", lambda: information_flow(pairs, m, 0.1, kernel=K.numpy())),
    ]
    for name, measure in wrong:
        with pytest.raises(ArgumentError, match=rf"^{name} is of type ndarray, and .* torch\.from_numpy"):
            measure()


@pytest.mark.parametrize("wrong", [torch.ones(6, 2), np.ones(2), [1.0], None], ids=["tensor", "array", "list", "None"])
def test_what_are_no_pairs_is_refused(wrong):
    with pytest.raises(ArgumentError, match="EigenResult that eigsh returned"):
        information_flow(wrong, torch.ones(6), 0.1, kernel=torch.eye(6))
    with pytest.raises(ArgumentError, match="EigenResult that eigsh returned"):
        stability(wrong, 0.1, num_examples=6)


def test_a_change_of_nothing_has_no_error():
    with pytest.raises(DegenerateError, match="zero everywhere"):
        first_order_error(torch.zeros(3), torch.ones(3))
    with pytest.raises(DegenerateError, match="zero everywhere"):
        first_order_error(torch.ones(3), torch.zeros(3))
    with pytest.raises(ShapeError, match="3 entries and predicted 4"):
        first_order_error(torch.ones(3), torch.ones(4))
    with pytest.raises(NonFiniteError, match="actual"):
        first_order_error(torch.full((3,), math.nan), torch.ones(3))


@pytest.mark.parametrize("reduction", LOSSES)
@pytest.mark.parametrize("C", [1, 2])
def test_flow_over_all_modes_is_the_step_and_the_decrease_of_the_loss(reduction, C):
    net, x, y, lr = _network(C), normal(9, 2, seed=0), normal(9, C, seed=1), 1e-2
    K, J = nl.ntk(net, x), dense_jacobian(net, x)
    pairs, m = KnownPairs.of(J @ J.mT, 9 * C), (net(x) - y).detach()
    flow = information_flow(pairs, m, lr, kernel=K, reduction=reduction)
    step = first_order_step(K, m, lr, reduction=reduction).reshape(-1)
    assert (pairs.vectors @ flow.coefficients - m.reshape(-1)).abs().max() <= 1e-13
    assert (pairs.vectors @ flow.steps - step).abs().max() <= 1e-12 * step.abs().max()
    _, squared_norm = _descend(net, x, y, reduction, lr)
    assert flow.loss_decrease == pytest.approx(lr * squared_norm, rel=1e-10)
    lambda_c2 = pairs.values * flow.coefficients**2
    assert (flow.loss_share - lambda_c2.cumsum(0) / lambda_c2.sum()).abs().max() <= 1e-10
    moved = flow.steps**2
    assert (flow.motion_share - moved.cumsum(0) / moved.sum()).abs().max() <= 1e-10
    assert flow.loss_share[-1].item() == pytest.approx(1, abs=1e-10)
    assert flow.motion_share[-1].item() == pytest.approx(1, abs=1e-10)


def test_speed_is_what_one_step_removes_of_a_residual_along_its_vector():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 1).double()
    x = normal(10, 3, seed=0)
    J = dense_jacobian(net, x)
    pairs = KnownPairs.of(J @ J.mT, 4)  # the rank of J
    lr = 10 * 2.4 / pairs.values[0].item()  # the first mode grows, others shrink
    flow = information_flow(pairs, torch.ones(10), lr, kernel=nl.ntk(net, x))
    assert flow.speeds[0] < 0 < flow.speeds[-1]
    for i in range(4):
        v = pairs.vectors[:, i : i + 1]
        moved, _ = _descend(net, x, (net(x) - v).detach(), "half_mean", lr)
        after = (moved(x) - net(x) + v).norm().item()
        assert 1 - after == pytest.approx(flow.speeds[i].item(), abs=1e-12)


@given(n=st.integers(2, 25), c=st.integers(1, 3), share=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_shares_lie_between_0_and_1_never_fall_and_are_blind_to_the_scale_of_the_residual(n, c, share, seed):
    K, m = matrix(decaying("1/i", n), seed=seed), normal(n, c, seed=seed + 1)
    pairs = KnownPairs.of(K, 1 + int(share * (n - 1)))
    flow = information_flow(pairs, m, 0.1, kernel=K)
    tiny = information_flow(pairs, 1e-120 * m, 0.1, kernel=K)
    for name in ("loss_share", "motion_share"):
        shares = getattr(flow, name)
        assert (shares >= 0).all()
        assert (shares <= 1).all()
        assert (shares.diff() >= 0).all()
        assert (shares - getattr(tiny, name)).abs().max() <= 1e-12
    assert flow.coefficients.shape == ((len(pairs.values),) if c == 1 else (len(pairs.values), c))
    assert (tiny.steps - 1e-120 * flow.steps).abs().max() <= 1e-130


def test_flow_refuses_pairs_of_another_kernel_and_residuals_that_do_not_move():
    K = matrix(decaying("1/i", 20), seed=0)
    pairs = KnownPairs.of(K, 5)
    with pytest.raises(ArgumentError, match="for this kernel"):
        information_flow(pairs, pairs.vectors[:, 0], 0.1, kernel=0.5 * K)
    with pytest.raises(DegenerateError, match="residual is zero"):
        information_flow(pairs, torch.zeros(20), 0.1, kernel=K)
    with pytest.raises(DegenerateError, match="moves nothing"):
        information_flow(pairs, torch.ones(20), 0.1, kernel=0 * K)
    with pytest.raises(ShapeError, match="20 rows and the kernel has 19"):
        information_flow(pairs, torch.ones(20), 0.1, kernel=K[:19, :19])
