"""Audit the memory budget: what each job holds beside its operands and its result, over the budget that it was given.

Run: ``python benchmarks/memory.py [--model mlp] [--engine auto] [--results docs/memory.json] [--page docs/memory.md]``.
Peaks of a process of its own for each job, as Linux counts them; independent of the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers.memory_jobs import FIRST, JOBS, MODELS

ENGINES = ("auto", "autodiff", "factors", "gram")
# The smallest serves one column; a parameter vector of the wide model takes 69 MB.
BUDGETS = dict.fromkeys(MODELS, (50, 100, 200)) | {"wide": (300, 600, 1200)}
ALLOWED, PREDICTED = 1.1, (0.7, 1.3)
_WORKER = Path(__file__).parent / "workers" / "memory_jobs.py"


def audit(model: str, engine: str, megabytes: int, jobs: list[str]) -> Iterator[dict[str, Any]]:
    """Run all jobs of one kernel, and tell of each as it ends."""
    budget = megabytes * 1_000_000
    command = [sys.executable, str(_WORKER), model, engine, str(budget), *jobs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            yield {"model": model, "engine": engine, "budget": budget} | json.loads(line)
    if worker.returncode:
        raise SystemExit(f"{model}, {engine}, {megabytes} MB: the worker ended with {worker.returncode}.")


def page(rows: list[dict[str, Any]]) -> str:
    """Write the page: for each model and job the largest share of the budget, over engines and budgets."""
    shares = [row["held"] / row["budget"] for row in rows if "held" in row]
    over = [row for row in rows if "held" in row and row["held"] > ALLOWED * row["budget"]]
    known = [row for row in rows if row.get("predicted")]
    ratios = sorted(row["held"] / row["predicted"] for row in known)
    lines = [
        "# Memory, audited",
        "",
        "This page is written by `python benchmarks/memory.py --page docs/memory.md`. Each number is the peak of a "
        "process of its own beside what it held before and beside the result, over the memory budget: the most over "
        f"the engines {', '.join(f'`{engine}`' for engine in dict.fromkeys(row['engine'] for row in rows))} and the "
        f"budgets {_listed(rows)} (the largest for `wide`, where a parameter vector alone takes 69 MB). "
        "A job that does not fit is refused, and the error names the budget that would do. `-`: not audited.",
        "",
        f"{len(shares)} jobs ran, {sum('refused' in row for row in rows)} were refused, {len(over)} held more than "
        f"{ALLOWED} of the budget. Of the prediction of a product, `K.explain(k).predicted_bytes`, the median job held "
        f"{ratios[len(ratios) // 2]:.2f}, and all between {ratios[0]:.2f} and {ratios[-1]:.2f}."
        if ratios
        else "",
        "",
        f"| job | {' | '.join(MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for job in (FIRST, *JOBS):
        cells = []
        for model in MODELS:
            held = [r["held"] / r["budget"] for r in rows if r["job"] == job and r["model"] == model and "held" in r]
            is_refused = any(r["job"] == job and r["model"] == model and "refused" in r for r in rows)
            cells.append(f"{max(held):.2f}" if held else "refused" if is_refused else "-")
        lines.append(f"| {job} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _listed(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{budget / 1e6:.0f} MB" for budget in sorted({row["budget"] for row in rows}))


def main() -> None:
    """Print each job, and write results and page where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="all by default")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="all by default")
    parser.add_argument("--job", choices=(FIRST, *JOBS), action="append", help="all by default")
    parser.add_argument("--smallest", action="store_true", help="the smallest budget alone")
    parser.add_argument("--results", type=Path, help="JSON")
    parser.add_argument("--page", type=Path, help="Markdown")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in options.model or MODELS:
        for engine in options.engine or ENGINES:
            for megabytes in BUDGETS[model][: 1 if options.smallest else None]:
                for row in audit(model, engine, megabytes, options.job or [FIRST, *JOBS]):
                    rows.append(row)
                    print(_line(row), flush=True)
                # After each kernel: the whole takes an hour.
                if options.results:
                    options.results.write_text(json.dumps(rows, indent=1) + "\n")
                if options.page:
                    options.page.write_text(page(rows))


def _line(row: dict[str, Any]) -> str:
    lead = f"{row['model']:12} {row['engine']:9} {row['budget'] / 1e6:6.0f} MB  {row['job']:26}"
    if "held" not in row:
        return f"{lead} {row.get('refused', 'failed')[:60]}"
    share = row["held"] / row["budget"]
    predicted = row.get("predicted")
    ratio = f"  {row['held'] / predicted:6.2f} of the prediction" if predicted else ""
    return f"{lead} {share:6.2f}{' <--' if share > ALLOWED else ''}{ratio}"


if __name__ == "__main__":
    main()
