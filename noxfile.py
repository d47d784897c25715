"""Every check of the project; each session builds an environment of its own from the tested set of versions."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed

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


# What decides in which order sums are added up, and what plans choose: see tests/fingerprint.py and tests/machine.py.
VARIANTS = {
    "as it is": {},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch with AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "MKL with AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL with AVX-512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "MKL with SSE2": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "TESTS_ROUTE": "onednn"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "TESTS_ROUTE": "onednn"},
    "oneDNN as it is": {"TESTS_ROUTE": "onednn"},
    "two threads": dict.fromkeys(ONE_THREAD, "2"),
    "a machine of fast products": {"TESTS_MACHINE": "fast products"},
    "a machine of slow products": {"TESTS_MACHINE": "slow products"},
    "the machine that is measured": {"TESTS_MACHINE": "measured"},
}


@nox.session
def portability(session: nox.Session) -> None:
    """Run the tests with each set of instructions and number of threads of this machine; arguments go to pytest."""
    _install(session, "test")
    reports, table, known = Path(session.create_tmp()).resolve(), {}, set()
    for name, variant in VARIANTS.items():
        env = {**ONE_THREAD, **variant}
        mark = str(session.run("python", "tests/fingerprint.py", env=env, silent=True)).split()[-2:]
        kernels = (*mark, *(pair for pair in env.items() if pair[0].startswith(("TESTS_", "OMP_"))))
        if int(env["OMP_NUM_THREADS"]) > (os.cpu_count() or 1):
            table[name] = "not run: there is one core"
        elif kernels in known:
            table[name] = "not run: this processor multiplies with the same kernels, to the bit, as in a line above"
        else:
            known.add(kernels)
            report = reports / f"{name.replace(' ', '-')}.xml"
            workers = max(1, (os.cpu_count() or 1) // int(env["OMP_NUM_THREADS"]))
            options = ("-n", str(workers), "--dist", "worksteal", f"--junitxml={report}", *session.posargs)
            session.run("pytest", *options, env=env, success_codes=range(256))
            table[name] = f"{mark[0]} {mark[1]}: {_outcome(report)}"
    for name, outcome in table.items():
        session.log(f"{name:<30} {outcome}")
    if any("FAILED" in outcome for outcome in table.values()):
        session.error("see the lines with FAILED")


def _outcome(report: Path) -> str:
    """Say in a line what a run of pytest came to."""
    if not report.exists():
        return "FAILED: no report was written"
    suite = next(ElementTree.parse(report).iter("testsuite"))
    wrong = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    counts = f"{int(suite.get('tests', 0)) - len(wrong)} of {suite.get('tests')} passed or skipped"
    return f"{counts}, FAILED: {', '.join(map(str, wrong))}" if wrong else counts


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    _install(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


# Other libraries, each set at versions that work together, in environments of their own.
PEERS = {
    "torch": (*CONSTRAINTS, "torch", "curvlinops-for-pytorch==3.0.1", "nngeometry==0.4", "scipy"),
    "jax": (
        "neural-tangents==0.6.5",
        "jax==0.4.23",
        "jaxlib==0.4.23",
        "numpy==1.26.4",
        "scipy==1.12.0",
        "tf2jax==0.3.5",
    ),
    "primme": ("primme==3.2.3", "numpy", "scipy"),
}


def _peers(session: nox.Session) -> list[str]:
    """Make the environments that can be made: PRIMME has no wheels and needs LAPACK's headers."""
    found = []
    for name, packages in PEERS.items():
        folder = Path(session.create_tmp()).resolve() / name
        python = folder / "bin" / "python"
        try:
            if not (folder / "complete").exists():
                session.run("python", "-m", "venv", str(folder))
                session.run(str(python), "-m", "pip", "install", "--quiet", *packages, external=True)
                (folder / "complete").touch()
        except CommandFailed:
            session.warn(f"{name} could not be installed: its measures are left out")
        else:
            found.append(f"--python={name}={python}")
    return found


@nox.session
def bench(session: nox.Session) -> None:
    """Print the benchmarks, each in a process of its own; name some to run only these."""
    _install(session, "test")
    chosen = session.posargs or sorted(p.stem for p in Path("benchmarks").glob("*.py") if p.stem != "models")
    for name in chosen:
        more = [*_peers(session), "--results", "docs/benchmarks.json"] if name == "peers" else []
        session.run("python", f"benchmarks/{name}.py", *more)


# Public architectures. vit-pytorch wants torchvision, which none of its models here use; PyPI's is not for CPUs.
ARCHITECTURES = (
    "transformers==5.24.0",
    "torch-geometric==2.8.1",
    "e3nn==0.6.0",
    "pykan==0.2.8",
    "siren-pytorch==0.1.7",
    "torchdiffeq==0.2.5",
    "peft==0.21.2",
)
WITHOUT_DEPENDENCIES = ("vit-pytorch==1.26.14",)
# What pykan and vit-pytorch import without saying so, or say among what is left out.
UNDECLARED = ("matplotlib", "pandas", "scikit-learn", "tqdm", "pyyaml", "einops")


@nox.session
def models(session: nox.Session) -> None:
    """Try public architectures, and write their page; extra arguments go to the script."""
    session.install(*CONSTRAINTS, "-e", ".", *UNDECLARED)
    # One by one: a package that cannot be had is a line of the page, not the end.
    for package in (*ARCHITECTURES, *WITHOUT_DEPENDENCIES):
        alone = ("--no-deps",) if package in WITHOUT_DEPENDENCIES else ()
        try:
            session.install(*CONSTRAINTS, *alone, package)
        except CommandFailed:
            session.warn(f"{package} could not be installed: its models are left out")
    session.run("python", "benchmarks/models.py", "--results", "docs/models.json", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it alone, and ask it for its help."""
    session.install(*CONSTRAINTS, "build")
    built = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(built))
    (wheel,) = built.glob("*.whl")
    session.install(*CONSTRAINTS, f"ntk-lazy[study] @ {wheel.resolve().as_uri()}")
    session.run("ntk-lazy", "--help")
