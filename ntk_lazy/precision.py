"""The arithmetic that products run in: IEEE, whatever the process-wide switches say, and differentiable twice.

A reduced-precision product (TF32, bfloat16) leaves relative residuals of order one at
``lambda_100 = 1e-5 lambda_1``, and convolutions on CUDA use TF32 unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from typing_extensions import override

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


class _DifferentiableWeightNorm(TorchFunctionMode):
    """Write weight normalisation out where a module asks for the fused operation."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def differentiable_weight_norm() -> AbstractContextManager[object]:
    """Replace the fused weight normalisation, which has no forward-mode rule, and whose second derivative is wrong.

    ``torch.autograd.gradgradcheck`` fails on it (torch 2.13, CPU); its first derivative is right.
    """
    return _DifferentiableWeightNorm()


def has_weight_norm(module: nn.Module) -> bool:
    """Whether a module or one inside it is weight-normalised, by a parametrisation or by the older hook."""
    return any(
        isinstance(inner, _WeightNorm) or any(isinstance(h, WeightNorm) for h in inner._forward_pre_hooks.values())
        for inner in module.modules()
    )
