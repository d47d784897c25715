"""What a study has measured, in the form in which claims and figures read it."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from linear_operator.operators import RootLinearOperator

from ntk_lazy.alignment import kernel_distance
from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import ArgumentError
from ntk_lazy.records import SpectrumRecord, read_records
from ntk_lazy.study.config import StudyConfig
from ntk_lazy.study.folder import StudyFolder
from ntk_lazy.study.portrait import Portrait

_LOG = logging.getLogger(__name__)
_LATE_SHARE = 0.45


@final
@dataclass(frozen=True)
class Movement:
    """How far the kernel has turned, measured on the part of it that the recorded pairs hold.

    Attributes:
        step: Step of training.
        from_start: Kernel distance S to the first kernel.
        velocity: Kernel distance to the kernel of the snapshot before, for each step between them.
    """

    step: int
    from_start: float
    velocity: float


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """The records of a study in the order of their steps, and portraits of its first and last network.

    Attributes:
        config: The settings.
        records: Every snapshot, those without a spectrum included.
        before: Portrait at step 0; None while the study has not got that far.
        after: Portrait at the last step; None until the study has ended.
        movement: How the kernel has turned, at every snapshot but the first.
        losses: Steps and training losses, finer than the snapshots.
        training_seconds: Wall time of the training alone.
        unsaved: What the folder had no room for, in words.
        others: Finished studies with other settings, for the claims that compare several.
    """

    config: StudyConfig
    records: tuple[SpectrumRecord, ...]
    before: Portrait | None = None
    after: Portrait | None = None
    movement: tuple[Movement, ...] = ()
    losses: tuple[np.ndarray, np.ndarray] | None = None
    training_seconds: float = 0.0
    unsaved: tuple[str, ...] = ()
    others: tuple[Evidence, ...] = ()

    @classmethod
    def load(cls, folder: StudyFolder) -> Evidence:
        """Read what a study has measured so far.

        Raises:
            ArgumentError: The folder holds no study, or a file in it is damaged.
        """
        config = folder.read_config()
        records = tuple(sorted(read_records(folder.records), key=lambda r: r.step)) if folder.records.exists() else ()
        portraits = [Portrait.load(path) if path.exists() else None for path in (folder.before, folder.after)]
        return cls(
            config=config,
            records=records,
            before=portraits[0],
            after=portraits[1],
            movement=movement_of(folder.path, records),
            losses=folder.read_losses(config),
            training_seconds=folder.read_training_seconds(),
        )

    @property
    def is_finished(self) -> bool:
        """Whether every snapshot has been taken, successfully or not."""
        return {r.step for r in self.records} >= set(self.config.snapshot_steps())

    @property
    def usable(self) -> tuple[SpectrumRecord, ...]:
        """The records that hold a spectrum."""
        return tuple(r for r in self.records if r.is_usable)

    @property
    def first(self) -> SpectrumRecord | None:
        """The record of step 0, if it holds a spectrum."""
        return self.at(0)

    @property
    def last(self) -> SpectrumRecord | None:
        """The record of the last step, if it holds a spectrum."""
        return self.at(self.config.steps)

    def at(self, step: int) -> SpectrumRecord | None:
        """Return the record of a step, or None."""
        return next((r for r in self.usable if r.step == step), None)

    def between(self, start: int, stop: int) -> tuple[SpectrumRecord, ...]:
        """Return the records of steps ``start <= step < stop``."""
        return tuple(r for r in self.usable if start <= r.step < stop)

    def late(self, phase: int) -> tuple[SpectrumRecord, ...]:
        """Return the records of the later part of a phase: several, because of oscillations at the edge."""
        start, end = self.config.phases[phase]
        stop = end + 1 if end == self.config.steps else end
        return self.between(start + math.ceil(_LATE_SHARE * (end - start)), stop)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of a named scalar, where it was measured."""
        points = [(r.step, r.scalar(name)) for r in self.usable if math.isfinite(r.scalar(name))]
        return np.array([p[0] for p in points]), np.array([p[1] for p in points])

    def energy_curve(self, name: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and values of ``E(name, k)``, where it was measured."""
        points = [(r.step, r.energy(name, k)) for r in self.usable if math.isfinite(r.energy(name, k))]
        return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def movement_of(folder: Path, records: Iterable[SpectrumRecord]) -> tuple[Movement, ...]:
    """Compare the kernels of the snapshots, each as the sum of the pairs that were kept of it and can be read."""
    kept = [(r.step, pairs) for r in records if r.is_usable and (pairs := _pairs_of(folder, r)) is not None]
    return tuple(
        Movement(step, _distance(kept[0][1], pairs), _distance(before, pairs) / (step - step_before))
        for (step_before, before), (step, pairs) in itertools.pairwise(kept)
    )


def _pairs_of(folder: Path, record: SpectrumRecord) -> EigenResult | None:
    if record.vectors is None:
        return None
    try:
        return EigenResult.load(folder / record.vectors)
    except (OSError, ArgumentError, KeyError, ValueError, TypeError) as error:
        _LOG.warning("the pairs of step %d cannot be read: %s", record.step, error)
        return None


def _distance(first: EigenResult, second: EigenResult) -> float:
    kernels = [RootLinearOperator(p.vectors * p.values.clamp(min=0).sqrt().to(p.vectors)) for p in (first, second)]
    # 64 leading vectors and 16 samples beside them leave an error of 1e-6 at N = 2,000, for a sixth of the time of all.
    return float(kernel_distance(*kernels, pairs=(first, second), num_leading=64, num_samples=16))
