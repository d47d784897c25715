"""Chunk sizes over examples and columns that keep a product under its memory budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

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
ROWS_OF_ONE = "one example with its rows of J"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@final
class Share(int):
    """Bytes that are a part of a larger budget: errors speak of the whole, which is what can be raised.

    Attributes:
        whole: The larger budget.
        ratio: The part of it, numerator and denominator.
    """

    whole: int
    ratio: tuple[int, int]

    @classmethod
    def of(cls, budget: int, numerator: int, denominator: int) -> Self:
        """Take ``numerator / denominator`` of a budget."""
        share = cls(budget * numerator // denominator)
        share.whole, share.ratio = budget, (numerator, denominator)
        return share


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


def shortage(num_bytes: int, budget: int, what: str, *, largest_chunk: int = 0) -> BudgetError | None:
    """Make the error for what does not fit, with the budget that would do; None for what fits.

    Args:
        num_bytes: The least that is needed, whatever the budget.
        budget: What there is; of a share, the error speaks of the whole.
        what: Needs it.
        largest_chunk: Examples of the largest chunk that fits, where the user asked for another; else 0.
    """
    if num_bytes <= budget:
        return None
    whole, (numerator, denominator) = (budget.whole, budget.ratio) if isinstance(budget, Share) else (budget, (1, 1))
    least = -(-num_bytes * denominator // numerator)
    part = f", of which {budget:,} are for this" if isinstance(budget, Share) else ""
    smaller = f", or use a chunk of {largest_chunk:,} examples" if largest_chunk else ""
    return BudgetError(
        f"{what} takes {num_bytes:,} bytes, but the budget is {whole:,}{part}. "
        f"Raise memory_budget to {least:,}{smaller}.",
        requested_bytes=least,
        available_bytes=whole,
        largest_chunk=largest_chunk,
    )


def raise_largest(*shortages: BudgetError | None) -> None:
    """Raise the error with the largest number, so that what it asks for is enough for all; nothing if there is none."""
    found = [error for error in shortages if error is not None]
    if found:
        raise max(found, key=lambda error: error.requested_bytes)


def require(num_bytes: int, budget: int, what: str, *, largest_chunk: int = 0) -> None:
    """Raise BudgetError unless the least that is needed fits."""
    error = shortage(num_bytes, budget, what, largest_chunk=largest_chunk)
    if error is not None:
        raise error


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

    def shortage(self, num_examples: int) -> BudgetError | None:
        """Tell what is missing for one column over the smallest chunk, if anything is."""
        least = min(self.chunk_size or 1, num_examples)
        needed = self.held(least, 1)
        largest = 0
        if least > 1 and needed > self.budget:
            largest = largest_that(num_examples, lambda b: self.held(b, 1) <= self.budget)
        examples = "one example" if least == 1 else f"a chunk of {least} examples"
        return shortage(needed, self.budget, f"one column over {examples}", largest_chunk=largest)

    def fit(self, num_examples: int, num_columns: int) -> Chunks:
        """Choose chunks: as many columns as half of the budget holds, then as many examples as the rest does.

        Raises:
            BudgetError: One column over the smallest chunk does not fit.
        """
        if num_examples == 0 or num_columns == 0:
            return Chunks(1, 1, 0)
        raise_largest(self.shortage(num_examples))
        least = min(self.chunk_size or 1, num_examples)
        columns = max(1, largest_that(num_columns, lambda c: self.held(least, c) <= self.budget / 2))
        if self.chunk_size is not None:
            examples = least
        else:
            room = min(self.budget, self.held(1, columns) + working_set(self.device_type))
            examples = max(1, largest_that(num_examples, lambda b: self.held(b, columns) <= room))
        return Chunks(examples, columns, self.held(examples, columns))

    def rows_of_one(self, rows_and_passes: int) -> int:
        """Bytes that one example takes while its rows of J are made, and another one's are there."""
        # While rows are gathered, each gradient exists twice: by parameter, and in its place in the flat row.
        per_example = self.activation_bytes * (1 + 2 * rows_and_passes) + 3 * self.parameter_bytes * rows_and_passes
        return int(slack(self.device_type) * per_example)

    def fit_rows(self, rows_and_passes: int) -> int:
        """Choose how many examples may have their rows of J in memory, two sets at once."""
        per_example = self.rows_of_one(rows_and_passes)
        require(per_example, self.budget, ROWS_OF_ONE)
        room = min(self.budget * _ROWS_SHARE, 4 * working_set(self.device_type))
        fits = max(1, int(room // per_example))
        return min(fits, self.chunk_size or fits)


def largest_that(limit: int, fits: Callable[[int], bool]) -> int:
    """Find the largest number up to ``limit`` that fits, 0 if none does; what is smaller fits as well."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _has_meminfo() -> bool:
    return Path("/proc/meminfo").is_file()
