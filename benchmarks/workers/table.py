"""Results as lines, as a page, and beside what was asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]
_PRIMME = ("primme", "primme default")


def seconds(run: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; what is None stays empty."""
    cells = [["" if cell is None else str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def line(row: Row) -> str:
    """One result."""
    head = f"{row['measure']:42s} {row['tool']:20s}"
    if "failure" in row:
        return f"{head} {row['failure']}"
    a_column = f"{row['seconds'] / row['k']:10.5f} s a column" if row["task"] == "product" else ""
    return (
        f"{head} {row['seconds']:9.3f} s (first {row['first_seconds']:8.3f}) {a_column:22s} "
        f"{row['peak_bytes'] / 1e9:7.3f} GB  off by {row['error']:.0e}"
    )


def rate(results: dict[str, Any], row: Row) -> float:
    """The best rate of float32 matrix products that the machine showed in the run of a row."""
    return row.get("gflops", max(results["machine"]["gflops"].values())) * 1e9


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Put the jobs of a later run in the place of the same ones, all tools of a job, with the rate of their own run."""
    best = max(later["machine"]["gflops"].values())
    rows = [row | {"gflops": best} for row in later["rows"]]
    again = {row["measure"] for row in rows}
    names = dict.fromkeys(row["measure"] for row in (*earlier["rows"], *rows))
    found = [row for name in names for row in (rows if name in again else earlier["rows"]) if row["measure"] == name]
    columns = later["columns"] or earlier["columns"]
    return earlier | {"rows": found, "columns": columns}


def bars(results: dict[str, Any]) -> str:
    """What was asked of each case, beside what came out."""
    return "\n".join(f"{'met   ' if met else 'MISSED'} {text}" for met, text in _bars(results))


def markdown(results: dict[str, Any]) -> str:
    """The page: machine, bars, and all rows."""
    about = results["machine"]
    rates = ", ".join(f"{name} {value:.0f}" for name, value in about["gflops"].items())
    parts = [
        "# Measured beside other libraries\n",
        "This page is written by `nox -s bench`. Each line is one job in a process of its own; its result was compared "
        "with plain `torch.func` in float64 before its time counted. A ReLU network differs in float32 where rounding "
        "takes an input across zero, in each library elsewhere: products by up to 1e-3, residuals of small eigenvalues "
        "by up to 5e-2. As much as `torch.func` itself differs in float32 is allowed for. "
        "Compare lines of one table with each other, and nothing with another machine.\n",
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, Python {about['python']}. "
        f"Float32 matrix products of 2048 rows at the start, in GFLOP/s: {rates}.\n",
        *_again(results),
        "## What was asked\n",
        grid(("case", ""), ((text, "met" if met else "**missed**") for met, text in _bars(results))),
        "\n## How far from the floor\n",
        "Operations that a job cannot do without, at the best rate of matrix products that any library showed at the "
        "start. Passes through the model, which are not counted, take half of a dense kernel of the cnn or the "
        "transformer; tiles of K have 256 terms to a sum, and do not reach the rate of long ones.\n",
        grid(("job", "operations", "seconds at that rate", "ntk_lazy", "best peer"), _floors(results)),
        "\n## All measures\n",
        "`first` includes making the kernel and whatever is kept afterwards, or compiled; memory is the peak beyond "
        "what the process held with its libraries and data loaded.\n",
        grid(("job", "library", "seconds", "a column", "first", "peak GB", "off by"), map(_cells, results["rows"])),
        "\n## Products of a search\n",
        "The operator times one column, for 100 pairs of 1,000 rows to 1e-3, in blocks of 16. Here residuals are "
        "relative to each eigenvalue; PRIMME was given the absolute tolerance that this means, which nobody knows "
        "beforehand.\n",
        grid(
            ("spectrum", "search", "with probe and certificate", "PRIMME, ncv = 2k + 96", "PRIMME, default ncv"),
            ([r["spectrum"], r["search"], r["all"], *map(r.get, _PRIMME)] for r in results["columns"]),
        ),
    ]
    return "\n".join(parts) + "\n"


def _again(results: dict[str, Any]) -> Iterator[str]:
    """Say which jobs are of a later run."""
    later = {row["measure"]: row["gflops"] for row in results["rows"] if "gflops" in row}
    if later:
        names = "; ".join(f"{name} (best product {gflops:.0f})" for name, gflops in later.items())
        yield f"Measured again in a later run, this library and its peers: {names}.\n"


def _cells(row: Row) -> list[str]:
    head = [row["measure"], row["tool"]]
    if "failure" in row:
        return [*head, row["failure"], "", "", "", ""]
    a_column = f"{row['seconds'] / row['k']:.5f}" if row["task"] == "product" else ""
    memory = f"{row['peak_bytes'] / 1e9:.2f}"
    return [*head, f"{row['seconds']:.3f}", a_column, f"{row['first_seconds']:.2f}", memory, f"{row['error']:.0e}"]


def _found(results: dict[str, Any]) -> Callable[[str, str, int, int], dict[str, Row]]:
    """Look up the rows of a job, by tool."""
    rows = [row for row in results["rows"] if "failure" not in row]

    def of(case: str, task: str, n: int, k: int) -> dict[str, Row]:
        wanted = (case, task, n, k)
        return {r["tool"]: r for r in rows if (r["case"], r["task"], r["num_examples"], r["k"]) == wanted}

    return of


def _floors(results: dict[str, Any]) -> Iterator[list[str]]:
    """Count what the jobs cannot do without, and put their times beside it."""
    of = _found(results)

    def half_of_kernel(n: int, terms: int) -> float:
        return float(n * n * terms)

    # Inputs and gradients of its six layers; rows of J for the others.
    mlp = half_of_kernel(10_000, (2 + 5 * 256) + (5 * 256 + 1))
    jobs: list[tuple[str, str, int, int, Callable[[Row], float]]] = [
        ("mlp", "dense", 10_000, 0, lambda row: mlp),
        # Eight columns are multiplied afresh, by the layers.
        (
            "mlp",
            "eigen",
            10_000,
            200,
            lambda row: mlp + 2.0 * 10_000**2 * (row["columns"] - 8) + 8 * 4.0 * 10_000 * row["num_params"],
        ),
        ("mlp", "product", 50_000, 32, lambda row: 4.0 * 50_000 * row["num_params"] * 32),
        ("mlp", "eigen", 273_280, 20, lambda row: 4.0 * 273_280 * row["num_params"] * row["columns"]),
        ("cnn", "dense", 2_000, 0, lambda row: half_of_kernel(2_000, row["num_params"])),
        ("transformer", "dense", 2_000, 0, lambda row: half_of_kernel(2_000, row["num_params"])),
    ]
    for case, task, n, k, operations in jobs:
        found = of(case, task, n, k)
        ours = found.pop("ntk_lazy", None)
        if ours is not None:
            peer = min((row["seconds"] for row in found.values()), default=None)
            count = operations(ours)
            least, best = count / rate(results, ours), "" if peer is None else f"{peer:.1f} s"
            yield [ours["measure"], f"{count:.1e}", f"{least:.1f} s", f"{ours['seconds']:.1f} s", best]


def _bars(results: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    of = _found(results)
    found = of("mlp", "eigen", 10_000, 200)
    if len(found) > 1:
        ours, peer = found.pop("ntk_lazy"), min(found.values(), key=lambda r: r["seconds"])
        yield _faster("200 pairs, N = 10,000", ours, peer, 10)
        yield _smaller("200 pairs, N = 10,000", ours, peer, 0.25)
    found = of("mlp", "dense", 10_000, 0)
    if len(found) > 1:
        yield _faster("dense K, N = 10,000", found["ntk_lazy"], found["neural-tangents (3)"], 12)
    for k, tool, asked in ((32, "curvlinops", 3.0), (8, "neural-tangents", 2.0)):
        found = of("mlp", "product", 50_000, k)
        if tool in found:
            yield _faster(f"product, N = 50,000, k = {k}", found["ntk_lazy"], found[tool], asked)
        if k == 32 and "ntk_lazy" in found:
            best = rate(results, found["ntk_lazy"])
            share = 4.0 * 50_000 * found["ntk_lazy"]["num_params"] * k / found["ntk_lazy"]["seconds"] / best
            yield share >= 0.6, f"product, N = 50,000, k = 32: {share:.0%} of the best matrix product, 60 % asked"
    for case, k, asked in (
        ("cnn", 16, 8),
        ("cnn", 64, 25),
        ("transformer", 16, 12),
        ("transformer", 64, 50),
        ("cnn, C=10", 16, 1.5),
        ("cnn, C=10", 64, 5),
        ("transformer, C=10", 16, 1.5),
        ("transformer, C=10", 64, 5),
    ):
        found = of(case, "product", 256, k)
        peers = [found[tool] for tool in ("curvlinops", "neural-tangents") if tool in found]
        if peers and "ntk_lazy" in found:
            yield _faster(f"product, {case}, k = {k}", found["ntk_lazy"], min(peers, key=lambda r: r["seconds"]), asked)
    for case in ("cnn", "transformer"):
        found = of(case, "dense", 2_000, 0)
        peers = [row for tool, row in found.items() if tool.startswith("neural-tangents")]
        if peers and "ntk_lazy" in found:
            peer = min(peers, key=lambda r: r["seconds"])
            yield _faster(f"dense K of 2,000, {case}", found["ntk_lazy"], peer, 2)
            yield _smaller(f"dense K of 2,000, {case}", found["ntk_lazy"], peer, 0.5)
    found = of("mlp", "eigen", 273_280, 20)
    if "ntk_lazy" in found:
        ours = found["ntk_lazy"]
        limit = 2 * ours["columns"] * 4.0 * 273_280 * ours["num_params"] / rate(results, ours)
        took = f"{ours['seconds']:.0f} s for {ours['columns']} columns"
        yield ours["seconds"] <= limit, f"20 pairs, N = 273,280: {took}, at most {limit:.0f} s asked"
        memory = ours["peak_bytes"] / 1e9
        yield memory < 6, f"20 pairs, N = 273,280: {memory:.1f} GB, less than 6 GB asked"
    counts = [row for row in results["columns"] if "primme" in row]
    for name, asked in (("primme", 1.1), ("primme default", 0.7)):
        if counts:
            # The mean of ratios: no spectrum counts for more than another.
            ratio = math.exp(sum(math.log(row["search"] / row[name]) for row in counts) / len(counts))
            yield ratio <= asked, f"products of a search: {ratio:.2f} of those of {name}, {asked:g} asked"


def _faster(what: str, ours: Row, peer: Row, asked: float) -> tuple[bool, str]:
    ratio = peer["seconds"] / ours["seconds"]
    return ratio >= asked, f"{what}: {ratio:.1f} times as fast as {peer['tool']}, {asked:g} asked"


def _smaller(what: str, ours: Row, peer: Row, asked: float) -> tuple[bool, str]:
    ratio = ours["peak_bytes"] / peer["peak_bytes"]
    return ratio <= asked, f"{what}: {ratio:.2f} of the memory of {peer['tool']}, {asked:g} asked"
