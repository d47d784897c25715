"""The folder in which a tracker keeps its records, so that neither another process nor a full disk costs any."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import final

from safetensors import SafetensorError

from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import ArgumentError
from ntk_lazy.folder_lock import FolderLock
from ntk_lazy.records import SpectrumRecord, append_record, read_records

_LOG = logging.getLogger(__name__)


@final
class RecordFolder:
    """A folder with ``spectrum.jsonl``, and with ``vectors/`` where the pairs are kept too.

    Attributes:
        path: The folder.
        unsaved: Records that could not be written, in their order; each later one tries them again first.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder if need be, and keep other processes out of it.

        Raises:
            ArgumentError: It cannot be made, or another process writes to it.
        """
        self.path = path
        self.unsaved: list[SpectrumRecord] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"folder={str(path)!r} cannot be made: {error.strerror}.") from error
        self._lock = FolderLock(path)
        self._lock.hold()

    @property
    def records(self) -> Path:
        """The file of the records."""
        return self.path / "spectrum.jsonl"

    def read(self, *, fingerprint: str) -> list[SpectrumRecord]:
        """Read the records of earlier processes.

        Raises:
            ArgumentError: They are of other probes, or damaged.
        """
        if not self.records.exists():
            return []
        records = read_records(self.records)
        for record in records:
            if record.provenance.probes != fingerprint:
                raise ArgumentError(
                    f"{self.records} holds records of other probes ({record.provenance.probes}, and these are "
                    f"{fingerprint}). Choose another folder."
                )
        return records

    def latest_pairs(self, records: list[SpectrumRecord]) -> EigenResult | None:
        """Read the last pairs that were kept and can be read; without them the next solve starts cold."""
        for record in reversed(records):
            if record.vectors is None:
                continue
            try:
                pairs = EigenResult.load(self.path / record.vectors)
            except (OSError, ArgumentError, KeyError, ValueError, TypeError) as error:
                _LOG.warning("the pairs of step %d cannot be read: %s", record.step, error)
                continue
            if bool(pairs.vectors.isfinite().all()):
                return pairs
            _LOG.warning("the pairs of step %d hold a NaN or an infinity", record.step)
        return None

    def claim(self) -> None:
        """Be the one that writes.

        Raises:
            ArgumentError: Another process writes here, or another tracker of this one has begun to.
        """
        self._lock.claim()

    def keep(self, pairs: EigenResult, step: int) -> str:
        """Write pairs beside the records.

        Returns:
            Their place relative to the folder.

        Raises:
            OSError: They cannot be written.
        """
        name = f"vectors/step-{step:08d}.safetensors"
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        try:
            pairs.save(path)
        except SafetensorError as error:  # what a full disk becomes there
            raise OSError(str(error)) from error
        return name

    def append(self, record: SpectrumRecord) -> None:
        """Write a record, behind those that are still to be written; what cannot be is kept and said in the log."""
        self.unsaved.append(record)
        while self.unsaved:
            try:
                append_record(self.records, self.unsaved[0])
            except OSError as error:
                steps = ", ".join(str(r.step) for r in self.unsaved)
                _LOG.warning(
                    "cannot write to %s (%s); kept in memory: step %s", self.records, error.strerror or error, steps
                )
                return
            del self.unsaved[0]

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()
