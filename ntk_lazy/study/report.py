"""Turn what a study has measured into one page that needs nothing else, and the figures as files."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2

from ntk_lazy.records import SpectrumRecord, versions
from ntk_lazy.study.canvas import as_png, look
from ntk_lazy.study.claims import Claim, judge
from ntk_lazy.study.config import PRESETS, StudyConfig
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.folder import StudyFolder, write_bytes, write_text
from ntk_lazy.study.sections import sections_of

_ENERGY_INDEX = 20


def write_report(evidence: Evidence, folder: StudyFolder) -> Path:
    """Write ``report.html``, ``claims.json`` and the figures; a study that has not ended gets what there is.

    Returns:
        The path of the report.

    Cost: some seconds, most of it for the figures; no product.
    """
    claims = judge(evidence)
    sections = []
    folder.figures.mkdir(exist_ok=True)
    with look():
        for section in sections_of(evidence):
            images = []
            for image in section.images:
                content = as_png(image.draw())
                write_bytes(folder.figures / f"{image.name}.png", content)
                images.append({"data": base64.b64encode(content).decode(), "caption": image.caption})
            sections.append({"title": section.title, "text": section.text, "images": images})
    write_text(folder.claims, json.dumps([dataclasses.asdict(c) for c in claims], indent=2, ensure_ascii=False) + "\n")
    write_text(folder.report, _render(evidence, claims, sections, folder.read_environment()))
    return folder.report


def _render(
    evidence: Evidence, claims: list[Claim], sections: list[dict[str, Any]], environment: dict[str, Any]
) -> str:
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("ntk_lazy.study"), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.j2")
    config = evidence.config
    k = min(_ENERGY_INDEX, config.num_pairs)
    done = len(evidence.records)
    wanted = len(config.snapshot_steps())
    return template.render(
        title=f"Neural spectrum alignment on {Path(config.image).name}",
        summary=_summary(config),
        unfinished="" if evidence.is_finished else f"This study has not ended: {done} of {wanted} snapshots are there.",
        failures=[note for r in evidence.records if (note := _failure(r))],
        numbers=_numbers(evidence, claims, k),
        claims=claims,
        figures=sections,
        k=k,
        snapshots=[_row(r, k) for r in evidence.usable],
        command=command_line(config),
        times=_times(evidence),
        settings=json.dumps(config.to_dict(), indent=2),
        environment=json.dumps(environment, indent=2),
        version=versions().get("ntk-lazy", "(not installed)"),
    )


def command_line(config: StudyConfig) -> str:
    """Return the command that repeats the study, from the preset with the fewest differences."""
    name, base = min(PRESETS.items(), key=lambda item: len(config.differences(item[1])))
    mine, theirs = config.to_dict(), base.to_dict()
    flags = [
        f"--{n.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
        for n, v in mine.items()
        if v != theirs[n]
    ]
    return " ".join(["ntk-lazy study --preset", name, *flags])


def _summary(config: StudyConfig) -> str:
    halvings = (
        "never halved" if not config.halvings else "halved at step " + ", ".join(f"{h:,}" for h in config.halvings)
    )
    return (
        f"A fully connected Leaky-ReLU network of {config.num_layers} weight layers and width {config.width} learns "
        f"{config.num_points:,} pixels of a picture by {config.steps:,} steps of full-batch gradient descent, "
        f"learning rate δ = {config.lr:g}, {halvings}. At {len(config.snapshot_steps())} steps the leading "
        f"{config.num_pairs} eigenpairs of its neural tangent kernel K = J Jᵀ on these pixels were computed without "
        "writing K down."
    )


def _numbers(evidence: Evidence, claims: list[Claim], k: int) -> list[dict[str, str]]:
    count = {v: sum(c.verdict == v for c in claims) for v in ("pass", "fail", "not decided")}
    found = [
        {"value": f"{count['pass']} of {count['pass'] + count['fail']}", "label": "claims that this run decides hold"}
    ]
    if evidence.usable:
        first, last = evidence.usable[0], evidence.usable[-1]
        worst = max(_worst_residual(r) for r in evidence.usable)
        found += [
            {
                "value": f"{first.energy('target', k):.2f} → {last.energy('target', k):.2f}",
                "label": f"of the target in the top {k} eigenvectors",
            },
            {"value": _ratio(first, last), "label": f"largest eigenvalue, step {last.step:,} to step {first.step:,}"},
            {"value": f"{last.scalar('loss'):.4f}", "label": f"training loss at step {last.step:,}"},
            {"value": f"{worst:.0e}", "label": "largest relative residual of any pair"},
        ]
    return found


def _ratio(first: SpectrumRecord, last: SpectrumRecord) -> str:
    return f"{last.values[0] / first.values[0]:.2g} ×" if first.values[0] > 0 else "–"


def _failure(record: SpectrumRecord) -> str:
    if not record.is_usable:
        return f"Step {record.step:,}: no spectrum. {record.message}"
    return f"Step {record.step:,}: not measured: {record.failures_in_words}" if record.failures else ""


def _times(evidence: Evidence) -> str:
    solving = sum(r.cost.get("seconds", 0.0) for r in evidence.usable)
    recording = sum(r.cost.get("record_seconds", 0.0) for r in evidence.records)
    return (
        f"The training took {evidence.training_seconds:.0f} s and the {len(evidence.records)} snapshots "
        f"{recording:.0f} s, {solving:.0f} s of them in the eigensolver."
    )


def _worst_residual(record: SpectrumRecord) -> float:
    return max((r / v for r, v in zip(record.residual_norms, record.values, strict=True) if v > 0), default=0.0)


def _row(record: SpectrumRecord, k: int) -> list[str]:
    rank = f"{record.scalar('effective_rank'):.1f}"
    error = record.errors.get("effective_rank", 0.0)
    return [
        f"{record.step:,}",
        f"{record.scalar('lr'):g}",
        f"{record.scalar('loss'):.4f}",
        f"{record.values[0]:.3g}",
        f"{record.scalar('stability'):.2f}",
        *(f"{record.energy(n, k):.3f}" for n in ("target", "output", "residual")),
        f"{rank} ± {error:.0e}" if error else rank,
        f"{record.num_trusted} of {len(record.values)}",
        f"{_worst_residual(record):.0e}",
        f"{record.noise_floor:.0e}",
        f"{record.cost.get('columns', 0):,.0f}",
        f"{record.cost.get('record_seconds', 0):.1f}",
    ]
