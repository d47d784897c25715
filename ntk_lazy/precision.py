"""The arithmetic that products run in: IEEE, whatever the process-wide switches say.

A reduced-precision product (TF32, bfloat16) leaves relative residuals of order one at
``lambda_100 = 1e-5 lambda_1``, and convolutions on CUDA use TF32 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_SWITCHES: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
)


@contextmanager
def ieee_precision() -> Iterator[None]:
    """Run float32 products in float32: no TF32, no bfloat16, no autocast; restore every switch after."""
    before = [switch.fp32_precision for switch in _SWITCHES]
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            for switch in _SWITCHES:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, value in zip(_SWITCHES, before, strict=True):
                switch.fp32_precision = value


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Use the attention kernels that have a forward-mode rule: no fused fast path, no flash attention."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
