"""Chunk sizes over examples and columns that keep a product under its memory budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ntk_lazy.engines.footprint import Footprint
from ntk_lazy.errors import ArgumentError, BudgetError

# Past this the working set leaves the cache levels that a chunk could still profit from, and nothing is gained.
_WORKING_SET = {"cpu": 64 << 20, "cuda": 2 << 30}
# On top of what tensors take: allocators keep freed pieces that are too small for the next tensor, and kernels use
# workspaces that no operator reports (blocked layouts of convolutions, packed operands of matrix products).
_SLACK = {"cpu": 2.5, "cuda": 1.25}
_ROWS_SHARE = 0.8  # of the budget: rows of J, beside which stand pieces of what is made of them
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
        found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?)\s*([kmgt]?i?)b?\s*", budget.lower())
        if found is None or found[2] not in _UNITS:
            raise ArgumentError(f"memory_budget={budget!r} is not a size; write bytes, or '4GB', or '512MiB'.")
        budget = float(found[1]) * _UNITS[found[2]]
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ArgumentError(f"memory_budget must be positive, not {budget!r}.")
    return int(budget)


def slack(device_type: str) -> float:
    """How much more than its tensors a computation takes on a kind of device."""
    return _SLACK.get(device_type, _SLACK["cpu"])


def working_set(device_type: str) -> int:
    """Bytes that a chunk may use to advantage."""
    return _WORKING_SET.get(device_type, _WORKING_SET["cpu"])


def require(num_bytes: int, budget: int, what: str) -> None:
    """Raise BudgetError unless the least that is needed fits."""
    if num_bytes > budget:
        raise BudgetError(
            f"{what} takes {num_bytes:,} bytes, but the budget is {budget:,}. Raise memory_budget.",
            requested_bytes=num_bytes,
            available_bytes=budget,
        )


def is_same_view(x1: torch.Tensor, x2: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory, so that what one was used for serves the other."""
    return x1.data_ptr() == x2.data_ptr() and x1.shape == x2.shape and x1.stride() == x2.stride()


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
    """The largest chunks over examples and columns whose footprint fits a budget.

    Attributes:
        footprint: Bytes of a product as a function of examples and lifted columns (columns times passes).
        activation_bytes: Saved for the backward pass of one example.
        parameter_bytes: Of one parameter vector.
        passes: Lifted columns for one column.
        budget: Bytes that may be held at once.
        device_type: ``"cpu"`` or ``"cuda"``.
        chunk_size: Examples that the user asked for, or None.
    """

    footprint: Footprint
    activation_bytes: int
    parameter_bytes: int
    passes: int
    budget: int
    device_type: str
    chunk_size: int | None = None

    def held(self, examples: int, columns: int) -> int:
        """Bytes of one chunk, with what allocators and kernels take for themselves."""
        return int(slack(self.device_type) * self.footprint.bytes(examples, columns * self.passes))

    def kept(self, examples: int) -> int:
        """Bytes of the linearisation of one chunk, if it is kept for the next product."""
        return int(slack(self.device_type) * self.activation_bytes * examples)

    def fit(self, num_examples: int, num_columns: int) -> Chunks:
        """Choose chunks: as many columns as half of the budget holds, then as many examples as the rest does.

        Raises:
            BudgetError: One column over the smallest chunk does not fit.
        """
        if num_examples == 0 or num_columns == 0:
            return Chunks(1, 1, 0)
        least = min(self.chunk_size or 1, num_examples)
        if self.held(least, 1) > self.budget:
            largest = _largest(num_examples, lambda b: self.held(b, 1) <= self.budget)
            raise BudgetError(
                f"one column over a chunk of {least} examples takes {self.held(least, 1):,} bytes, but the budget is "
                f"{self.budget:,}. Raise memory_budget"
                + (f", or use a chunk of {largest} examples." if largest else "."),
                requested_bytes=self.held(least, 1),
                available_bytes=self.budget,
                largest_chunk=largest,
            )
        columns = max(1, _largest(num_columns, lambda c: self.held(least, c) <= self.budget / 2))
        if self.chunk_size is not None:
            examples = least
        else:
            room = min(self.budget, self.held(1, columns) + working_set(self.device_type))
            examples = max(1, _largest(num_examples, lambda b: self.held(b, columns) <= room))
        return Chunks(examples, columns, self.held(examples, columns))

    def fit_rows(self, rows_and_passes: int) -> int:
        """Choose how many examples may have their rows of J in memory, two sets at once."""
        # While rows are gathered, each gradient exists twice: by parameter, and in its place in the flat row.
        per_example = self.activation_bytes * (1 + 2 * rows_and_passes) + 3 * self.parameter_bytes * rows_and_passes
        per_example = int(slack(self.device_type) * per_example)
        if per_example > self.budget:
            raise BudgetError(
                f"the rows of J of one example take {per_example:,} bytes, but the budget is {self.budget:,}. "
                "Raise memory_budget.",
                requested_bytes=per_example,
                available_bytes=self.budget,
            )
        room = min(self.budget * _ROWS_SHARE, 4 * working_set(self.device_type))
        fits = max(1, int(room // per_example))
        return min(fits, self.chunk_size or fits)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Find the largest number up to ``limit`` that fits, 0 if none does; what is smaller fits as well."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _has_meminfo() -> bool:
    return Path("/proc/meminfo").is_file()
