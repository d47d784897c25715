"""``ntk-lazy study`` and ``ntk-lazy report``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from ntk_lazy.errors import ArgumentError, NTKLazyError
from ntk_lazy.study.config import PRESETS, StudyConfig, preset, read_toml

_STUDY_EXAMPLE = """\
example:
  ntk-lazy study
      the demo: a network of 6 x 96 learns 2,000 pixels of a photograph; a report in runs/demo-0 after some minutes
  ntk-lazy study --preset claims --seed 1 --out runs/mine
  ntk-lazy study --steps 3000 --halvings 1500 2500 --num-pairs 100 --out runs/short

A TOML file given with --config holds the same settings by name, for example
  preset = "demo"
  image = "china.jpg"
  halvings = [3000, 5000]
Flags override the file, and the file overrides the preset. A study that was interrupted goes on where it
stopped when the same command is given again.
"""
_REPORT_EXAMPLE = """\
example:
  ntk-lazy report runs/demo-0
      writes report.html, claims.json and figures/ of that study again, finished or not
  ntk-lazy report runs/claims-0 --compare runs/quarter runs/wide runs/two runs/three runs/four
      the same, and decides claims that compare several studies
"""


def add_to(commands: Any) -> None:
    """Add the commands to the parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    study = commands.add_parser(
        "study",
        help="train on a picture, track the spectrum, write a report",
        description="Train the network of the paper on a picture, track the spectrum of its kernel, write a report.",
        epilog=_STUDY_EXAMPLE,
        formatter_class=raw,
    )
    study.add_argument("--preset", help=f"where to start from: {', '.join(PRESETS)} (default: demo)")
    study.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    study.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: runs/PRESET-SEED)")
    for field in dataclasses.fields(StudyConfig):
        is_list = isinstance(field.default, tuple)
        shown = "derived" if field.default == () else field.default
        study.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"setting_{field.name}",
            type=int if is_list else type(field.default),
            nargs="*" if is_list else None,
            metavar="STEP" if is_list else type(field.default).__name__.upper(),
            help=f"{field.metadata['help']} (demo: {shown})",
        )
    study.set_defaults(run=_study)
    report = commands.add_parser(
        "report",
        help="write the report of a study again",
        description="Write the report of a study again from what its folder holds.",
        epilog=_REPORT_EXAMPLE,
        formatter_class=raw,
    )
    report.add_argument("folder", type=Path, help="folder of a study")
    report.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="other studies, for the claims that need several: other depths, a quarter of lr, a wide network",
    )
    report.set_defaults(run=_report)


def _study(arguments: argparse.Namespace) -> int:
    name, config = _settings(arguments)
    folder = arguments.out if arguments.out is not None else Path("runs") / f"{name}-{config.seed}"
    _require_extra()
    from ntk_lazy.study.display import display_for
    from ntk_lazy.study.folder import StudyFolder
    from ntk_lazy.study.run import run_study

    started = time.perf_counter()
    try:
        with display_for(total=config.steps) as display:
            evidence = run_study(config, folder, display=display)
            _print_verdicts(evidence)
            display.say("writing the report")
            path = _write(evidence, StudyFolder(folder))
    except KeyboardInterrupt:
        sys.stderr.write(f"ntk-lazy: interrupted; the same command goes on from the last checkpoint in {folder}\n")
        return 130
    if evidence.unsaved:
        raise NTKLazyError(f"{folder} is not complete, for want of room: {', '.join(evidence.unsaved)}")
    sys.stdout.write(f"report: {path}   ({time.perf_counter() - started:.0f} s)\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    _require_extra()
    from ntk_lazy.study.evidence import Evidence
    from ntk_lazy.study.folder import StudyFolder

    folder = StudyFolder(arguments.folder)
    others = tuple(Evidence.load(StudyFolder(other)) for other in arguments.compare)
    evidence = dataclasses.replace(Evidence.load(folder), others=others)
    _print_verdicts(evidence)
    path = _write(evidence, folder)
    sys.stdout.write(f"report: {path}\n")
    return 0


def _write(evidence: Any, folder: Any) -> Path:
    """Write the report, or say why it cannot be."""
    from ntk_lazy.study.report import write_report

    try:
        return write_report(evidence, folder)
    except OSError as error:
        lost = "".join(f"; {what}" for what in evidence.unsaved)
        raise NTKLazyError(f"the report cannot be written to {folder.path}: {error.strerror}{lost}") from error


def _settings(arguments: argparse.Namespace) -> tuple[str, StudyConfig]:
    """Put preset, file and flags together."""
    from_file = {} if arguments.config is None else read_toml(arguments.config)
    named = from_file.pop("preset", "demo")
    name = arguments.preset if arguments.preset is not None else named
    if not isinstance(name, str):
        raise ArgumentError(f"preset must be a name, not {name!r}.")
    flags = {f.name: getattr(arguments, f"setting_{f.name}") for f in dataclasses.fields(StudyConfig)}
    given = {n: v for n, v in flags.items() if v is not None}
    return name, StudyConfig.from_dict({**from_file, **given}, base=preset(name))


def _require_extra() -> None:
    """Refuse in one line where the packages of the extra are missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"a study needs {error.name}: pip install 'ntk-lazy[study]'") from error


def _print_verdicts(evidence: Any) -> None:
    from ntk_lazy.study.claims import judge

    for claim in judge(evidence):
        sys.stdout.write(f"{claim.name:>4}  {claim.verdict:<12} {claim.measured or claim.reason}\n")
