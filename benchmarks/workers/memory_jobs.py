"""Run jobs on one kernel, each in a forked process, and print what each held beside operands and result.

Run by ``benchmarks/memory.py``: ``python memory_jobs.py MODEL ENGINE BUDGET JOB ...``, one line of JSON for each job.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import ntk_lazy as nl


class Text(nn.Module):
    """The mean of what is looked up in a large table, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100_000, 64), nn.Linear(64, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return two outputs a text."""
        return self.head(torch.tanh(self.table(tokens)).mean(1))


class Transformer(nn.Module):
    """Two blocks of attention over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 64)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(64, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one output a text."""
        return self.head(self.blocks(self.table(tokens)).mean(1))


def _perceptron(*widths: int) -> nn.Module:
    layers = [m for i, o in pairwise(widths[:-1]) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 10),
    )  # fmt: skip


# For each model how it is made, how N inputs are drawn, and N.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "mlp": (lambda: _perceptron(8, 256, 256, 256, 2), lambda n: torch.randn(n, 8), 1200),
    "implicit": (lambda: _perceptron(2, *[256] * 6, 1), lambda n: torch.rand(n, 2), 4000),
    "cnn": (_convolutions, lambda n: torch.randn(n, 3, 16, 16), 200),
    "transformer": (Transformer, lambda n: torch.randint(0, 200, (n, 16)), 400),
    "text": (Text, lambda n: torch.randint(0, 100_000, (n, 8)), 1000),
    "wide": (lambda: _perceptron(64, 4096, 4096, 1), lambda n: torch.randn(n, 64), 300),
}


def _gradient(K: Any, V: Tensor) -> Tensor:
    (K @ V).square().sum().backward()
    return V


def _eigenpairs(K: Any, V: Tensor) -> Any:
    return nl.eigsh(K, 8, rtol=1e-2, on_unconverged="return").vectors


# What is let go with the result is not held: each job returns its result, or nothing that counts.
JOBS: dict[str, Callable[[Any, Tensor], Any]] = {
    "explain": lambda K, V: K.explain(16) and None,
    "product, 1 column": lambda K, V: K @ V[:, :1],
    "product, 16 columns": lambda K, V: K @ V,
    "product, 64 columns": lambda K, V: K @ V.repeat(1, 4),
    "diagonal": lambda K, V: K.diagonal(),
    "entries": lambda K, V: K[torch.arange(len(V)), torch.arange(len(V)).flip(0)],
    "rows": lambda K, V: K[:: max(1, len(V) // 50)].to_dense(),
    "to_dense": lambda K, V: K.to_dense(max_dense_bytes=2**40),
    "jacobian_matmul": lambda K, V: K.jacobian_matmul(torch.ones(K.num_features, 1)),
    "jacobian_rmatmul": lambda K, V: K.jacobian_rmatmul(V[:, :4]),
    "half_gram": lambda K, V: K.half_gram(V),
    "layer_energies": lambda K, V: nl.layer_energies(V, K) and None,
    "pivoted_cholesky": lambda K, V: K.pivoted_cholesky(5),
    "trace": lambda K, V: nl.trace(K) and None,
    "eigsh": _eigenpairs,
    "gradient of a product": _gradient,
}
FIRST = "ntk and the first product"


def resident(key: str) -> int:
    """Read one line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(key)]
    return int(line.split()[1]) * 1024


def held_by(job: Callable[[], Any]) -> int:
    """Peak bytes beside what was held before and the result."""
    # What was let go must not count as held already: it would hide as much of what the job takes.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before, libraries = resident("VmRSS"), resident("RssFile")
    result = job()
    libraries = resident("RssFile") - libraries
    size = result.untyped_storage().nbytes() if isinstance(result, Tensor) else 0
    return resident("VmHWM") - before - libraries - size


def measure(model: str, engine: str, budget: int, name: str) -> dict[str, Any]:
    """Run one job."""
    build, draw, N = MODELS[model]
    torch.manual_seed(0)
    module, x = build(), draw(N)
    if name == FIRST:
        found = held_by(
            lambda: nl.ntk(module, x, engine=engine, memory_budget=budget) @ torch.ones(_rows(module, x), 1)
        )
        return {"held": found}
    K = nl.ntk(module, x, engine=engine, memory_budget=budget)
    if name != "gradient of a product":
        K = K.detach()
    V = torch.randn(K.shape[0], 16)
    plan = K.explain(int(name.split()[1])) if name.startswith("product") else None
    held = held_by(lambda: JOBS[name](K, V))
    return {"held": held} | ({} if plan is None else {"predicted": plan.predicted_bytes})


def _rows(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return len(x) * module(x[:1]).shape[1]


def main() -> None:
    """Print one line for each job."""
    torch.set_num_threads(1)
    model, engine, budget, *names = sys.argv[1:]
    # What the first use of a kernel sets up for the whole process is not a part of any job.
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for job in JOBS.values():
        job(nl.ntk(net, torch.randn(8, 3), engine=engine), torch.randn(16, 16))
    for name in names:
        child = os.fork()
        if not child:
            try:
                found = measure(model, engine, int(budget), name)
            except nl.BudgetError as error:
                found = {"refused": str(error)}
            print(json.dumps({"job": name} | found), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps({"job": name, "failed": True}), flush=True)


if __name__ == "__main__":
    main()
