"""What a computation holds in memory: under its budget, flat in N, and never K."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import linear_operator
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ntk_lazy as nl
from ntk_lazy.engines.kept import KeptLinearisations

_PROGRAM = """
import ctypes
import os
import sys
import torch
import ntk_lazy as nl
from torch import nn

torch.set_num_threads(1)
budget, kind, engine, *asked = int(sys.argv[1]), *sys.argv[2:]
torch.manual_seed(0)
if kind == "mlp":
    net = nn.Sequential(
        nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2)
    )
    shape = (8,)
else:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 2),
    )
    shape = (3, 16, 16)
jobs = {
    "product": lambda K, V: K @ V,
    "diagonal": lambda K, V: K.diagonal(),
    "half_gram": lambda K, V: K.half_gram(V),
    "to_dense": lambda K, V: K.to_dense(max_dense_bytes=2**40),
    "rows": lambda K, V: K[torch.arange(0, K.shape[0], 17)].to_dense(),
    "pivoted_cholesky": lambda K, V: K.pivoted_cholesky(5),
}
# What the first use of a kernel sets up for the whole process is not a part of any product.
small, few = nl.ntk(net, torch.randn(8, *shape), engine=engine).detach(), torch.randn(16, 16)
for job in jobs.values():
    job(small, few)


def resident(key):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(key)]
    return int(line.split()[1]) * 1024


def measure(job, N):
    K = nl.ntk(net, torch.randn(N, *shape), engine=engine, memory_budget=budget).detach()
    V = torch.randn(K.shape[0], 16)
    # What was let go must not count as held already: it would hide as much of what the product takes.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before, libraries = resident("VmRSS"), resident("RssFile")
    result = job(K, V)
    # A process maps the pages of libraries when it comes to them: its parent's do not count as its own.
    libraries = resident("RssFile") - libraries
    print(resident("VmHWM") - before - libraries - result.nbytes, flush=True)


for what, N in (one.split(":") for one in asked):
    child = os.fork()
    if not child:
        measure(jobs[what], int(N))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{what} failed")
"""


def _extra_bytes(jobs: list[tuple[str, int]], budget: int, kind: str, engine: str) -> list[int]:
    """Peak resident bytes beside operands and result, of jobs on so many examples, each in a process of its own."""
    asked = [f"{what}:{num_examples}" for what, num_examples in jobs]
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(budget), kind, engine, *asked], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_peak_memory_stays_under_the_budget(kind: str, engine: str):
    budget = 80_000_000
    # Under so small a budget K is made of many tiles, each of which needs its rows of J anew.
    jobs = [(what, 1200) for what in ("product", "diagonal", "half_gram", "rows", "pivoted_cholesky")]
    jobs.append(("to_dense", 300))
    found = _extra_bytes(jobs, budget, kind, engine)
    assert len(found) == len(jobs)
    assert {what: extra for (what, _), extra in zip(jobs, found, strict=True) if not 0 <= extra <= budget} == {}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("engine", ["autodiff", "factors"])
def test_peak_memory_of_a_product_does_not_grow_with_the_number_of_examples(engine: str):
    budget = 60_000_000
    few, many = _extra_bytes([("product", 1000), ("product", 8000)], budget, "mlp", engine)
    # Beside the product's own chunks stand V and the result on all rows and outputs, once more by column blocks.
    rows = 2 * 8000 * 16 * 4
    assert many <= max(few, budget) + 2 * rows


def test_the_footprint_of_small_chunks_tells_that_of_large_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    rule = nl.ntk(net, torch.randn(400, 8), engine="autodiff").gramian.engine.rule
    seen = _watch(
        lambda: nl.ntk(net, torch.randn(400, 8), engine="autodiff", chunk_size=400).detach() @ torch.randn(800, 12)
    )
    largest = seen.largest_bytes
    # The whole is at least its largest part; it is at most all activations and tangents of the layers at once.
    assert largest <= rule.footprint.bytes(400, 12) <= 30 * largest


class _Watch(TorchDispatchMode):
    """Keep the shape of every result."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.shapes.add(tuple(leaf.shape))
                self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
        return result


def _watch(run) -> _Watch:
    with _Watch() as watch:
        run()
    return watch


