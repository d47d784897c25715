"""Every way of writing an index, turned into the few that linear_operator knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain_indices(index: Any, shape: torch.Size, device: torch.device) -> tuple[Any, ...]:
    """Write an index with ints, slices, and non-negative integer tensors alone, one for each dimension.

    Lists, ranges, arrays and boolean masks become integer tensors, as torch reads them; a mask of m dimensions
    stands for m of them.

    Args:
        index: What stands between the brackets.
        shape: Shape of what is indexed.
        device: Where integer tensors are wanted.

    Raises:
        IndexError: Too many indices, an index out of range, or a mask of another length.
    """
    entries = [_as_entry(entry, device) for entry in (index if isinstance(index, tuple) else (index,))]
    ellipses = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can have one ellipsis only.")
    used = sum(_num_dims(entry) for entry in entries)
    if used > len(shape):
        raise IndexError(f"{used} indices for a kernel of {len(shape)} dimensions.")
    plain: list[Any] = []
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            plain += [slice(None)] * (len(shape) - used)
            dim += len(shape) - used
            continue
        plain += _plain(entry, shape[dim : dim + _num_dims(entry)])
        dim += _num_dims(entry)
    return (*plain, *[slice(None)] * (len(shape) - len(plain)))


def backward_slices(index: tuple[Any, ...], shape: torch.Size) -> dict[int, Tensor]:
    """Find the slices that run backward, which linear_operator has not, and list their elements by dimension."""
    return {
        dim: torch.tensor(range(size)[entry], dtype=torch.long)
        for dim, (entry, size) in enumerate(zip(index, shape, strict=True))
        if isinstance(entry, slice) and (entry.step or 1) < 0
    }


def _as_entry(entry: Any, device: torch.device) -> Any:
    if isinstance(entry, bool | np.bool_) or entry is None:
        raise IndexError(f"{entry} is no index of a kernel; use unsqueeze for a new dimension.")
    if isinstance(entry, list | range | np.ndarray):
        values = np.asarray(entry)
        return torch.as_tensor(values if values.size else values.astype(np.int64)).to(device)
    if isinstance(entry, Tensor):
        if entry.dtype == torch.uint8 or entry.is_floating_point() or entry.is_complex():
            raise IndexError(f"a {entry.dtype} tensor is no index; use integers or a boolean mask.")
        return int(entry) if entry.ndim == 0 and entry.dtype != torch.bool else entry.to(device)
    return int(entry) if hasattr(entry, "__index__") else entry


def _num_dims(entry: Any) -> int:
    if entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def _plain(entry: Any, sizes: torch.Size) -> list[Any]:
    if isinstance(entry, Tensor) and entry.dtype == torch.bool:
        if entry.shape != sizes:
            raise IndexError(f"a mask of shape {tuple(entry.shape)} meets dimensions of size {tuple(sizes)}.")
        return list(entry.nonzero(as_tuple=True))
    (size,) = sizes
    if isinstance(entry, Tensor):
        if entry.numel() and not bool(((entry >= -size) & (entry < size)).all()):
            raise IndexError(f"an index is out of range for a dimension of size {size}.")
        return [torch.where(entry < 0, entry + size, entry).long()]
    if isinstance(entry, int):
        if not -size <= entry < size:
            raise IndexError(f"index {entry} is out of range for a dimension of size {size}.")
        return [entry % size]
    if isinstance(entry, slice):
        start, stop, step = entry.indices(size)
        is_kept = step < 0 or entry == slice(None)
        return [entry if is_kept else slice(start, max(start, stop), step)]
    raise IndexError(f"{entry!r} is no index of a kernel; use ints, slices, integer tensors or masks.")


def is_everything(index: Any) -> bool:
    """Whether an index takes all of a dimension."""
    return isinstance(index, slice) and index == slice(None)


def is_same_index(left: Any, right: Any) -> bool:
    """Whether two indices of one dimension take the same elements in the same order."""
    if isinstance(left, slice) or isinstance(right, slice):
        return isinstance(left, slice) and isinstance(right, slice) and left == right
    return left is right or (left.shape == right.shape and bool((left == right).all()))
