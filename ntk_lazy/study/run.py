"""Run a study from its settings to its measurements, or go on with one that was interrupted."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import nn

from ntk_lazy.errors import ArgumentError
from ntk_lazy.records import SpectrumRecord, versions
from ntk_lazy.setbacks import SETBACKS, is_setback
from ntk_lazy.study.config import StudyConfig, check_device
from ntk_lazy.study.display import Display, Silent, describe
from ntk_lazy.study.evidence import Evidence, movement_of
from ntk_lazy.study.folder import StudyFolder, write_text
from ntk_lazy.study.network import build_network
from ntk_lazy.study.portrait import Portrait, draw_portrait
from ntk_lazy.study.target import Target
from ntk_lazy.study.training import Training
from ntk_lazy.tracker import SpectrumTracker

_CHECKPOINT_SECONDS = 10.0
_STEPS_BETWEEN_LOOKS = 50


def run_study(config: StudyConfig, folder: Path, *, display: Display | None = None) -> Evidence:
    """Train, track the spectrum, and draw the portraits that the report needs.

    A study that was interrupted, by Ctrl-C or by the end of its process, goes on from its last checkpoint, at
    most ten seconds of training or one snapshot back, and ends as it would have ended. A disk that is full ends it
    no more: what could not be written is kept in memory, tried again, and named in the evidence.

    Args:
        config: The settings.
        folder: Where everything is kept: new, empty, or that of a study with the same settings.
        display: Who is told how far it is.

    Returns:
        What was measured; the same as ``Evidence.load`` where all of it could be written.

    Raises:
        ArgumentError: The settings cannot be met here, the folder is not theirs, or another process runs a study in
            it. Nothing is written then.
        DivergedError: The training has diverged.
    """
    check_device(config.device)
    target = Target.of(config)
    place = StudyFolder(folder)
    place.check(config)
    display = Silent() if display is None else display
    lock = place.make()
    try:
        is_resumed = place.claim(config)
        display.say(f"study in {folder}: {config.steps:,} steps, {len(config.snapshot_steps())} snapshots")
        run = _Run(config, place, target, display)
        try:
            if is_resumed:
                run.resume()
            run.finish()
            return run.evidence()
        finally:
            run.close()
    finally:
        lock.release()


def describe_environment() -> dict[str, object]:
    """List what the numbers and times of a study may depend on beside its settings."""
    found: dict[str, object] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if torch.cuda.is_available():
        found["cuda_device"] = torch.cuda.get_device_name()
    return found


@final
class _Run:
    """The parts of a running study."""

    def __init__(self, config: StudyConfig, place: StudyFolder, target: Target, display: Display) -> None:
        self._config, self._place, self._target, self._display = config, place, target, display
        self._model: nn.Module = build_network(config)
        self._training = Training(self._model, target.train_x, target.train_y, config)
        self._tracker = SpectrumTracker(
            target.train_x,
            config.num_pairs,
            folder=place.path,
            schedule=config.snapshot_steps(),
            keep_vectors=True,
            rtol=config.rtol,
            seed=config.seed,
        )
        self._saved_at = time.monotonic()
        self._portraits: dict[Path, Portrait] = {}
        # Why each file that is to be there is not.
        self._unwritten: dict[Path, str] = {}

    def resume(self) -> None:
        """Go on from the checkpoint, if the interruption left one."""
        if not self._place.checkpoint.exists():
            return
        self._training.load(self._place.checkpoint)
        missing = [s for s in self._config.snapshot_steps() if s < self._training.step and self._tracker.due(s)]
        if missing:
            raise ArgumentError(
                f"{self._place.records} lacks the snapshots of steps {missing}, which the training has passed. "
                "Start again in another folder."
            )
        self._display.say(f"resumed at step {self._training.step:,}")

    def finish(self) -> None:
        """Take all steps and snapshots that are left."""
        if not self._place.environment.exists():
            text = json.dumps(describe_environment(), indent=2) + "\n"
            self._write(self._place.environment, lambda: write_text(self._place.environment, text))
        for step in self._config.snapshot_steps():
            if step < self._training.step:
                continue
            self._train_to(step)
            if self._tracker.due(step):
                lr = self._config.lr_at(step)
                record = self._tracker.record(self._model, step, lr=lr, target=self._target.train_y)
                self._display.say(describe(record))
                if self._tracker.unsaved:
                    self._display.say(f"step {step:>7,}  no room to write this snapshot; it is kept in memory")
            self._draw(step)
            self._save()

    def evidence(self) -> Evidence:
        """Gather what was measured, from memory where the folder had no room for it."""
        records = tuple(sorted(self._tracker.records, key=lambda r: r.step))
        lost = [f"the snapshot of step {r.step:,}" for r in self._tracker.unsaved]
        lost += [f"the eigenpairs of step {r.step:,}" for r in records if "vectors" in r.failures]
        return Evidence(
            config=self._config,
            records=records,
            before=self._portrait(self._place.before),
            after=self._portrait(self._place.after),
            movement=movement_of(self._place.path, records),
            losses=self._training.curve,
            training_seconds=self._training.seconds,
            unsaved=(*lost, *(f"{path.name} ({why})" for path, why in self._unwritten.items())),
        )

    def close(self) -> None:
        """Let another process have the folder."""
        self._tracker.close()

    def _train_to(self, step: int) -> None:
        while self._training.step < step:
            self._training.advance_to(min(step, self._training.step + _STEPS_BETWEEN_LOOKS))
            self._display.progress(self._training.step, self._training.last_loss)
            if time.monotonic() - self._saved_at > _CHECKPOINT_SECONDS:
                self._save()

    def _save(self) -> None:
        # Not beyond a snapshot that is in memory alone: a resumed study could not take it again.
        if not self._tracker.unsaved:
            self._write(self._place.checkpoint, lambda: self._training.save(self._place.checkpoint))
        for path, portrait in self._portraits.items():
            if path in self._unwritten:
                self._write(path, partial(portrait.save, path))
        self._saved_at = time.monotonic()

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        """Write a file; that there is no room for it is said once, and is no reason to end the training."""
        try:
            write()
        except OSError as error:
            if path not in self._unwritten:
                self._display.say(f"cannot write {path}: {error.strerror or error}; the study goes on")
            self._unwritten[path] = str(error.strerror or error)
        else:
            self._unwritten.pop(path, None)

    def _draw(self, step: int) -> None:
        """Draw the portrait of the first or of the last network, unless there is one or no spectrum to draw from."""
        path = {0: self._place.before, self._config.steps: self._place.after}.get(step)
        if path is None or path.exists() or not self._record_of(step).is_usable:
            return
        pairs = self._tracker.pairs
        assert pairs is not None
        self._display.say(f"step {step:>7,}  eigenfunctions on {self._target.picture.size:,} pixels")
        try:
            portrait = draw_portrait(self._model, pairs, self._target, self._config, step=step)
        except SETBACKS as error:
            if not is_setback(error):
                raise
            # Pictures are the least of a study: its spectra must not be lost for want of them.
            self._display.say(f"step {step:>7,}  no portrait: {error}")
        else:
            self._portraits[path] = portrait
            self._write(path, partial(portrait.save, path))

    def _portrait(self, path: Path) -> Portrait | None:
        if path in self._portraits:
            return self._portraits[path]
        return Portrait.load(path) if path.exists() else None

    def _record_of(self, step: int) -> SpectrumRecord:
        return next(r for r in self._tracker.records if r.step == step)
