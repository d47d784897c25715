"""How fast this machine multiplies matrices and moves bytes: what a cost model needs to know, measured once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import final

import torch

from ntk_lazy.gemm import times_transposed

_SIZE = {"cpu": 1024, "cuda": 4096}
_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # more than caches hold, and less than a small budget
_REPEATS = 3


@final
@dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Attributes:
        flops: Operations of a matrix product.
        bytes: Bytes that are read or written by the scaling of a long vector.
    """

    flops: float
    bytes: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure both rates; once for each device, dtype and number of threads.

    Cost: below a second, and 32 MB on a CPU.
    """
    return _measured(str(device), dtype, torch.get_num_threads())


@cache
def _measured(device: str, dtype: torch.dtype, num_threads: int) -> Rates:
    kind = torch.device(device).type
    n = _SIZE.get(kind, _SIZE["cpu"])
    A = torch.full((n, n), 0.5, dtype=dtype, device=device)
    B = torch.full((n, n), 0.25, dtype=dtype, device=device)
    with torch.no_grad():
        flops = 2 * n**3 / seconds(partial(times_transposed, A, B), kind)
    length = _BYTES.get(kind, _BYTES["cpu"]) // dtype.itemsize
    del A, B
    long = torch.zeros(length, dtype=dtype, device=device)
    moved = 2 * length * dtype.itemsize / seconds(lambda: long.mul_(0.5), kind)
    return Rates(flops, moved)


def seconds(run: Callable[[], object], kind: str, *, repeats: int = _REPEATS) -> float:
    """Time something on a kind of device: the best of some runs and one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        if kind == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
