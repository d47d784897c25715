"""Put this library beside its peers: each measure in a fresh process, checked against float64 before its time counts.

    python benchmarks/peers.py [--python torch=... --python jax=... --python primme=...] [--only TEXT] [--results FILE]

``nox -s bench`` makes the environments of the peers and passes their interpreters. Without ``--python`` only this
library and plain torch.func are measured. Results go to a JSON file, with the machine and the versions, and a table to
Markdown beside it. Only ratios of one run mean anything: the seconds are those of one machine on one day. With
``--only`` the lines of whole jobs, peers and all, take the place of earlier ones in a file that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
import table
from columns import count
from networks import CASES

NUM_CHECKED = 10
# Beyond what float32 does to plain torch.func: relative to each column, and to each eigenvalue.
LARGEST_ERROR = {"product": 2e-5, "dense": 2e-5, "eigen": 2e-3}
TIMEOUT = 600  # seconds for one measure
LARGEST_HEAP = 20 << 30


@dataclass(frozen=True)
class Tool:
    """Something that can do a job: a worker, the environment it needs, and options of its own."""

    name: str
    worker: str
    environment: str
    options: dict[str, Any] = field(default_factory=dict)


OURS = Tool("ntk_lazy", "ours.py", "ours")
FACTORS = Tool("ntk_lazy", "ours.py", "ours", {"engine": "factors"})
CURVLINOPS = Tool("curvlinops", "with_curvlinops.py", "torch")
TORCH_FUNC = Tool("torch.func", "with_torch_func.py", "ours")
NNGEOMETRY = Tool("nngeometry", "with_nngeometry.py", "torch")
NEURAL_TANGENTS = Tool("neural-tangents", "with_neural_tangents.py", "jax")


def neural_tangents(implementation: int) -> Tool:
    """A dense kernel by one of its three implementations."""
    name = f"neural-tangents ({implementation})"
    return Tool(name, "with_neural_tangents.py", "jax", {"implementation": implementation})


@dataclass(frozen=True)
class Measure:
    """One job on one case, and who does it."""

    case: str
    task: str
    num_examples: int
    k: int
    tools: tuple[Tool, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it is printed and chosen."""
        columns = f", k = {self.k}" if self.k else ""
        return f"{self.case}: {self.task}, N = {self.num_examples:,}{columns}"


def measures() -> Iterator[Measure]:
    """All of them; those that most depends on come first."""
    products = (FACTORS, CURVLINOPS, NEURAL_TANGENTS, TORCH_FUNC)
    yield Measure("mlp", "eigen", 10_000, 200, (OURS, neural_tangents(3), CURVLINOPS))
    yield Measure("mlp", "dense", 10_000, 0, (OURS, neural_tangents(3)))
    yield Measure("mlp", "product", 50_000, 32, (FACTORS, CURVLINOPS))
    # All its examples are one batch: 32 columns of 50,000 do not fit the memory of a small machine.
    yield Measure("mlp", "product", 50_000, 8, (FACTORS, NEURAL_TANGENTS))
    yield Measure("mlp", "eigen", 273_280, 20, (OURS,), {"memory_budget": 6_000_000_000})
    for case in ("cnn", "transformer"):
        yield Measure(case, "product", 256, 16, products)
        yield Measure(case, "product", 256, 64, products[:3])
        yield Measure(case, "dense", 2_000, 0, (OURS, *map(neural_tangents, (1, 3)), NNGEOMETRY))
    for case in ("resnet", "resnet, C=10", "siren", "lstm"):
        n = {"siren": 10_000, "lstm": 512}.get(case, 128)
        yield Measure(case, "product", n, 16, (OURS if case == "lstm" else FACTORS, CURVLINOPS, TORCH_FUNC))
    for case in ("cnn, C=10", "transformer, C=10"):
        for k in (16, 64):
            yield Measure(case, "product", 256, k, products[:3])
    for n in (2_000, 10_000):
        for k in (1, 8, 32):
            yield Measure("mlp", "product", n, k, products)
    yield Measure("mlp", "dense", 2_000, 0, (OURS, *map(neural_tangents, (1, 2, 3)), NNGEOMETRY))


