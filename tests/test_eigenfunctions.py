"""Extensions, slices and spectra, against dense Jacobians by rows of autograd and a DFT written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import KnownPairs, normal
from oracle import defect, dense_jacobian, dense_kernel
from torch import nn

import ntk_lazy as nl
from ntk_lazy.alignment import principal_angles, relative_energy
from ntk_lazy.dynamics import information_flow, stability
from ntk_lazy.eigen import eigsh
from ntk_lazy.eigenfunctions import eigenfunctions, kernel_slice, radial_spectrum
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.estimate import frobenius_norm

EPS = torch.finfo(torch.float64).eps
C = 2
MODES = ["full", "trace", "sum", 1]


def _network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, C)).double()


@pytest.mark.parametrize("outputs", MODES)
def test_an_eigenfunction_equals_its_vector_on_the_probes_and_the_nystrom_formula_elsewhere(outputs):
    net, x, elsewhere = _network(), normal(12, 2, seed=0), normal(7, 2, seed=1)
    J, J_elsewhere = dense_jacobian(net, x), dense_jacobian(net, elsewhere)
    K = dense_kernel(J, J, C, outputs)
    pairs = KnownPairs.of(K, 8)
    functions = eigenfunctions(pairs, nl.ntk(net, x, outputs=outputs))
    amplification = pairs.values[0] / pairs.values[-1]
    assert defect(functions(x), pairs.vectors) <= 100 * EPS * amplification
    nystrom = dense_kernel(J_elsewhere, J, C, outputs) @ pairs.vectors / pairs.values
    assert defect(functions(elsewhere), nystrom) <= 100 * EPS * amplification
    assert functions(elsewhere).shape == (7 * (C if outputs == "full" else 1), 8)
    assert torch.equal(functions.values, pairs.values)


def test_extension_leaves_out_an_error_no_larger_than_the_relative_residual():
    net, x = _network(), normal(12, 2, seed=0)
    J = dense_jacobian(net, x)
    K = J @ J.mT
    exact = KnownPairs.of(K, 3)
    v = exact.vectors + 1e-3 * normal(24, 3, seed=1)
    v = torch.linalg.qr(v).Q
    values = (v * (K @ v)).sum(0)
    rough = KnownPairs(values, v, (K @ v - v * values).norm(dim=0), 1e-15)
    errors = (eigenfunctions(rough, nl.ntk(net, x))(x) - v).norm(dim=0)
    assert (errors <= rough.residual_norms / values * (1 + 1e-9) + 1e-12).all()


def test_float32_functions_agree_with_float64_ones():
    net, x, elsewhere = _network(), normal(40, 2, seed=0), normal(9, 2, seed=1)
    J = dense_jacobian(net, x)
    pairs = KnownPairs.of(J @ J.mT, 4)
    expected = eigenfunctions(pairs, nl.ntk(net, x))(elsewhere)
    single = KnownPairs(pairs.values, pairs.vectors.float(), pairs.residual_norms, 1e-6)
    found = eigenfunctions(single, nl.ntk(net.float(), x.float()))(elsewhere.float())
    assert found.dtype == torch.float32
    allowed = 50 * torch.finfo(torch.float32).eps * (pairs.values[0] / pairs.values[-1]).sqrt()
    assert defect(found, expected) <= allowed


def test_a_certified_float32_result_goes_through_every_measure():
    net, x = _network(), normal(150, 2, seed=0)
    J, y = dense_jacobian(net, x), normal(150, C, seed=1)
    dense = J @ J.mT
    K = nl.ntk(net.float(), x.float())
    pairs = eigsh(K, 6, seed=0)
    assert pairs.converged.all()
    eps = torch.finfo(torch.float32).eps
    relative = pairs.residual_norms / pairs.values
    errors = (eigenfunctions(pairs, K)(x.float()).double() - pairs.vectors.double()).norm(dim=0)
    assert (errors <= relative + 50 * eps * pairs.values[0] / pairs.values).all()
    exact = KnownPairs.of(dense, 6)
    allowed = 4 * float(pairs.bounds.space_angle) + 100 * eps
    assert abs(relative_energy(pairs, y)[-1] - relative_energy(exact, y)[-1]) <= allowed
    assert principal_angles(pairs, exact)[-1] <= allowed
    norm = frobenius_norm(K, pairs=pairs)
    assert abs(norm.value - dense.norm().item()) <= 4 * norm.standard_error
    flow, exact_flow = (
        information_flow(p, y, 0.1, kernel=A, num_examples=150) for p, A in [(pairs, K), (exact, dense)]
    )
    assert flow.loss_share[-1].item() == pytest.approx(exact_flow.loss_share[-1].item(), abs=allowed)
    assert flow.loss_decrease == pytest.approx(exact_flow.loss_decrease, rel=100 * eps)
    sharpness = stability(pairs, 0.1, num_examples=150)
    assert sharpness.value == pytest.approx(0.1 * exact.values[0].item() / 150, rel=1e-5)


def test_values_at_the_noise_floor_have_no_eigenfunction():
    net, x = _network(), normal(12, 2, seed=0)
    J = dense_jacobian(net, x)
    pairs = KnownPairs.of(J @ J.mT, 6)
    floor = float(pairs.values[4] / pairs.values[0])
    noisy = KnownPairs(pairs.values, pairs.vectors, pairs.residual_norms, floor)
    with pytest.raises(DegenerateError, match=r"first 4 of 6.*Solve for 4 pairs"):
        eigenfunctions(noisy, nl.ntk(net, x))


def test_pairs_of_other_parameters_or_other_points_are_refused():
    net, x = _network(), normal(12, 2, seed=0)
    J = dense_jacobian(net, x)
    pairs = KnownPairs.of(J @ J.mT, 4)
    with pytest.raises(ShapeError, match="24 rows and the kernel has 22"):
        eigenfunctions(pairs, nl.ntk(net, x[:11]))
    with pytest.raises(ArgumentError, match="another kernel"):
        eigenfunctions(pairs, nl.ntk(net, x.flip(0)))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    with pytest.raises(ArgumentError, match="parameters have changed"):
        eigenfunctions(pairs, nl.ntk(net, x))


def test_a_matrix_without_factors_is_refused():
    net, x = _network(), normal(12, 2, seed=0)
    K = nl.ntk(net, x).detach()
    pairs = eigsh(K, 3)
    for other in (K.to_dense(), K.add_jitter(1.0), K + K, K.to_dense().numpy(), None):
        with pytest.raises(ArgumentError, match=r"no factors.*NTKLinearOperator that ntk\(\) made"):
            eigenfunctions(pairs, other)
        with pytest.raises(ArgumentError, match=r"no factors.*NTKLinearOperator that ntk\(\) made"):
            kernel_slice(other, x[:1], x)
    assert eigenfunctions(pairs, K * 1.0)(x).shape == (24, 3)
    for other in (pairs.vectors, pairs.vectors.numpy()):
        with pytest.raises(ArgumentError, match="EigenResult that eigsh returned"):
            eigenfunctions(other, K)


@pytest.mark.parametrize("outputs", MODES)
def test_a_slice_is_a_column_of_the_kernel(outputs):
    net, x, elsewhere = _network(), normal(5, 2, seed=0), normal(7, 2, seed=1)
    K = nl.ntk(net, x, outputs=outputs)
    expected = dense_kernel(dense_jacobian(net, elsewhere), dense_jacobian(net, x[:1]), C, outputs)
    assert defect(kernel_slice(K, x[:1], elsewhere), expected) <= 1e-13
    two = dense_kernel(dense_jacobian(net, elsewhere), dense_jacobian(net, x[1:3]), C, outputs)
    assert defect(kernel_slice(K, x[1:3], elsewhere), two) <= 1e-13


def _grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    return torch.meshgrid(rows, columns, indexing="ij")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 24), (15, 40)])
def test_a_wave_is_found_at_its_frequency_in_cycles_per_width(height, width):
    i, j = _grid(height, width)
    for down, across in [(0, 3), (4, 0), (2, 5)]:
        wave = 2 * torch.cos(2 * math.pi * (down * i / height + across * j / width) + 0.3)
        expected = math.hypot(down * width / height, across)
        found = radial_spectrum(wave + 10)
        assert found.mean_frequency == pytest.approx(expected, rel=1e-12)
        assert found.power[round(expected)].item() == pytest.approx(2, rel=1e-12)
        assert found.power[0].item() == pytest.approx(100, rel=1e-12)
        assert found.constant_share == pytest.approx(100 / 102, rel=1e-12)


@given(height=st.integers(1, 7), width=st.integers(2, 7), seed=st.integers(0, 999), exponent=st.integers(-120, 120))
@settings(max_examples=30, deadline=None)
def test_spectra_follow_the_sum_written_out_and_hold_the_mean_square(height, width, seed, exponent):
    image = normal(height, width, seed=seed) * 10.0**exponent
    i, j = _grid(height, width)
    moment = total = 0.0
    for down in range(height):
        for across in range(width):
            if down == across == 0:
                continue
            phase = 2 * math.pi * (down * i / height + across * j / width)
            power = ((image / 10.0**exponent * torch.polar(torch.ones_like(phase), phase)).sum().abs() ** 2).item()
            signed = min(down, height - down) * width / height, min(across, width - across)
            moment, total = moment + math.hypot(*signed) * power, total + power
    found = radial_spectrum(image)
    assert found.mean_frequency == pytest.approx(moment / total, rel=1e-9)
    assert found.power.sum().item() == pytest.approx(image.square().mean().item(), rel=1e-9)
    assert found.constant_share == pytest.approx(image.mean().item() ** 2 / image.square().mean().item(), abs=1e-9)
    assert torch.equal(found.frequencies, torch.arange(len(found.power)).double())


def test_a_picture_without_frequencies_is_refused():
    for constant in (torch.zeros(4, 4), torch.full((5, 7), 0.1), torch.full((64, 64), 1 / 3, dtype=torch.float64)):
        with pytest.raises(DegenerateError, match="constant"):
            radial_spectrum(constant)
    with pytest.raises(ArgumentError, match=r"image is of type ndarray.*torch\.from_numpy"):
        radial_spectrum(normal(4, 4, seed=0).numpy())
    with pytest.raises(ShapeError, match=r"\(16,\)"):
        radial_spectrum(torch.ones(16))
    with pytest.raises(ShapeError, match=r"\(1, 1\)"):
        radial_spectrum(torch.ones(1, 1))
    with pytest.raises(NonFiniteError, match="image"):
        radial_spectrum(torch.full((3, 3), math.nan))


def test_the_wave_with_the_constant_counted_is_slower_by_the_share_of_the_constant():
    i, j = _grid(8, 8)
    found = radial_spectrum(1 + torch.cos(2 * math.pi * 3 * j / 8))
    assert found.mean_frequency * (1 - found.constant_share) == pytest.approx(3 * 0.5 / 1.5, rel=1e-12)
    assert i.shape == j.shape
