"""What was measured of architectures, as lines and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import table

from .architecture import ENGINES, FAMILIES

Row = dict[str, Any]
# Rounding of a product in float64, for kernels of a condition that networks have.
ALLOWED_IN_FLOAT64 = 1e-11
INTRODUCTION = """\
This page is written by `nox -s models`. Each architecture is built by its own package, tiny, with random weights (all
of them, biases and scales too) and without a download, and is given to `ntk` as it comes, in a process of its own. K
by every engine (`auto`, `autodiff`, `factors`, `gram`) is compared with a kernel of `torch.autograd.grad`, row by row
and one example at a time, on a copy of the module in float64, which shares no code with this library; and the module
is compared with another copy afterwards: hooks, submodules, modes, buffers and outputs.

- **with factors**: of the parameters that outputs depend on, the share whose part of K comes from inputs and output
  gradients of layers; the rest goes to automatic differentiation.
- **engine**: what `auto` takes for products with 16 columns.
- **off by**: ‖K − K₆₄‖ / ‖K₆₄‖, the largest of all engines, for the model in float64 and in float32 (where `gram` is
  tried by `auto` alone); beside the latter how far plain autograd in float32 is off. A † marks models that compute in
  float32 inside even after `.double()`: these are compared at that precision.
- **a column**: time of a product with one column, and of one with 16 for each, over the time of a forward pass without
  gradients on the same 32 examples. These models are so small that the time is that of calls; read it as passes.
"""


def problems(row: Row) -> dict[str, list[str]]:
    """What is refused or wrong, and where."""
    found: dict[str, list[str]] = {}
    for word in ("refusal", "fault"):
        if word in row:
            found.setdefault(f"{word}: {row[word]}", [])
    for precision, engine, one in _outcomes(row):
        texts = [f"{word}: {one[word]}" for word in ("refusal", "fault") if word in one]
        texts += [f"left changed: {one['changed']}"] if "changed" in one else []
        if one.get("error", 0.0) > allowed(row, precision):
            texts.append(f"wrong: off by {one['error']:.1e}, {allowed(row, precision):.1e} allowed")
        for text in texts:
            found.setdefault(text, []).append(f"{engine} in {precision}")
    return found


def allowed(row: Row, precision: str) -> float:
    """How far a kernel may be off: in float32, ten times what plain autograd is off in float32."""
    is_rough = precision == "float32" or row["float32_inside"] is not None
    return max(10 * row["float32_itself"], 1e-6) if is_rough else ALLOWED_IN_FLOAT64


def line(row: Row) -> str:
    """One architecture, for the terminal."""
    text = f"{row['family']:12s} {row['name']:40s}"
    if "covered" in row:
        text += f" {row['num_params']:8,d} parameters, {row['covered']:4.0%} with factors"
    text += "".join(f", {precision} off by {error:.0e}" for precision, error in _errors(row).items())
    if "cost" in row:
        text += f", {row['cost']['engine_16']} {row['cost']['ratio_16']:.1f} passes a column"
    found = problems(row)
    return "\n".join([text, *(f"    {problem} [{_places(places)}]" for problem, places in found.items())])


def markdown(results: dict[str, Any]) -> str:
    """The page: what was asked, a table for each family, what is refused, what has no factors."""
    rows = results["rows"]
    wrong = [row for row in rows if problems(row)]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in results["packages"].items())
    parts = [
        "# Public architectures\n",
        INTRODUCTION,
        f"{len(rows)} architectures, {len(rows) - len(wrong)} right on all engines in both precisions. {versions}; "
        f"Python {results['machine']['python']}.\n",
    ]
    head = ("architecture", "parameters", "with factors", "engine", "off by, float64", "float32 (autograd)")
    for family, title in FAMILIES.items():
        cells = [_cells(row) for row in rows if row["family"] == family]
        if cells:
            parts += [f"## {title}\n", table.grid((*head, "1 column", "a column of 16"), cells), ""]
    if wrong:
        parts += [
            "## Refused, or wrong\n",
            table.grid(("architecture", "where", "what", "with its cure"), _troubles(wrong)),
            "",
        ]
    uncovered = [(row["name"], f"`{name}`", why) for row in rows for name, why in row.get("uncovered", {}).items()]
    if uncovered:
        parts += [
            "## Parameters without factors\n",
            "The first three of each model. Their part of K is made by automatic differentiation, and is as right.\n",
            table.grid(("architecture", "parameter", "why"), uncovered),
            "",
        ]
    return "\n".join(parts)


def _cells(row: Row) -> list[str]:
    name = f"{row['name']} †" if row.get("float32_inside") else row["name"]
    if "built" not in row or "covered" not in row:
        return [name, *(["", "", "see below"] if problems(row) else [""] * 3), *[""] * 4]
    errors = {precision: f"{error:.0e}" for precision, error in _errors(row).items()}
    rough = f"{errors['float32']} ({row['float32_itself']:.0e})" if "float32" in errors else "see below"
    cells = [name, f"{row['num_params']:,}", f"{row['covered']:.0%}"]
    cost = row.get("cost")
    cells += [cost["engine_16"] if cost else "", errors.get("float64", "see below"), rough]
    return cells + ([f"{cost['ratio_1']:.1f}", f"{cost['ratio_16']:.1f}"] if cost else ["", ""])


def _errors(row: Row) -> dict[str, float]:
    """The largest error of any engine, in each precision in which some engine has a kernel."""
    found: dict[str, float] = {}
    for precision, _, one in _outcomes(row):
        if "error" in one:
            found[precision] = max(one["error"], found.get(precision, 0.0))
    return found


def _outcomes(row: Row) -> Iterator[tuple[str, str, Row]]:
    for precision in ENGINES:
        for engine, one in row.get(precision, {}).items():
            yield precision, engine, one


def _troubles(rows: list[Row]) -> Iterator[tuple[str | None, ...]]:
    for row in rows:
        for problem, places in problems(row).items():
            yield row["name"], _places(places), problem, row["cure"]


def _places(places: list[str]) -> str:
    """Where it happens, in as few words as there are."""
    by_precision = {p: tuple(place.split()[0] for place in places if place.endswith(p)) for p in ENGINES}
    if by_precision == ENGINES:
        return "everywhere"
    found = {p: "all" if names == ENGINES[p] else ", ".join(names) for p, names in by_precision.items() if names}
    return "; ".join(f"{names} in {p}" for p, names in found.items())