def run(tool: Tool, job: dict[str, Any], pythons: dict[str, str]) -> dict[str, Any]:
    """Do a job in a process of its own; what it printed last is its result."""
    if tool.environment not in pythons:
        return {"failure": "its environment was not given"}
    path = Path(job["folder"]) / "job.json"
    path.write_text(json.dumps(job | tool.options))
    limited = f"ulimit -d {LARGEST_HEAP // 1024}; exec '{pythons[tool.environment]}' '{WORKERS / tool.worker}' '{path}'"
    threads = str(job["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    try:
        done = subprocess.run(
            ["bash", "-c", limited], capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {TIMEOUT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        errors = [line for line in lines if "Error" in line or "Unable" in line]
        return {"failure": (errors or lines)[-1].strip()[:160]}
    return json.loads(done.stdout.strip().splitlines()[-1])


class Folder:
    """Data of one case, and what is known of it in float64."""

    def __init__(self, path: str, measure: Measure, threads: int) -> None:
        self.path, self.measure, self.threads = Path(path), measure, threads
        case = CASES[measure.case]
        net, self.x = case.network(), case.inputs(measure.num_examples).numpy()
        n = measure.num_examples * case.num_outputs
        generator = torch.Generator().manual_seed(2)
        # Columns that are checked: random ones and unit vectors, which show single rows of K.
        V = torch.randn(n, max(measure.k, NUM_CHECKED), generator=generator)
        V[:, NUM_CHECKED // 2 : NUM_CHECKED] = 0
        for column in range(NUM_CHECKED // 2, NUM_CHECKED):
            V[n * (2 * column - NUM_CHECKED + 1) // NUM_CHECKED, column] = 1
        self.weights = {f"p/{name}": p.detach().numpy() for name, p in net.named_parameters()}
        self.num_params = sum(w.size for w in self.weights.values())
        self.checked = V[:, :NUM_CHECKED].numpy()
        width = measure.k if measure.task == "product" else NUM_CHECKED
        self._save(V[:, :width].numpy())

    def job(self, **options: Any) -> dict[str, Any]:
        """What a worker is told."""
        m = self.measure
        once = m.task == "eigen" or bool(options.get("is_reference"))
        job = {
            "folder": str(self.path),
            "case": m.case,
            "task": m.task,
            "k": m.k,
            "threads": self.threads,
            "once": once,
        }
        return job | m.options | options

    def multiply(self, V: np.ndarray, *, dtype: str = "float64") -> np.ndarray:
        """Return K V from plain torch.func, which shares nothing with this library."""
        saved = (self.path / "data.npz").read_bytes()
        self._save(V.astype(np.float32))
        outcome = run(TORCH_FUNC, self.job(task="product", is_reference=True, dtype=dtype), {"ours": sys.executable})
        (self.path / "data.npz").write_bytes(saved)
        if "failure" in outcome:
            raise RuntimeError(f"no reference for {self.measure.name}: {outcome['failure']}")
        return np.load(self.path / "check.npz")["product"]

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """K times the checked columns in float64, and how far float32 takes plain torch.func from it."""
        return self._with_kinks(self.checked)

    def check(self, reference: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Any]:
        """How far the last result is from float64, how much of that float32 does not explain, and what else it says."""
        found = dict(np.load(self.path / "check.npz"))  # the next job writes another
        if reference is not None:
            product = found["product"][:, :NUM_CHECKED]
            exact, kinks = (part[..., : product.shape[1]] for part in reference)
            scale = np.linalg.norm(exact, axis=0)
            errors = np.linalg.norm(product - exact, axis=0)
            extra = {}
        else:
            vectors, values = found["vectors"], found["values"].astype(np.float64)
            some = np.linspace(0, len(values) - 1, 3 if self.measure.num_examples > 10**5 else 12).astype(int)
            chosen, scale = vectors[:, some], values[some]
            exact, kinks = self._with_kinks(chosen)
            errors = np.linalg.norm(exact - chosen.astype(np.float64) * scale, axis=0)
            extra = {"columns": int(found["columns"])} if "columns" in found else {}
        unexplained = np.maximum(errors - 3 * kinks, 0) / scale
        return extra | {"error": float((errors / scale).max()), "unexplained": float(unexplained.max())}

    def _with_kinks(self, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return K V, and the norms of what float32 changes of each column.

        In float32 some inputs of a ReLU lie on the other side of zero, others in each library: the kernels differ by
        that, and no result can be held to less.
        """
        exact = self.multiply(V)
        return exact, np.linalg.norm(self.multiply(V, dtype="float32") - exact, axis=0)

    def _save(self, V: np.ndarray) -> None:
        np.savez(self.path / "data.npz", x=self.x, V=V, checked=self.checked, **self.weights)


def measure_all(chosen: list[Measure], pythons: dict[str, str], threads: int) -> Iterator[dict[str, Any]]:
    """Go through measures and tools; a result that is wrong is a failure and has no time."""
    for measure in chosen:
        with tempfile.TemporaryDirectory() as path:
            folder = Folder(path, measure, threads)
            reference = None if measure.task == "eigen" else folder.reference()
            for tool in measure.tools:
                outcome = run(tool, folder.job(), pythons)
                if "failure" not in outcome:
                    outcome |= folder.check(reference)
                    if not outcome["unexplained"] <= LARGEST_ERROR[measure.task]:
                        outcome = {"failure": f"wrong: off by {outcome['error']:.1e}"}
                row = {"measure": measure.name, "tool": tool.name, "num_params": folder.num_params} | outcome
                row |= {key: getattr(measure, key) for key in ("case", "task", "num_examples", "k")}
                print(table.line(row), flush=True)
                yield row


def processor() -> str:
    """What the processor is called, where Linux says so."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(pythons: dict[str, str], threads: int) -> dict[str, Any]:
    """What was measured on, with the rate of matrix products by each route that was there."""
    from ntk_lazy.engines.rates import machine_rates

    torch.set_num_threads(threads)
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "ntk_lazy": metadata.version("ntk-lazy"),
        "torch": torch.__version__,
        "gflops": {"ntk_lazy": machine_rates(torch.device("cpu"), torch.float32).flops / 1e9},
    }
    A = torch.ones(2048, 2048)
    seconds = min(table.seconds(lambda: A @ A) for _ in range(6))
    found["gflops"]["torch"] = 2 * 2048**3 / seconds / 1e9
    if "jax" in pythons:
        with tempfile.TemporaryDirectory() as path:
            np.savez(Path(path) / "data.npz", x=np.zeros(1))
            job = {"folder": path, "case": "mlp", "task": "rate", "threads": threads, "once": False}
            outcome = run(NEURAL_TANGENTS, job, pythons)
            if "seconds" in outcome:
                found["gflops"]["jax"] = 2 * 2048**3 / outcome["seconds"] / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a peer")
    parser.add_argument("--only", default="", help="measures whose name holds this text")
    parser.add_argument("--results", type=Path, help="JSON file to write; a table goes beside it")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    pythons = {"ours": sys.executable} | dict(given.split("=", 1) for given in options.python)
    chosen = [m for m in measures() if options.only in m.name]
    about = machine(pythons, options.threads)
    print(json.dumps(about), flush=True)
    columns = list(count(pythons.get("primme"))) if options.only in "columns" else []
    results: dict[str, Any] = {"machine": about, "columns": columns, "rows": []}
    is_again = bool(options.only and options.results and options.results.exists())
    earlier = json.loads(options.results.read_text()) if is_again else None
    for measure in chosen:
        results["rows"] += measure_all([measure], pythons, options.threads)
        if options.results:  # after each job, so that an interrupted run is not lost
            shown = results if earlier is None else table.joined(earlier, results)
            options.results.write_text(json.dumps(shown, indent=1) + "\n")
            options.results.with_suffix(".md").write_text(table.markdown(shown))
    print(table.bars(results))


if __name__ == "__main__":
    main()
