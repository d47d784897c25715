"""Machines that tests are given, so that what a plan chooses does not depend on where they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from ntk_lazy import gemm
from ntk_lazy.engines import rates
from ntk_lazy.engines.rates import Rates

# In float32; half as many operations in float64. The first is like a core of a processor of today.
MACHINES = {
    "usual": Rates(flops=1e11, bytes=1e10),
    "fast products": Rates(flops=1e14, bytes=1e9),
    "slow products": Rates(flops=1e9, bytes=1e12),
}
ROUTES = {"blas": gemm.by_blas, "onednn": gemm.by_onednn}


@contextlib.contextmanager
def given(name: str = "usual", route: str = "blas") -> Iterator[None]:
    """Take the rates of a machine, and a route of float32 products, in place of those that would be measured.

    Args:
        name: One of ``MACHINES``.
        route: One of ``ROUTES``.
    """
    rated, chosen = MACHINES[name], ROUTES[route]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_measured", lambda device, dtype, num_threads: _of(rated, dtype))
        patch.setattr(gemm, "_fastest", lambda is_tall, is_narrow, num_threads: chosen)
        yield


def _of(rated: Rates, dtype: torch.dtype) -> Rates:
    return Rates(4 * rated.flops / dtype.itemsize, rated.bytes)
