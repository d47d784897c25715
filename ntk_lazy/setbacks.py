"""What a solve or a measure may end with that is no fault of the training it watches."""

from __future__ import annotations

import torch

from ntk_lazy.errors import NTKLazyError
from ntk_lazy.out_of_memory import is_out_of_memory

# To be caught together with a look at the error: of the RuntimeErrors only some are among them.
SETBACKS: tuple[type[Exception], ...] = (NTKLazyError, MemoryError, RuntimeError)
_NAMED = (NTKLazyError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def is_setback(error: BaseException) -> bool:
    """Whether a training goes on: an error of ours, of LAPACK or of memory, and not one of the user's model."""
    return isinstance(error, _NAMED) or is_out_of_memory(error)


def in_words(error: BaseException) -> str:
    """Name an error and what it says."""
    return f"{type(error).__name__}: {error}"
