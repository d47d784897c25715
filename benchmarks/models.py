"""Try the library on public architectures, tiny and with random weights, each in a process of its own.

    python benchmarks/models.py [--only TEXT ...] [--results FILE]

``nox -s models`` makes the environment. Each kernel is compared with one of ``torch.autograd.grad``, row by row, on a
copy of the module in float64. Nothing is downloaded. Results go to a JSON file, and a page to Markdown beside it.
With ``--only`` the lines of the models whose name or family holds one of some texts replace earlier ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

# Before anything that may ask a hub is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "workers")]

from architectures import measured, page
from architectures.architecture import Architecture, all_architectures

TIMEOUT = 180  # seconds for one architecture
# Imported once, by the process that the others are forked from; what is not installed is a line of its own later.
SLOW_IMPORTS = ["torch", "ntk_lazy", "architectures.measured", "transformers", "torch_geometric.nn", "e3nn.o3", "peft"]


def version(package: str) -> str | None:
    """The version of a package that is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(about: Architecture, context: Any) -> dict[str, Any]:
    """Measure one; a process that dies leaves what it had found, and how it ended."""
    row: dict[str, Any] = {"name": about.name, "family": about.family, "package": about.package, "cure": about.cure}
    if version(about.package) is None:
        return row | {"fault": f"{about.package} could not be installed"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        process = context.Process(target=measured.run, args=(about.name, str(path)))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            row["fault"] = f"not done after {TIMEOUT} s"
        elif process.exitcode:
            row["fault"] = f"its process ended with {process.exitcode}"
        return row | (json.loads(path.read_text()) if path.exists() else {})


def is_chosen(about: Architecture, texts: list[str]) -> bool:
    """Whether the name or the family holds one of some texts; without any all are chosen."""
    return not texts or any(text in about.name or text in about.family for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="architectures whose name or family holds one of these")
    parser.add_argument("--results", type=Path, help="JSON file to write; the page goes beside it")
    options = parser.parse_args()
    known = all_architectures()
    chosen = [about for about in known.values() if is_chosen(about, options.only)]
    packages = sorted({about.package for about in known.values()})
    results: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "ntk_lazy": version("ntk-lazy")},
        "packages": {package: version(package) for package in packages},
        "rows": [],
    }
    if options.only and options.results and options.results.exists():
        again = {about.name for about in chosen}
        earlier = json.loads(options.results.read_text())["rows"]
        results["rows"] = [row for row in earlier if row["name"] in known and row["name"] not in again]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    order = list(known)
    for about in chosen:
        row = measure(about, context)
        print(page.line(row), flush=True)
        results["rows"] = sorted([*results["rows"], row], key=lambda each: order.index(each["name"]))
        if options.results:  # after each, so that an interrupted run is not lost
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            options.results.with_suffix(".md").write_text(page.markdown(results))


if __name__ == "__main__":
    main()
