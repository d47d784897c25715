"""Energies, alignments, positions, angles and distances, against dense formulas, theorems and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import DECAYS, KnownPairs, basis, decaying, matrix, normal
from oracle import dense_jacobian
from torch import nn

import ntk_lazy as nl
from ntk_lazy.alignment import (
    kernel_distance,
    kernel_target_alignment,
    principal_angles,
    relative_energy,
    spectral_position,
    subspace_overlap,
)
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.estimate import Estimate

EPS = torch.finfo(torch.float64).eps
sizes = st.integers(2, 40)
seeds = st.integers(0, 10_000)


@given(n=sizes, share=st.floats(0, 1), c=st.integers(1, 3), seed=seeds, exponent=st.integers(-150, 150))
@settings(max_examples=60, deadline=None)
def test_energies_lie_between_0_and_1_never_fall_and_follow_the_formula_at_any_scale(n, share, c, seed, exponent):
    k = 1 + int(share * (n - 1))
    V, phi = basis(n, k, seed=seed), normal(n, c, seed=seed + 1)
    energy = relative_energy(V, phi * 10.0**exponent)
    parts = [sum((V[:, i] @ phi[:, j]).item() ** 2 for j in range(c)) for i in range(k)]
    expected = np.cumsum(parts) / phi.square().sum().item()
    assert energy.dtype == torch.float64
    assert energy.shape == (k,)
    assert (energy >= 0).all()
    assert (energy <= 1).all()
    assert (energy.diff() >= 0).all()
    assert np.abs(energy.numpy() - expected).max() <= 10 * n * EPS


@given(n=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_all_vectors_together_hold_all_of_the_energy(n, seed):
    assert relative_energy(basis(n, n, seed=seed), normal(n, seed=seed + 1))[-1].item() == pytest.approx(
        1, abs=10 * n * EPS
    )


@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_a_rotation_inside_a_repeated_eigenvalue_leaves_the_energy_at_the_end_of_the_group(groups, seed):
    k, n = sum(groups), sum(groups) + 5
    V, phi = basis(n, k, seed=seed), normal(n, seed=seed + 1)
    rotation = torch.block_diag(*[basis(size, size, seed=seed + 2 + i) for i, size in enumerate(groups)])
    ends = torch.tensor(groups).cumsum(0) - 1
    change = relative_energy(V, phi)[ends] - relative_energy(V @ rotation, phi)[ends]
    assert change.abs().max() <= 10 * n * EPS


def test_an_eigenvector_has_all_of_its_energy_at_its_own_place():
    V = basis(50, 10, seed=0)
    expected = torch.tensor([0.0] * 6 + [1.0] * 4, dtype=torch.float64)
    assert (relative_energy(V, -3 * V[:, 6]) - expected).abs().max() <= 50 * EPS


def test_a_target_of_shape_n_c_is_read_with_row_i_times_c_plus_output():
    N, C = 7, 3
    V, Y = basis(N * C, 5, seed=0), normal(N, C, seed=1)
    rows = torch.zeros(N * C, dtype=torch.float64)
    for i in range(N):
        for c in range(C):
            rows[i * C + c] = Y[i, c]
    assert torch.equal(relative_energy(V, Y), relative_energy(V, rows))


def test_energy_of_a_random_function_follows_the_beta_law():
    N, k, draws = 400, 40, 300
    V = basis(N, k, seed=0)
    energies = torch.stack([relative_energy(V, normal(N, seed=1 + s))[-1] for s in range(draws)])
    variance = 2 * k * (N - k) / N**3
    assert ((energies - k / N).abs() <= 4 * math.sqrt(variance)).all()
    assert abs(energies.mean().item() - k / N) <= 4 * math.sqrt(variance / draws)
    # The variance of a sample variance is about 2/draws of its square.
    assert energies.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / draws))


def test_float32_vectors_give_float64_energies_to_their_own_rounding():
    V, phi = basis(3000, 50, seed=0), normal(3000, seed=1)
    defect = relative_energy(V.float(), phi.float()) - relative_energy(V, phi)
    assert defect.abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("phi", "error", "words"),
    [
        (torch.zeros(20), DegenerateError, "zero"),
        (torch.full((20,), math.nan), NonFiniteError, "row 0"),
        (torch.tensor([1.0] * 19 + [math.inf]), NonFiniteError, "row 19"),
        (torch.ones(19), ShapeError, r"i \* C \+ c"),
        (torch.ones(20, 2, 2), ShapeError, r"\(20, 2, 2\)"),
        (torch.ones(0), ShapeError, "20 rows"),
    ],
    ids=["zero", "nan", "inf", "short", "three dimensions", "empty"],
)
def test_a_function_without_an_energy_is_refused(phi, error, words):
    with pytest.raises(error, match=words):
        relative_energy(basis(20, 3, seed=0), phi)


def test_an_array_is_refused_by_name_and_torch_from_numpy_is_the_cure():
    K, V, y = matrix(decaying("1/i", 20), seed=0), basis(20, 3, seed=0), normal(20, seed=1)
    pairs = KnownPairs.of(K, 3)
    wrong = {
        "phi": lambda: relative_energy(V, y.numpy()),
        "pairs": lambda: relative_energy(V.numpy(), y),
        "y": lambda: kernel_target_alignment(K, y.numpy()),
        "K": lambda: kernel_target_alignment(K.numpy(), y),
        "g": lambda: spectral_position(K, y.numpy()),
        "U": lambda: principal_angles(V.numpy(), V),
        "V": lambda: subspace_overlap(V, V.numpy()),
        "the operator": lambda: kernel_distance(K, K.numpy()),
    }
    for name, measure in wrong.items():
        with pytest.raises(ArgumentError, match=rf"^{name} is of type ndarray, and .* torch\.from_numpy"):
            measure()
    with pytest.raises(ArgumentError, match="phi is of type list"):
        relative_energy(V, y.tolist())
    for measure in (
        lambda: kernel_target_alignment(K, y, pairs=V),
        lambda: kernel_distance(K, K, pairs=(pairs, V.numpy())),
        lambda: kernel_distance(K, K, pairs=pairs),
    ):
        with pytest.raises(ArgumentError, match="eigsh"):
            measure()


def test_vectors_that_are_not_orthonormal_are_refused():
    V = basis(20, 3, seed=0)
    with pytest.raises(ArgumentError, match="orthonormal"):
        relative_energy(2 * V, normal(20, seed=1))
    with pytest.raises(ArgumentError, match="orthonormal"):
        relative_energy(KnownPairs(torch.ones(3), 2 * V, torch.zeros(3), 0.0), V[:, 0])


@pytest.mark.parametrize("c", [1, 3])
def test_alignment_is_the_cosine_of_two_matrices(c):
    K, Y = matrix(decaying("1/i", 60), seed=0), normal(60, c, seed=1)
    expected = (K * (Y @ Y.mT)).sum() / K.norm() / (Y @ Y.mT).norm()
    found = kernel_target_alignment(K, 1e-200 * Y, pairs=KnownPairs.of(K, 60))
    assert found.value == pytest.approx(expected.item(), rel=1000 * EPS)
    assert found.standard_error == 0
    sampled = kernel_target_alignment(K, Y, pairs=KnownPairs.of(K, 10))
    assert abs(sampled.value - expected.item()) <= 4 * sampled.standard_error
    assert 0 < sampled.standard_error <= 0.02 * sampled.value


def test_a_kernel_made_of_the_target_is_aligned_with_it():
    y = normal(30, seed=0)
    assert kernel_target_alignment(5 * y.outer(y), y).value == pytest.approx(1, abs=100 * EPS)


def test_alignment_needs_a_target_and_a_kernel():
    K = matrix(decaying("1/i", 10), seed=0)
    with pytest.raises(DegenerateError, match="y is zero"):
        kernel_target_alignment(K, torch.zeros(10))
    with pytest.raises(DegenerateError, match="kernel is zero"):
        kernel_target_alignment(0 * K, torch.ones(10))
    with pytest.raises(ShapeError, match="square"):
        kernel_target_alignment(K[:, :5], torch.ones(10))


def _network(outputs: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_gradient_norm_is_loss_times_net_times_position(outputs):
    net, x = _network(outputs), normal(12, 2, seed=0)
    f = net(x)
    g = torch.autograd.grad((f - 1).pow(4).sum(), f, retain_graph=True)[0]
    (f - 1).pow(4).sum().backward()
    squared_norm = sum(p.grad.square().sum().item() for p in net.parameters())
    K = nl.ntk(net, x)
    trace = dense_jacobian(net, x).square().sum().item()
    position = spectral_position(K, g)
    assert g.square().sum().item() * trace * position.value == pytest.approx(squared_norm, rel=1e-12)
    two_sided = nl.ntk(net, x, x.clone())  # does not know that its two sides are the same points
    assert spectral_position(two_sided, g).value == pytest.approx(position.value, rel=1e-12)
    given_trace = spectral_position(K, g, trace=Estimate(value=trace, standard_error=0.1 * trace, num_products=3))
    assert given_trace.value == pytest.approx(position.value, rel=1e-12)
    assert given_trace.standard_error == pytest.approx(0.1 * position.value, rel=1e-12)


@given(n=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_position_lies_between_0_and_the_share_of_the_largest_eigenvalue(n, seed):
    K = matrix(decaying("1/i^2", n), seed=seed)
    pairs = KnownPairs.of(K, n)
    shares = pairs.values / pairs.values.sum()
    position = spectral_position(K, normal(n, seed=seed + 1)).value
    assert -n * EPS <= position <= shares[0] + n * EPS
    i = seed % n
    assert spectral_position(K, pairs.vectors[:, i]).value == pytest.approx(shares[i].item(), abs=10 * n * EPS)


def test_position_needs_a_trace_and_a_gradient():
    with pytest.raises(DegenerateError, match="trace"):
        spectral_position(torch.zeros(5, 5), torch.ones(5))
    with pytest.raises(DegenerateError, match="g is zero"):
        spectral_position(torch.eye(5), torch.zeros(5))


ANGLES = torch.tensor([1e-12, 1e-6, 0.3, 1.0, math.pi / 2], dtype=torch.float64)


def test_angles_that_were_put_in_are_found_small_and_large():
    Q = basis(200, 10, seed=0)
    U, V = Q[:, :5], Q[:, :5] * ANGLES.cos() + Q[:, 5:] * ANGLES.sin()
    mixed = V @ normal(5, 5, seed=1)
    found = principal_angles(U, mixed)
    assert ((found - ANGLES).abs() <= 1e-14 + 1e-9 * ANGLES).all()
    assert subspace_overlap(U, mixed) == pytest.approx(ANGLES.cos().square().mean().item(), abs=1e-12)


@given(k=st.integers(1, 6), m=st.integers(1, 6), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_angles_agree_with_scipy_and_do_not_depend_on_the_order(k, m, seed):
    U, V = basis(20, k, seed=seed), normal(20, m, seed=seed + 1)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(U.numpy(), V.numpy())).flip(0)
    assert (principal_angles(U, V) - expected).abs().max() <= 1e-11
    assert (principal_angles(U, V) - principal_angles(V, U)).abs().max() <= 1e-11
    assert subspace_overlap(U, V) == pytest.approx(expected.cos().square().mean().item(), abs=1e-11)


def test_overlap_of_random_subspaces_is_k_over_n_on_average():
    n, k, draws = 100, 10, 60
    U = basis(n, k, seed=0)
    overlaps = torch.tensor([subspace_overlap(U, basis(n, k, seed=1 + s)) for s in range(draws)])
    assert abs(overlaps.mean().item() - k / n) <= 4 * overlaps.std().item() / math.sqrt(draws)


def test_spaces_that_cannot_be_compared_are_refused():
    U = basis(20, 3, seed=0)
    with pytest.raises(ShapeError, match="one space"):
        principal_angles(U, basis(21, 3, seed=0))
    with pytest.raises(DegenerateError, match="dependent"):
        subspace_overlap(U, torch.cat([U, U[:, :1]], dim=1))
    with pytest.raises(ShapeError, match="k > 0"):
        subspace_overlap(U, U[:, :0])
    with pytest.raises(ShapeError, match="NaN"):
        principal_angles(U, U * math.nan)


def _turned(K: torch.Tensor, by: float, seed: int) -> torch.Tensor:
    """Return a matrix with slightly other eigenvectors and eigenvalues."""
    n = K.shape[0]
    T = torch.linalg.qr(torch.eye(n, dtype=torch.float64) + by * normal(n, n, seed=seed) / n**0.5).Q
    T = T * T.diagonal().sign()
    turned = T @ K.double() @ T.mT
    return ((turned + turned.mT) / 2).to(K.dtype)


def _dense_distance(K1: torch.Tensor, K2: torch.Tensor) -> float:
    A, B = K1.double() / K1.double().norm(), K2.double() / K2.double().norm()
    return 0.5 * (A - B).square().sum().item()  # no cancellation where they are close


@pytest.mark.parametrize("n", [1, 2, 40])
def test_distance_of_small_kernels_is_exact_symmetric_and_blind_to_scale(n):
    K1 = matrix(decaying("1/i", n), seed=0)
    K2 = matrix(decaying("1/i", n), seed=1)
    found = kernel_distance(K1, 3e8 * K2)
    assert found.value == pytest.approx(_dense_distance(K1, K2), abs=100 * EPS)
    assert found.standard_error == 0
    assert kernel_distance(K2, K1).value == pytest.approx(found.value, abs=100 * EPS)


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("by", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("decay", ["1/i", "1/i^2", "one dominates"])
def test_distance_has_an_error_that_covers_and_is_small_relative_to_it(decay, by, with_pairs):
    K1 = matrix(decaying(decay, 250), seed=0, dtype=torch.float32)
    K2 = _turned(K1, by, seed=1)
    pairs = (KnownPairs.of(K1, 20), KnownPairs.of(K2, 20)) if with_pairs else None
    expected = _dense_distance(K1, K2)
    found = [kernel_distance(K1, K2, pairs=pairs, seed=s) for s in range(40)]
    deviations = torch.tensor([abs(e.value - expected) / e.standard_error for e in found])
    assert (deviations <= 2).double().mean() >= 0.8
    assert (deviations <= 5).double().mean() >= 0.95
    assert max(e.standard_error for e in found) <= 0.05 * expected


def test_a_kernel_has_no_distance_to_itself_and_1_to_one_without_common_directions():
    K = matrix(decaying("1/i", 200), seed=0, dtype=torch.float32)
    assert kernel_distance(K, K).value <= 1e-14
    half = torch.cat([torch.ones(100), torch.zeros(100)]).double()
    assert kernel_distance(half.diag(), (1 - half).diag()).value == pytest.approx(1, abs=1e-12)


def test_distance_counts_its_products():
    class Counting:
        shape, dtype, device, columns = (300, 300), torch.float64, torch.device("cpu"), 0

        def matmul(self, V):
            Counting.columns += V.shape[1]
            return V / torch.arange(1, 301, dtype=V.dtype)[:, None]

    assert kernel_distance(Counting(), Counting()).num_products == Counting.columns


def test_distance_refuses_a_zero_kernel_and_other_rows():
    with pytest.raises(DegenerateError, match="zero"):
        kernel_distance(torch.eye(5), torch.zeros(5, 5))
    with pytest.raises(ShapeError, match=r"\[5, 6\]"):
        kernel_distance(torch.eye(5), torch.eye(6))


@pytest.mark.parametrize("decay", DECAYS)
def test_the_known_matrices_have_the_pairs_that_they_claim(decay):
    K = matrix(decaying(decay, 60), seed=3)
    pairs = KnownPairs.of(K, 60)
    assert (pairs.values - decaying(decay, 60).sort(descending=True).values).abs().max() <= 1e-13 * pairs.values[0]
    assert pairs.residual_norms.max() <= 1e-13 * pairs.values[0]


@pytest.mark.parametrize("engine", ["autodiff", "factors", "gram", "auto"])
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_layer_energies_split_each_eigenvalue_among_the_layers(engine: str, outputs: str):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    K = nl.ntk(net, x, engine=engine, outputs=outputs)
    pairs = nl.eigsh(K, 5)
    parts = nl.layer_energies(pairs, K)
    assert list(parts) == ["0", "2"]
    torch.testing.assert_close(sum(parts.values()), pairs.values)
    for layer, energies in parts.items():
        alone = nl.ntk(net, x, params=f"{layer}.*", engine="autodiff", outputs=outputs)
        expected = (pairs.vectors * (alone @ pairs.vectors)).sum(0).detach()
        torch.testing.assert_close(energies, expected)
    by_parameter = nl.layer_energies(pairs, 2 * K, by="parameter")
    assert list(by_parameter) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(by_parameter["2.weight"] + by_parameter["2.bias"], 2 * parts["2"])


def test_layer_energies_refuse_what_has_no_layers():
    pairs = torch.eye(4, dtype=torch.float64)[:, :2]
    with pytest.raises(nl.ArgumentError, match="kernel of ntk"):
        nl.layer_energies(pairs, torch.eye(4))
    net = torch.nn.Linear(2, 1).double()
    K = nl.ntk(net, torch.randn(4, 2, dtype=torch.float64))
    with pytest.raises(nl.ArgumentError, match="by must be"):
        nl.layer_energies(pairs, K, by="module")
    with pytest.raises(nl.ShapeError):
        nl.layer_energies(torch.eye(5, dtype=torch.float64), K)
    assert set(nl.layer_energies(pairs, K)) == {""}


LABELLED = {
    "relative_energy": lambda K, labels: relative_energy(torch.eye(12, dtype=torch.float64), labels),
    "kernel_target_alignment": kernel_target_alignment,
    "spectral_position": spectral_position,
    "first_order_step": lambda K, labels: nl.first_order_step(K, labels, 0.1),
    "information_flow": lambda K, labels: nl.information_flow(nl.eigsh(K, 3), labels, 0.1, kernel=K),
}


@pytest.mark.parametrize("measure", LABELLED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_classes_are_not_taken_for_numbers(measure, dtype):
    K = matrix(torch.arange(12, 0, -1).double(), seed=0)
    labels = torch.arange(12) % 4
    for wrong in (labels.to(dtype), labels.to(dtype).reshape(12, 1), labels.to(dtype).reshape(4, 3)):
        with pytest.raises(ArgumentError, match="one_hot"):
            LABELLED[measure](K, wrong)
    code = nn.functional.one_hot(labels, 4).to(dtype)
    for right in (code, code[:, 1].bool(), labels.double()):
        LABELLED[measure](K, right)
