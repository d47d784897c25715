"""A study whose numbers are made up, so that every rule and every sentence can meet the case it is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from test_records import make_record

from ntk_lazy.study.config import StudyConfig, preset
from ntk_lazy.study.evidence import Evidence, Movement
from ntk_lazy.study.portrait import Portrait

CLAIMS = preset("claims")
Numbers = Mapping[str, float]


def usual(step: int, config: StudyConfig = CLAIMS) -> dict[str, float]:
    """Numbers of a snapshot that satisfy all rules: an alignment at the edge, and what follows each halving."""
    phase = sum(step >= h for h in config.halvings)
    into = step - config.phases[phase][0]
    climb = min(1.0, into / (300 if phase == 0 else 4_000))
    return {
        "y20": 0.43 if step == 0 else 0.8 if step < 1_000 else (0.92, 0.90, 0.89)[phase],
        "y200": 0.57 if step == 0 else 0.97,
        "f20": (0.96, 0.93, 0.91)[phase],
        "f200": 0.995,
        "m20": 0.2 if phase == 0 else 0.01,
        "m200": 0.3,
        "stability": 0.6 + 1.4 * climb if phase == 0 else 1 + climb,
        "λ10": 40 * (1 + step / 100),
        "λ100": 0.25 * (1 + step / 80),
        "trace": 7e3 * (1 + step / 500),
        "spectral_position": 0.12 if 0 < step <= 100 else 0.02 if phase == 0 else 1e-4,
        "kernel_target_alignment": 0.006 if step == 0 else 0.33 if step <= 1_000 else 0.28,
        "first_order_error": 0.4 if phase == 0 else 0.1,
        "first_order_cosine": 0.9 if phase == 0 else 0.99,
        "loss": 0.5 / (1 + step / 100),
        "from_start": 0.48,
        "velocity": 4e-3 if step <= 100 else 1e-5 if phase < 2 else 2e-6,
    }


def portrait(step: int, **changes: float) -> Portrait:
    """A portrait of which the claims read nothing but these numbers."""
    first = step == 0
    known = {
        "target_frequency": 2.0,
        "residual_frequency": 2.0 if first else 8.0,
        "frequency_order": 0.9,
        "target_correlation": 0.3 if first else 0.7,
        "edge_auc": 0.55 if first else 0.8,
        "gradient_correlation": -0.2 if first else 0.5,
        "test20": 0.9,
        "test100": 0.96,
        "gaussian": 0.1,
        "shuffled": 0.1,
        **changes,
    }
    nothing = torch.zeros(0)
    return Portrait(
        step=step,
        values=nothing,
        relative_residuals=nothing,
        output=nothing,
        functions=nothing,
        kernel_slice=nothing,
        gradient_norms=nothing,
        mean_frequencies=torch.zeros(100),
        spectra=nothing,
        test_energy=torch.tensor([known["test20"]] * 99 + [known["test100"]] * 101),
        null_energy=torch.tensor([known["gaussian"], known["shuffled"]]),
        scalars=torch.tensor([known[n] for n in list(known)[:6]], dtype=torch.float64),
    )


def study(
    change: Mapping[int, Numbers] | None = None,
    *,
    config: StudyConfig = CLAIMS,
    before: Numbers | None = None,
    after: Numbers | None = None,
    others: tuple[Evidence, ...] = (),
) -> Evidence:
    """Fabricate a finished study that satisfies all rules of one run, then change numbers at some steps."""
    records, movement = [], []
    for step in config.snapshot_steps():
        numbers = {**usual(step, config), **(change or {}).get(step, {})}
        energies = {
            name: (numbers.pop(f"{letter}20"),) * 199 + (numbers.pop(f"{letter}200"),)
            for letter, name in (("y", "target"), ("f", "output"), ("m", "residual"))
        }
        largest = numbers["stability"] * config.num_points / config.lr_at(step)
        values = (largest,) + (numbers.pop("λ10"),) * 49 + (numbers.pop("λ100"),) * 150
        if step:
            movement.append(Movement(step, numbers["from_start"], numbers["velocity"]))
        scalars = {n: v for n, v in numbers.items() if n not in ("from_start", "velocity")}
        records.append(
            make_record(
                step,
                values=values,
                residual_norms=tuple(1e-6 * (i + 1) * v for i, v in enumerate(values)),
                converged=(True,) * 200,
                energies=energies,
                scalars=scalars | {"lr": config.lr_at(step)},
                errors={"kernel_target_alignment": 1e-4},
            )
        )
    return Evidence(
        config,
        tuple(records),
        before=portrait(0, **(before or {})),
        after=portrait(config.steps, **(after or {})),
        movement=tuple(movement),
        others=others,
    )


def at(steps: range, **numbers: float) -> dict[int, Numbers]:
    """Change the same numbers at all snapshots of a range of steps."""
    return {s: numbers for s in CLAIMS.snapshot_steps() if s in steps}


def other(change: Mapping[int, Numbers] | None = None, **settings: object) -> Evidence:
    """A study with some other settings."""
    return study(change, config=dataclasses.replace(CLAIMS, **settings))
