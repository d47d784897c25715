"""Memory that ran out, told from what else torch raises: on a CPU it says so by a plain RuntimeError."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ntk_lazy.errors import BudgetError

# c10::DefaultCPUAllocator on Linux and on Windows, the allocator of the compiled code beneath, mmap of files.
_SAYS_SO = re.compile(
    r"DefaultCPUAllocator|not enough memory: you tried to allocate|can't allocate memory|Cannot allocate memory"
    r"|std::bad_alloc|CUDA out of memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate (\d+) bytes")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAYS_SO.search(str(error)) is not None


def refuse_out_of_memory(error: BaseException) -> None:
    """Raise BudgetError if this is memory that ran out, with the cure; do nothing if it is anything else.

    What CUDA raises has a type of its own, that training loops know: it is raised as it is, with the cure as a note.
    """
    if not is_out_of_memory(error):
        return
    cure = "Pass a smaller memory_budget= or chunk_size= to ntk, or fewer columns at a time"
    if isinstance(error, torch.OutOfMemoryError):
        error.add_note(f"{cure}.")
        raise error
    asked = _ASKED.search(str(error))
    num_bytes = int(asked[1]) if asked else 0
    piece = f" at a piece of {num_bytes:,} bytes" if asked else ""
    raise BudgetError(
        f"the machine ran out of memory{piece}. {cure}; a model that fails on a single example needs more memory.",
        requested_bytes=num_bytes,
        available_bytes=0,
    ) from error


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Say so where memory runs out, and what to do about it; also as a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        refuse_out_of_memory(error)
        raise
