"""Memory behind files, for what is kept between products and does not fit the budget."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Self, final

import torch
from torch import Tensor

from ntk_lazy.errors import ArgumentError, BudgetError

_SAMPLE_BYTES = 32 << 20


@final
@dataclass(frozen=True)
class Scratch:
    """A folder with room for files that nobody else sees.

    Pages of a mapped file are the system's to write out and drop: they are no part of a memory budget.

    Attributes:
        folder: On a local disk; in memory (tmpfs) nothing would be gained.
    """

    folder: Path

    @classmethod
    def at(cls, folder: str | os.PathLike[str], device: torch.device) -> Self:
        """Take a folder.

        Raises:
            ArgumentError: It is no folder, cannot be written to, or products run on another device than the CPU.
        """
        path = Path(folder)
        if device.type != "cpu":
            raise ArgumentError(
                f"scratch is for products on the CPU, not on {device}: to make factors again is faster there than to "
                "bring them back."
            )
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise ArgumentError(f"scratch={str(folder)!r} is not a folder that can be written to. Make it first.")
        return cls(path)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor in a file of its own, which goes with the tensor.

        Raises:
            BudgetError: There is no room for it.
        """
        num_bytes = prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        number, name = tempfile.mkstemp(prefix="ntk_lazy-", dir=self.folder)
        try:
            self._reserve(number, num_bytes)
            return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        finally:
            os.close(number)
            os.unlink(name)  # what is mapped stays until it is let go, and nothing is left behind if the process dies

    def bytes_per_second(self) -> float:
        """Measure how fast a file is read that is not in memory; once for each folder.

        Cost: writing and reading 32 MiB.
        """
        return _read_rate(self.folder)

    def _reserve(self, file: int, num_bytes: int) -> None:
        """Take the room now: to write to a mapped file on a full disk would kill the process."""
        free = shutil.disk_usage(self.folder).free
        try:
            if num_bytes > free:
                raise OSError(f"{free:,} bytes are free")
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, num_bytes)
        except OSError as error:
            raise BudgetError(
                f"{num_bytes:,} bytes do not fit the scratch folder {self.folder} ({error}). Use a larger disk, or "
                "leave scratch out: what does not fit the memory budget is then made anew.",
                requested_bytes=num_bytes,
                available_bytes=free,
            ) from error


@cache
def _read_rate(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        sample = bytearray(_SAMPLE_BYTES)
        file.write(sample)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        file.readinto(sample)
        return _SAMPLE_BYTES / max(time.perf_counter() - began, 1e-9)
