"""Chunk sizes over examples and columns that keep a product under its memory budget."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ntk_lazy.errors import ArgumentError, BudgetError

# Past this the working set leaves the cache levels that a chunk could still profit from, and nothing is gained.
_WORKING_SET = {"cpu": 64 << 20, "cuda": 2 << 30}
_SHARE_OF_FREE_MEMORY = 0.25
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation could take on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()) if _has_meminfo() else None
    return int(available[1]) * 1024 if available else 4 << 30


def parse_budget(budget: int | float | str | None, device: torch.device) -> int:
    """Turn ``4_000_000_000``, ``"4GB"``, ``"512 MiB"`` or None (a quarter of what is free) into bytes."""
    if budget is None:
        return int(free_bytes(device) * _SHARE_OF_FREE_MEMORY)
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", budget.lower())
        if found is None or found[2] not in _UNITS:
            raise ArgumentError(f"memory_budget={budget!r} is not a size; write bytes, or '4GB', or '512MiB'.")
        budget = float(found[1]) * _UNITS[found[2]]
    if not budget > 0:
        raise ArgumentError(f"memory_budget must be positive, not {budget!r}.")
    return int(budget)


def slices(total: int, size: int) -> Iterator[slice]:
    """Cut ``range(total)`` into pieces of at most ``size``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


@dataclass(frozen=True)
class Chunks:
    """How many examples and columns go through the model at once."""

    examples: int
    columns: int
    bytes: int


@dataclass(frozen=True)
class ChunkRule:
    """The bytes of a product as a function of its chunks, and the largest chunks that fit.

    With ``b`` examples, ``c`` lifted columns (columns times passes), ``a`` activation bytes an example and
    ``p`` bytes of one parameter vector, a product holds ``a b (1 + c)`` for the activations with their
    derivatives and ``2 p c`` for the block of features and the part that one chunk adds to it.

    Attributes:
        activation_bytes: a.
        parameter_bytes: p.
        passes: Lifted columns for one column.
        budget: Bytes that may be held at once.
        device_type: ``"cpu"`` or ``"cuda"``.
        chunk_size: Examples that the user asked for, or None.
    """

    activation_bytes: int
    parameter_bytes: int
    passes: int
    budget: int
    device_type: str
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ArgumentError(f"chunk_size must be at least 1, not {self.chunk_size}.")

    def _held(self, examples: int, columns: int) -> int:
        lifted = columns * self.passes
        return self.activation_bytes * examples * (1 + lifted) + 2 * self.parameter_bytes * lifted

    def fit(self, num_examples: int, num_columns: int) -> Chunks:
        """Choose chunks for ``num_columns`` columns, as many columns at once as half of the budget holds."""
        if num_examples == 0 or num_columns == 0:
            return Chunks(1, 1, 0)
        smallest = self._held(self.chunk_size or 1, 1)
        if smallest > self.budget:
            fits = (self.budget - 2 * self.parameter_bytes * self.passes) // (self.activation_bytes * (1 + self.passes))
            raise BudgetError(
                f"one column over a chunk of {self.chunk_size or 1} examples takes {smallest:,} bytes, but the budget "
                f"is {self.budget:,}. Raise memory_budget, or use a chunk of {max(fits, 0)} examples.",
                requested_bytes=smallest,
                available_bytes=self.budget,
                largest_chunk=max(int(fits), 0),
            )
        per_column = 2 * self.parameter_bytes * self.passes
        columns = max(1, min(num_columns, self.budget // (2 * per_column)))
        while columns > 1 and self._held(self.chunk_size or 1, columns) > self.budget:
            columns = max(1, columns // 2)
        per_example = self.activation_bytes * (1 + columns * self.passes)
        room = min(self.budget - per_column * columns, _WORKING_SET.get(self.device_type, 64 << 20))
        examples = self.chunk_size or min(num_examples, max(1, room // per_example))
        return Chunks(examples, columns, self._held(examples, columns))

    def fit_rows(self, rows_and_passes: int) -> int:
        """Choose how many examples may have their rows of J in memory, two sets at once."""
        per_example = self.activation_bytes * (1 + rows_and_passes) + 2 * self.parameter_bytes * rows_and_passes
        if 2 * per_example > self.budget:
            raise BudgetError(
                f"the rows of J of one example take {per_example:,} bytes, twice, but the budget is {self.budget:,}. "
                "Raise memory_budget.",
                requested_bytes=2 * per_example,
                available_bytes=self.budget,
            )
        room = min(self.budget, 4 * _WORKING_SET.get(self.device_type, 64 << 20))
        fits = max(1, room // (2 * per_example))
        return min(fits, self.chunk_size or fits)


def _has_meminfo() -> bool:
    return Path("/proc/meminfo").is_file()
