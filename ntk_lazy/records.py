"""One snapshot of a spectrum as one line of JSON, together with where its numbers come from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from io import RawIOBase
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch

from ntk_lazy.errors import ArgumentError
from ntk_lazy.folder_lock import exclusively

_FORMAT = 1
_PACKAGES = ("ntk-lazy", "torch", "linear_operator", "numpy")


@final
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a record comes from: enough to repeat it, or to see that two records do not compare.

    Attributes:
        versions: Version of each package that takes part in the numbers, and of Python.
        seed: Seed of the eigensolver and of the stochastic estimates.
        probes: Fingerprint of the probes.
        num_examples: N, the number of probes.
        device: Where the products ran.
        dtype: What they ran in.
    """

    versions: Mapping[str, str]
    seed: int
    probes: str
    num_examples: int
    device: str
    dtype: str


@final
@dataclass(frozen=True, kw_only=True)
class SpectrumRecord:
    """The spectrum at one step of training, how well it is known, and how it aligns.

    The fields are the same whatever happened: a solve that failed leaves empty spectra and says why in
    ``message``; a measure that failed is missing from ``energies`` or ``scalars`` and says why in ``failures``, and
    costs no other; what was not asked for is in neither.

    Attributes:
        step: Step of training, as the caller counts.
        status: Of the pairs: ``"converged"``, ``"partial"`` (the mask ``converged`` says which hold) or ``"failed"``.
        message: The error in words, or the completeness statement of the solver and what could not be measured.
        num_rows: n.
        values: Eigenvalues, descending.
        residual_norms: ``‖K v − λ v‖`` of each, recomputed by the solver.
        converged: Which pairs passed their test.
        noise_floor: Eigenvalues below this share of the first are rounding errors.
        energies: Cumulative relative energy ``E(φ, 1..k)`` of ``"target"``, ``"output"`` and ``"residual"``.
        scalars: Named numbers: ``loss``, ``trace``, ``effective_rank``, ``stability`` and so on.
        errors: Standard errors of those scalars that are estimates.
        cost: Block calls, columns, seconds and peak bytes of the solve; ``record_seconds`` for all of it.
        failures: Reason for each number that was asked for and is missing, under its name in ``scalars``, or
            ``energies.NAME``; ``pairs`` and ``vectors`` for a solve that failed and a file that could not be written.
        vectors: File with the eigenpairs, relative to the record's folder; None if they were not kept.
        provenance: Where the record comes from.
    """

    step: int
    status: str
    message: str
    num_rows: int
    values: tuple[float, ...]
    residual_norms: tuple[float, ...]
    converged: tuple[bool, ...]
    noise_floor: float
    energies: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    vectors: str | None = None
    provenance: Provenance

    @property
    def is_usable(self) -> bool:
        """Whether there is a spectrum at all."""
        return bool(self.values)

    @property
    def is_below_noise(self) -> tuple[bool, ...]:
        """Which values cannot be told from zero; none, where the floor is not known."""
        return tuple(value <= self.noise_floor * self.values[0] for value in self.values)

    @property
    def num_trusted(self) -> int:
        """How many leading pairs passed their test and lie above the noise floor.

        Energies beyond this index are not trustworthy: the vectors there are rounding errors.
        """
        for index, (is_below, passed) in enumerate(zip(self.is_below_noise, self.converged, strict=True)):
            if is_below or not passed:
                return index
        return len(self.values)

    def energy(self, name: str, k: int) -> float:
        """Return ``E(name, k)``, or NaN where it was not measured or lies beyond the pairs that were found."""
        curve = self.energies.get(name, ())
        return curve[k - 1] if 1 <= k <= len(curve) else math.nan

    def scalar(self, name: str) -> float:
        """Return a named number, or NaN where it was not measured."""
        return self.scalars.get(name, math.nan)

    @property
    def failures_in_words(self) -> str:
        """What is missing, each reason with the names it costs; empty if nothing is."""
        names: dict[str, list[str]] = {}
        for name, reason in self.failures.items():
            names.setdefault(reason, []).append(name)
        return "; ".join(f"{reason} ({', '.join(costs)})" for reason, costs in names.items())

    def to_json(self) -> str:
        """Write the record as one line of strict JSON; a number that is not finite becomes null."""
        return json.dumps(
            {"format": _FORMAT, **_plain(dataclasses.asdict(self))}, allow_nan=False, separators=(",", ":")
        )

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read what ``to_json`` wrote; unknown keys of later versions are passed over.

        Raises:
            ArgumentError: The line is not a record.
        """
        try:
            data = json.loads(line)
            known = _known(cls, data)
            known["provenance"] = Provenance(**_known(Provenance, known["provenance"]))
            known["noise_floor"] = _number(known["noise_floor"])
            known["converged"] = tuple(known["converged"])
            for name in ("values", "residual_norms"):
                known[name] = tuple(map(_number, known[name]))
            known["energies"] = {n: tuple(map(_number, curve)) for n, curve in known["energies"].items()}
            for name in ("scalars", "errors", "cost"):
                known[name] = {n: _number(v) for n, v in known[name].items()}
            known["failures"] = {n: str(v) for n, v in known.get("failures", {}).items()}
            return cls(**known)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(f"this line is not a spectrum record ({error!r}): {line[:80]!r}") from error


def versions() -> dict[str, str]:
    """List the versions of all that takes part in the numbers; an absent package is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def append_record(path: Path, record: SpectrumRecord) -> None:
    """Append a record as one line, on the disk before this returns, or leave the file as it was.

    Of several processes one writes at a time. An unfinished last line, left by a process that was killed, is cut off
    first.

    Raises:
        OSError: The file cannot be written to, such as on a full disk.
    """
    line = record.to_json().encode() + b"\n"
    # Unbuffered: what a buffer holds back would be written when the file is closed, after the failure is known.
    with path.open("ab+", buffering=0) as file, exclusively(file.fileno()):
        end = _end_of_last_line(file)
        file.truncate(end)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read_records(path: Path) -> list[SpectrumRecord]:
    """Read the records of a JSON Lines file in their order; an unfinished last line is passed over.

    There is one for each step: of several, such as those of two processes that have written at once, the last that
    holds a spectrum, or the last at all.

    Raises:
        ArgumentError: The file is missing, or a line other than the last is not a record.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"cannot read the records {path}: {error.strerror}.") from error
    complete = text[: text.rfind(b"\n") + 1].decode(errors="replace")
    found = [SpectrumRecord.from_json(line) for line in complete.splitlines() if line.strip()]
    chosen: dict[int, int] = {}
    for index, record in enumerate(found):
        if record.is_usable or not found[chosen.get(record.step, index)].is_usable:
            chosen[record.step] = index
    return [record for index, record in enumerate(found) if chosen[record.step] == index]


def _end_of_last_line(file: RawIOBase) -> int:
    """Return the length of a file without what stands behind its last line break."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            return (file.readall() or b"").rfind(b"\n") + 1
    return size


def _known(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {n: v for n, v in data.items() if n in names}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    """Turn a nested value into what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(n): _plain(v) for n, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
