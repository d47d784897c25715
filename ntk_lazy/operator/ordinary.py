"""Operators that compute the same in every mode of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

from torch import Tensor

from ntk_lazy.modes import as_recordable, ordinary_mode

Class = TypeVar("Class")

# What linear_operator computes by functions of autograd, which save their operands.
_COMPUTING: Final = (
    *("matmul", "rmatmul", "solve", "inv_quad", "inv_quad_logdet", "logdet", "sqrt_inv_matmul", "diagonal", "to_dense"),
    *("cholesky", "eigh", "eigvalsh", "svd", "diagonalization", "pivoted_cholesky", "zero_mean_mvn_samples"),
    *("root_decomposition", "root_inv_decomposition", "add_diagonal", "add_low_rank", "cat_rows", "__getitem__"),
)


def in_ordinary_mode(cls: type[Class]) -> type[Class]:
    """Let an operator compute in ordinary mode, on ordinary tensors, and return these."""
    for name in _COMPUTING:
        setattr(cls, name, _in_ordinary_mode(getattr(cls, name)))
    return cls


def _in_ordinary_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def compute(*args: Any, **kwargs: Any) -> Any:
        with ordinary_mode():
            named = {name: _recordable(value) for name, value in kwargs.items()}
            return method(*map(_recordable, args), **named)

    return compute


def _recordable(value: Any) -> Any:
    return as_recordable(value) if isinstance(value, Tensor) else value
