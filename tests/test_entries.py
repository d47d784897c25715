"""Rows, blocks and single entries of K equal those of the dense kernel, whatever they are made of."""

from __future__ import annotations

import pytest
import torch
from case import Case
from oracle import defect, dense_jacobian, dense_kernel
from torch import Tensor, nn
from zoo import RIGHT
from zoo_kernels import N, jacobian, kernel

import ntk_lazy as nl

ENGINES = ("autodiff", "factors", "gram", "auto")
WAYS = ("tiles", "products", "pairs")
ROUTED = {"mixture of experts"}  # experts that the first examples do not reach
right = pytest.mark.parametrize("case", [case for case in RIGHT if case.name not in ROUTED], ids=str)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def force(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let entries be made in one way, whatever it costs."""
    monkeypatch.setattr("ntk_lazy.operator.entries._BLOCK_SHARE", 2.0 if way == "pairs" else 0.0)
    for engine in ("autodiff.AutodiffEngine", "factors.FactorEngine"):
        monkeypatch.setattr(f"ntk_lazy.engines.{engine}._prefers_tiles", lambda self, n1, n2, k: way == "tiles")


def assert_entries(K: nl.NTKLinearOperator, dense: Tensor, tolerance: float) -> None:
    """Compare entries, a row, a few rows and blocks, relative to the largest entry of the kernel."""
    n1, n2 = dense.shape
    scale = float(dense.abs().max())
    rows, cols = torch.tensor([n1 - 1, 0, n1 // 2, 0]), torch.tensor([0, n2 - 1, n2 // 2, n2 // 2])

    def compare(found: Tensor, expected: Tensor) -> None:
        assert defect(found.detach(), expected) * float(expected.abs().max() or 1.0) < tolerance * scale

    compare(K[rows, cols], dense[rows, cols])
    compare(K[rows[:, None], cols[None]], dense[rows[:, None], cols[None]])
    compare(K[n1 // 2], dense[n1 // 2])
    compare(K[:, n2 // 2], dense[:, n2 // 2])
    compare(K[n1 // 2 : n1 // 2 + 1].to_dense(), dense[n1 // 2 : n1 // 2 + 1])
    compare(K[rows].to_dense(), dense[rows])
    compare(K[rows][:, cols].to_dense(), dense[rows][:, cols])
    compare(K[rows][:, rows].to_dense(), dense[rows][:, rows]) if n1 == n2 else None
    compare(K.diagonal(), dense.diagonal()) if n1 == n2 else None


@right
def test_entries_from_factors_equal_those_of_the_dense_kernel_in_every_way(case: Case, monkeypatch: pytest.MonkeyPatch):
    J, J2 = jacobian(case), jacobian(case, 3, seed=1)
    K = kernel(case, engine="factors", chunk_size=3)
    for way in WAYS:
        force(way, monkeypatch)
        assert_entries(K, J @ J.mT, case.tolerance)
    assert_entries(K.at(case.inputs(N), case.inputs(3, seed=1)), J @ J2.mT, case.tolerance)


def _network(num_outputs: int) -> nn.Module:
    """Layers with and without positions, a weight that is used twice, and a parameter without factors."""
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 5),
        shared,
        nn.PReLU(),
        shared,
        nn.Tanh(),
        nn.Linear(5, num_outputs),
    ).double()


@pytest.mark.parametrize("outputs", ["full", "trace", "sum", 1])
@pytest.mark.parametrize(
    ("engine", "budget"), [("autodiff", None), ("factors", 60_000), ("factors", None), ("gram", None), ("auto", None)]
)
def test_entries_follow_the_output_mode_under_any_budget(
    engine: str, budget: int | None, outputs: str | int, monkeypatch: pytest.MonkeyPatch
):
    module, x = _network(3), torch.randn(7, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = dense_jacobian(module, x)
    dense, part = dense_kernel(J, J, 3, outputs), dense_kernel(J[:12], J[6:], 3, outputs)
    K = nl.ntk(module, x, engine=engine, outputs=outputs, memory_budget=budget, max_dense_bytes=10**9).detach()
    r = K.shape[0] // 7
    for way in WAYS:
        force(way, monkeypatch)
        assert_entries(K, dense, 1e-10)
        # Between products, where factors, K or linearisations are kept.
        with K.linearised(4):
            assert_entries(K[: 4 * r][:, 2 * r :], part, 1e-10)
            V = torch.randn(7 * r, 2, dtype=torch.float64)
            assert defect(K @ V, dense @ V) < 1e-10
            assert defect(K[:, r], dense[:, r]) < 1e-10
    assert_entries(K.at(x[:4], x[2:]), part, 1e-10)


@every_engine
def test_entries_of_a_batch_are_those_of_its_kernels(engine: str):
    module, x = _network(2), torch.randn(2, 3, 2, 6, dtype=torch.float64)
    K = nl.ntk(module, x, engine=engine, input_dims=2).detach()
    dense = torch.stack([J @ J.mT for J in (dense_jacobian(module, one) for one in x)])
    index = torch.tensor([1, 0, 1]), torch.tensor([5, 2, 3]), torch.tensor([0, 2, 5])
    assert defect(K[index], dense[index]) < 1e-10
    assert defect(K[:, 3], dense[:, 3]) < 1e-10
    assert defect(K.diagonal(), dense.diagonal(dim1=1, dim2=2)) < 1e-10
    L = K.pivoted_cholesky(6, error_tol=0.0)
    assert defect(L @ L.mT, dense) < 1e-8


@every_engine
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_pivoted_cholesky_factor_is_exact_on_its_pivots_and_within_the_bound_elsewhere(engine: str, num_outputs: int):
    module, x, m = _network(num_outputs), torch.randn(10, 2, 6, dtype=torch.float64), 4
    J = dense_jacobian(module, x)
    dense = J @ J.mT
    K = nl.ntk(module, x, engine=engine).detach()
    L, pivots = K.pivoted_cholesky(m, error_tol=0.0, return_pivots=True)
    rest = dense - L @ L.mT
    scale = float(dense.abs().max())
    assert rest[pivots[:m]].abs().max() < 1e-10 * scale
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert torch.linalg.eigvalsh(rest).min() > -1e-10 * scale
    # Harbrecht, Peters and Schneider, Appl. Numer. Math. 62 (2012), Theorem 3.2; no rank m beats the eigenpairs.
    error = float(rest.diagonal().sum())
    assert values[m:].sum() - 1e-10 * scale <= error <= (len(dense) - m) * 4**m * values[m]


@pytest.mark.parametrize("engine", ["factors", "gram", "auto"])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_pivoted_cholesky_captures_the_factors_once(engine: str, num_outputs: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, num_outputs))
    x = torch.randn(50, 3)
    K = nl.ntk(net, x, engine=engine, chunk_size=50).detach()
    seen: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    K.pivoted_cholesky(6, error_tol=0.0)
    assert seen == [50]
    # Nothing is kept behind it: parameters may change.
    seen.clear()
    K.diagonal()
    assert seen == [50]


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_gradients_of_a_block_are_the_same_as_a_whole_and_pair_by_pair(
    num_outputs: int, monkeypatch: pytest.MonkeyPatch
):
    module = _network(num_outputs)
    x = torch.randn(6, 2, 6, dtype=torch.float64, requires_grad=True)
    n = 6 * num_outputs
    rows, cols = torch.tensor([4, 1, 4])[:, None], torch.randperm(n, generator=torch.Generator().manual_seed(0))[None]
    weights = torch.randn(3, n, dtype=torch.float64)
    found = []
    for pair_cost in (0, 1000):
        monkeypatch.setattr("ntk_lazy.operator.readout._PAIR_COST", pair_cost)
        K = 0.5 * nl.ntk(module, x)
        for index in ((rows, cols), (cols.mT, rows.mT)):
            value = (K[index] * (weights if index[0] is rows else weights.mT)).sum()
            found.append(torch.autograd.grad(value, [x, *module.parameters()], allow_unused=True))
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            # The last bias adds to J what depends on nothing.
            one, two = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (first, second))
            assert torch.allclose(one, two, rtol=0, atol=1e-10 * float(one.abs().max() + 1))


def _rows_with_graph(module: nn.Module, x: Tensor) -> Tensor:
    """Return J, shape ``(N, C, P)``, by plain reverse mode whose graph reaches parameters and inputs."""
    rows = []
    for example in x.split(1):
        for output in module(example).reshape(-1):
            grads = torch.autograd.grad(output, list(module.parameters()), create_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("outputs", ["full", "trace", "sum", 1])
def test_gradients_of_a_written_kernel_are_those_of_plain_reverse_mode(outputs: str | int):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)]
    module = nn.Sequential(*layers).double()
    x, z = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    J, H = _rows_with_graph(module, x), _rows_with_graph(module, z)
    rows = torch.tensor([3, 0, 3])

    def product(one: Tensor, other: Tensor) -> Tensor:
        if outputs == "trace":
            return torch.einsum("icp,jcp->ij", one, other) / 2
        if outputs == "full":
            return one.flatten(0, 1) @ other.flatten(0, 1).mT
        one, other = (t.sum(1) / 2**0.5 if outputs == "sum" else t[:, outputs] for t in (one, other))
        return one @ other.mT

    K, R = (nl.ntk(module, *points, outputs=outputs, chunk_size=3) * scale for points in ((x,), (x, z)))
    batched = nl.ntk(module, torch.stack([z, z + 1]), outputs=outputs, input_dims=1) * scale
    expected = [product(J, J), product(J, H), product(J, J)[rows]]
    expected.append(torch.stack([product(M, M) for M in (H, _rows_with_graph(module, z + 1))]))
    for written, dense in zip((K, R, K[rows], batched), expected, strict=True):
        G = torch.randn(dense.shape, dtype=torch.float64)
        asked = [x, z, scale, *module.parameters()]
        found = torch.autograd.grad((written.to_dense() * G).sum(), asked, allow_unused=True)
        wanted = torch.autograd.grad((scale * dense * G).sum(), asked, allow_unused=True, retain_graph=True)
        for pair in zip(found, wanted, strict=True):
            one, two = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in pair)
            assert torch.allclose(one, two, rtol=0, atol=1e-10 * float(two.abs().max() + 1))
