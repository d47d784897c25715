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

from ntk_lazy.modes import ordinary_mode
from ntk_lazy.threads import Shared, Undo

# Precision of float32 products, by backend and operation. A switch that says "none" follows one of those before it.
_LEVELS = (
    (("generic", "all"),),
    (("cuda", "all"), ("mkldnn", "all")),
    tuple((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn")),
)


def _turn_to_ieee() -> Undo:
    """Switch to IEEE arithmetic; return how every switch is put back.

    torch has two sets of switches for one thing, and raises where they contradict each other: at reading one of the
    older ones, and in ``torch.backends.cudnn.flags``. Both are set, the older ones first: these set newer ones too.
    """
    found: dict[tuple[str, str], str] = {}
    for level in _LEVELS:
        # What each says itself shows where those that it may follow say nothing.
        found |= {switch: torch._C._get_fp32_precision_getter(*switch) for switch in level}
        _set(dict.fromkeys(level, "none"))
    # Now that none of the newer ones contradicts them.
    matmul, allows_tf32 = torch.get_float32_matmul_precision(), _allows_tf32()
    _set_all_to_ieee()

    def undo() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(allows_tf32)
        _set(found)

    return undo


def _set_all_to_ieee() -> None:
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(False)
    _set({switch: "ieee" for level in _LEVELS for switch in level})


def _set(precisions: dict[tuple[str, str], str]) -> None:
    for switch, precision in precisions.items():
        torch._C._set_fp32_precision_setter(*switch, precision)


def _allows_tf32() -> bool:
    """Read the older switch of cuDNN, while the newer ones do not allow it."""
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # it contradicts them
        return True


def _turn_to_plain_attention() -> Undo:
    fastpath, kernels = torch.backends.mha.get_fastpath_enabled(), ExitStack()
    kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
    torch.backends.mha.set_fastpath_enabled(False)

    def undo() -> None:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        kernels.close()

    return undo


_IEEE = Shared(_turn_to_ieee, _set_all_to_ieee)
_PLAIN_ATTENTION = Shared(_turn_to_plain_attention, lambda: None)


@contextmanager
def ieee_precision() -> Iterator[None]:
    """Run float32 products in float32: no TF32, no bfloat16, no autocast; and outside of inference mode.

    Every switch is as it was after the last thread has left.
    """
    with ordinary_mode(), _IEEE.held():
        yield


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Use the attention kernels that have a forward-mode rule: no fused fast path, no flash attention."""
    with _PLAIN_ATTENTION.held():
        yield


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
