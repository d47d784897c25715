"""Every check of the project; each session builds an environment of its own from the tested set of versions."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "docs", "build"]
nox.options.reuse_existing_virtualenvs = True
nox.needs_version = ">=2024.10"

PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
# The tests run one process a core; threads inside them would fight for the same cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _install(session: nox.Session, *groups: str) -> None:
    """Install the package with the main job's extra, and some groups of tools."""
    tools = [tool for group in groups for tool in nox.project.dependency_groups(PYPROJECT, group)]
    session.install(*CONSTRAINTS, "-e", ".[study]", *tools)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, and that imports point down."""
    # Both tools read the code and import nothing of it.
    session.install(*CONSTRAINTS, *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.install("--no-deps", "-e", ".")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    _install(session, "types", "test")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; extra arguments go to pytest."""
    _install(session, "test")
    cores = str(os.cpu_count() or 1)
    session.run("pytest", "-n", cores, "--dist", "worksteal", *session.posargs, env=ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    _install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def bench(session: nox.Session) -> None:
    """Print the benchmarks, each in a process of its own; name some to run only these."""
    _install(session, "test")
    chosen = session.posargs or sorted(p.stem for p in Path("benchmarks").glob("*.py"))
    for name in chosen:
        session.run("python", f"benchmarks/{name}.py")


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it alone, and ask it for its help."""
    session.install(*CONSTRAINTS, "build")
    built = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(built))
    (wheel,) = built.glob("*.whl")
    session.install(*CONSTRAINTS, f"ntk-lazy[study] @ {wheel.resolve().as_uri()}")
    session.run("ntk-lazy", "--help")