@pytest.fixture
def kernel() -> nl.NTKLinearOperator:
    """131 examples: a prime, so that no product of widths and chunks is mistaken for it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    return nl.ntk(net, torch.randn(131, 3, dtype=torch.float64), chunk_size=10, max_dense_bytes=131 * 130 * 8)


def _lazily(run) -> None:
    n = 131
    for shape in _watch(run).shapes:
        assert sum(size >= n for size in shape) < 2, f"a result of shape {shape} is as large as K"


def test_k_is_never_written_down_by_products_and_indices(kernel):
    V = torch.randn(131, 5, dtype=torch.float64)

    kernel.explain()  # measures the machine, with matrices of its own

    def work():
        K = kernel.detach()
        K @ V
        K.diagonal()
        K[3:9, :][:, 4] @ V[:6, 0]
        K[torch.tensor([5, 2, 100])].to_dense()
        K.half_gram(V)
        K.jacobian_matmul(K.jacobian_rmatmul(V))

    _lazily(work)


@pytest.mark.parametrize("solver", [nl.Lanczos(block_size=4), nl.LOBPCG()], ids=repr)
def test_k_is_never_written_down_by_an_eigensolver(kernel, solver):
    _lazily(lambda: nl.eigsh(kernel, 6, solver=solver, seed=1))


def test_k_is_never_written_down_by_estimates(kernel):
    y = torch.randn(131, dtype=torch.float64)

    def work():
        K = kernel.detach()
        nl.trace(K)
        nl.trace(K, method="stochastic")
        nl.frobenius_norm(K)
        nl.kernel_target_alignment(K, y)
        nl.spectral_position(K, y)

    _lazily(work)


def test_k_is_never_written_down_by_a_solve_and_its_gradients(kernel):
    y = torch.randn(131, 1, dtype=torch.float64)

    def work():
        with (
            linear_operator.settings.max_cholesky_size(1),
            linear_operator.settings.min_preconditioning_size(10_000),
            linear_operator.settings.cg_tolerance(1e-4),
            linear_operator.settings.max_cg_iterations(200),
        ):
            quadratic, logdet = kernel.add_jitter(10.0).inv_quad_logdet(y, logdet=True)
            (quadratic + logdet).backward()

    _lazily(work)


def test_writing_down_a_k_above_the_limit_is_refused_with_the_cure(kernel):
    with pytest.raises(nl.BudgetError, match="max_dense_bytes") as caught:
        kernel.to_dense()
    assert caught.value.requested_bytes == 131 * 131 * 8
    assert kernel.to_dense(max_dense_bytes=131 * 131 * 8).shape == (131, 131)


def test_a_budget_below_one_example_is_refused_with_what_would_fit(kernel):
    net = nn.Linear(3, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(nl.BudgetError, match="Raise memory_budget") as caught:
        nl.ntk(net, x, memory_budget=10) @ torch.ones(5, 1, dtype=torch.float64)
    assert caught.value.requested_bytes > caught.value.available_bytes == 10
    one, five = (nl.ntk(net, x, engine="autodiff", chunk_size=b).explain().predicted_bytes for b in (1, 5))
    with pytest.raises(nl.BudgetError, match="use a chunk of") as caught:
        nl.ntk(net, x, engine="autodiff", memory_budget=(one + five) // 2, chunk_size=5) @ torch.ones(
            5, 1, dtype=torch.float64
        )
    assert 1 <= caught.value.largest_chunk < 5


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_products_are_the_same_while_linearisations_are_kept(chunk_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    K = nl.ntk(net, x, engine="autodiff", chunk_size=chunk_size).detach()
    V = torch.randn(60, 4, dtype=torch.float64)
    single = K @ V
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    direct = K._matmul(V)
    plain, num_chunks = len(calls), len(calls) // 2
    with K.linearised():
        first = K._matmul(V)
        calls.clear()
        second = K._matmul(V)
        with K.linearised():
            third = K._matmul(V)
    # Rounding of sums over chunks that half of the budget makes may differ; the forward passes of Jᵀ are not repeated.
    for other in (single, first, second, third):
        assert torch.allclose(other, direct, rtol=0, atol=1e-12 * float(direct.abs().max()))
    assert len(calls) == 2 * num_chunks == plain


def test_what_was_kept_is_forgotten_behind_the_context():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, V = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    K = nl.ntk(net, x).detach()
    with K.linearised():
        before = K._matmul(V)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    assert not torch.allclose(K._matmul(V), before)
    assert torch.allclose(K._matmul(V), nl.ntk(net, x).detach() @ V, rtol=1e-12)


@pytest.mark.parametrize(("budget", "forward_passes"), [(100_000_000, 32), (200_000_000, 16)])
def test_linearisations_are_kept_only_where_the_budget_is_ample(budget, forward_passes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    K = nl.ntk(net, torch.randn(6400, 3, dtype=torch.float64), engine="autodiff", chunk_size=400, memory_budget=budget)
    K = K.detach()
    assert (K.gramian.engine.rule.held(400, 16) <= budget // 4) == (forward_passes == 16)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    V = torch.randn(6400, 1, dtype=torch.float64)
    with K.linearised():
        K._matmul(V)
        calls.clear()
        K._matmul(V)
    # 16 chunks for J, which are always run, and those of the transpose where they were not kept.
    assert len(calls) == forward_passes


def test_linearisations_that_do_not_fit_are_made_anew():
    kept, x, made = KeptLinearisations(25), torch.randn(4, 1), []

    def make():
        made.append(object())
        return made[-1]

    first, second = [[kept.get(x[i : i + 1], make, 10) for i in range(4)] for _ in range(2)]
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True, False, False]
    assert len(made) == 6
