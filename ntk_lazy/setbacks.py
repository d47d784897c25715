"""What a solve or a measure may end with that is no fault of the training it watches."""

from __future__ import annotations

import torch

from ntk_lazy.errors import NTKLazyError

# To be caught together with a look at the error: of the RuntimeErrors only some are among them.
SETBACKS: tuple[type[Exception], ...] = (NTKLazyError, MemoryError, RuntimeError)
_NAMED = (
    NTKLazyError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)
# Torch has no class of its own for the memory of the host.
_HOST_MEMORY = ("DefaultCPUAllocator", "not enough memory: you tried to allocate", "Cannot allocate memory")


def is_setback(error: BaseException) -> bool:
    """Whether a training goes on: an error of ours, of LAPACK or of memory, and not one of the user's model."""
    if isinstance(error, _NAMED):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_MEMORY)


def in_words(error: BaseException) -> str:
    """Name an error and what it says."""
    return f"{type(error).__name__}: {error}"
