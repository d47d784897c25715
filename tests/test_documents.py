"""The documents run, name what exists, and name all of it."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import ntk_lazy
from ntk_lazy.cli.main import build_parser
from ntk_lazy.study.config import PRESETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
# Times, and residuals of which only the size is promised, differ from machine to machine.
_UNSTEADY = ("  cost ", "  residuals ", "on the probes they are")
# Which engine is the fastest, and by how much, depends on the rates of the machine.
_PREDICTED = ("  engine ", "  chunks ", "  memory ", "  work ", "  predict ", " " * 11)
_RELATIVE, _ABSOLUTE = 0.25, 0.05


def _blocks(page: Path) -> list[tuple[int, str, str]]:
    """List the fenced blocks of a page: line, language and text."""
    text = page.read_text(encoding="utf-8")
    return [(text[: f.start()].count("\n") + 2, f["language"], f["text"]) for f in _FENCE.finditer(text)]


def _run(page: Path) -> list[tuple[int, str, str]]:
    """Execute the Python blocks of a page in order, in one namespace.

    Returns:
        For each block that is followed by one of text: its line, what it printed, and what the page says.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    compared = []
    for line, language, text in _blocks(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            compared.append((line, printed, text))
            printed = None
    return compared


def _check_output(where: str, printed: str, shown: str) -> None:
    """Require the same words, and numbers that agree as well as two machines do."""
    printed, shown = (
        "\n".join(line for line in text.splitlines() if not line.startswith(_PREDICTED)) for text in (printed, shown)
    )
    assert _NUMBER.sub("#", printed).split() == _NUMBER.sub("#", shown).split(), f"{where} prints:\n{printed}"
    for got, said in zip(printed.splitlines(), shown.splitlines(), strict=True):
        if got.startswith(_UNSTEADY):
            continue
        for a, b in zip(_NUMBER.finditer(got), _NUMBER.finditer(said), strict=True):
            x, z = (float(found[0].replace(",", "")) for found in (a, b))
            assert abs(x - z) <= _ABSOLUTE * (abs(z) < 1) + _RELATIVE * abs(z), f"{where} prints:\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{p}.md" for p in ("tutorial", "how-it-fits", "gp", "uncertainty"))]
)
def test_every_block_of_python_runs_and_prints_what_the_page_shows(name, tmp_path, monkeypatch):
    if "from botorch" in (ROOT / name).read_text(encoding="utf-8"):
        pytest.importorskip("botorch", reason="BoTorch is not installed")
    monkeypatch.chdir(tmp_path)
    compared = _run(ROOT / name)
    assert compared
    for line, printed, shown in compared:
        _check_output(f"{name}:{line}", printed, shown)


@pytest.mark.slow
def test_examples_in_docstrings_do_what_they_say():
    failed = 0
    for module in pkgutil.walk_packages(ntk_lazy.__path__, "ntk_lazy."):
        if not module.name.endswith("__main__"):
            failed += doctest.testmod(importlib.import_module(module.name)).failed
    assert failed == 0


def test_every_public_name_has_an_entry_in_the_reference_and_no_entry_is_of_another_name():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    entries = re.findall(
        r"^\.\. auto(?:class|function|exception):: ntk_lazy\.((?:gp\.)?\w+)(?:\(\))?$", text, re.MULTILINE
    )
    assert sorted(entries) == sorted([*ntk_lazy.__all__, *(f"gp.{name}" for name in ntk_lazy.gp.__all__)])


def _commands() -> dict[str, argparse.ArgumentParser]:
    (chosen,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return chosen.choices


@pytest.mark.parametrize("command", sorted(_commands()))
def test_every_option_of_a_command_is_in_its_section_and_no_other(command):
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `ntk-lazy (\w+)[^`]*`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    shared = re.search(r"^## Options of a model\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert shared is not None
    options = {o for action in _commands()[command]._actions for o in action.option_strings} - {"-h", "--help"}
    documented = set(re.findall(r"^\| `(--?[\w-]+)", sections[command], re.MULTILINE))
    if "--model" in options:
        documented |= set(re.findall(r"^\| `(--?[\w-]+)", shared[1], re.MULTILINE))
    assert documented == options


def test_table_of_presets_shows_their_sizes_and_steps():
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) × (\d+) \| ([\d,]+) \|", page, re.MULTILINE)
    shown = {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in rows}
    assert shown == {name: (c.num_points, c.num_layers, c.width, c.steps) for name, c in PRESETS.items()}


def test_layers_in_the_document_are_those_that_are_enforced():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c.get("containers") == ["ntk_lazy"])
    enforced = [name for layer in layers if not layer.startswith("(") for name in re.findall(r"\w+", layer)]
    page = (DOCS / "how-it-fits.md").read_text(encoding="utf-8").partition("## Layers of the code")[2]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"\w+", row)]
    assert sorted(named) == sorted(enforced)
    # Names of one row of the table may stand in any order; rows may not.
    place = {name: i for i, row in enumerate(rows) for name in re.findall(r"\w+", row)}
    order = [place[name] for name in enforced]
    assert order == sorted(order)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def test_readme_gives_the_two_commands_that_are_checked():
    commands = [text for _, language, text in _blocks(ROOT / "README.md") if language == "bash"]
    assert 'pip install -c constraints.txt ".[study]" && ntk-lazy study\n' in "".join(commands)
    assert "pip install -c constraints.txt nox && nox -s tests\n" in "".join(commands)


def test_pictures_of_the_documents_are_small():
    heavy = {p.name for p in (DOCS / "images").iterdir() if p.stat().st_size > 300_000}
    assert heavy == set()
