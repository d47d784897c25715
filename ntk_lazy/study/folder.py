"""The folder of a study: what lies where, and whose it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from ntk_lazy.errors import ArgumentError
from ntk_lazy.folder_lock import LOCK_NAME, FolderLock
from ntk_lazy.study.config import StudyConfig
from ntk_lazy.study.training import known_losses, read_tensors


@final
@dataclass(frozen=True)
class StudyFolder:
    """Places of the files of one study.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """The settings; a folder with this file is that of a study."""
        return self.path / "settings.json"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def checkpoint(self) -> Path:
        """Parameters, losses and step."""
        return self.path / "checkpoint.safetensors"

    @property
    def records(self) -> Path:
        """The spectra, one line each."""
        return self.path / "spectrum.jsonl"

    @property
    def before(self) -> Path:
        """Portrait of the first network."""
        return self.path / "portrait-before.safetensors"

    @property
    def after(self) -> Path:
        """Portrait of the last network."""
        return self.path / "portrait-after.safetensors"

    @property
    def figures(self) -> Path:
        """PNG files."""
        return self.path / "figures"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def claims(self) -> Path:
        """The table of claims as JSON."""
        return self.path / "claims.json"

    def check(self, config: StudyConfig) -> bool:
        """Say whether a study with these settings may be kept here, without writing anything.

        Returns:
            Whether there is one already, so that it resumes.

        Raises:
            ArgumentError: The folder belongs to a study with other settings, or to something else, or there can be none
                of this name.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ArgumentError(f"{self.path} is a file; choose another folder.")
            if self.settings.exists():
                differences = self.read_config().differences(config)
                if differences:
                    raise ArgumentError(
                        f"{self.path} holds a study with other settings: {', '.join(differences)}. Choose another "
                        "folder, or give the settings of that study to resume it."
                    )
                return True
            if self.path.exists() and any(p.name != LOCK_NAME for p in self.path.iterdir()):
                raise ArgumentError(f"{self.path} is not empty and holds no study; choose another folder.")
        except OSError as error:
            raise ArgumentError(f"cannot use the folder {self.path}: {error.strerror}.") from error
        return False

    def make(self) -> FolderLock:
        """Make the folder if need be, and keep other processes out of it until what is returned is released.

        Raises:
            ArgumentError: It cannot be made, or another process runs a study there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot write to {self.path}: {error.strerror}.") from error
        lock = FolderLock(self.path)
        lock.hold()
        return lock

    def claim(self, config: StudyConfig) -> bool:
        """Make the folder that of a study with these settings.

        Returns:
            Whether it was so already, so that the study resumes.

        Raises:
            ArgumentError: It belongs to a study with other settings, or to something else.
        """
        if self.check(config):
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.settings, json.dumps(config.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise ArgumentError(f"cannot write to {self.path}: {error.strerror}.") from error
        return False

    def read_config(self) -> StudyConfig:
        """Read the settings.

        Raises:
            ArgumentError: There are none, or they are damaged.
        """
        return StudyConfig.from_dict(self._read_json(self.settings))

    def read_environment(self) -> dict[str, Any]:
        """Read versions and machine; empty if they were not noted."""
        return self._read_json(self.environment) if self.environment.exists() else {}

    def read_losses(self, config: StudyConfig) -> tuple[np.ndarray, np.ndarray] | None:
        """Read steps and training losses up to the checkpoint; None before there is one."""
        if not self.checkpoint.exists():
            return None
        return known_losses(read_tensors(self.checkpoint)[0]["losses"].numpy(), config)

    def read_training_seconds(self) -> float:
        """Read the wall time that the training has taken so far, interruptions not counted."""
        return float(read_tensors(self.checkpoint)[1]["seconds"]) if self.checkpoint.exists() else 0.0

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArgumentError(f"{self.path} is not the folder of a study: {path.name} is missing.") from error
        except (OSError, ValueError) as error:
            raise ArgumentError(f"cannot read {path}: {error}") from error
        if not isinstance(found, dict):
            raise ArgumentError(f"{path} does not hold settings.")
        return found


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it into place."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
