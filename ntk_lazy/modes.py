"""The modes of torch that a caller's thread may be in, and that a kernel does not depend on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_outside = threading.local()


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode()``, autocast and a default device, and stay in the caller's grad mode.

    Inference mode keeps no record of what a derivative needs, and gives zeros for it without a word. What is computed
    in this context are ordinary tensors, which may be used in any mode.
    """
    is_inferring = torch.is_inference_mode_enabled()
    casting = [device_type for device_type in ("cpu", "cuda") if torch.is_autocast_enabled(device_type)]
    device = torch.empty(0).device  # torch.get_default_device() takes ten times as long
    if not (is_inferring or casting or device != _CPU):
        yield
        return
    with ExitStack() as stack:
        if is_inferring:
            is_recording = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))  # which turns recording on
            stack.enter_context(torch.set_grad_enabled(is_recording))
        for device_type in casting:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if device != _CPU:
            stack.enter_context(_default_device(_CPU))
            stack.callback(setattr, _outside, "device", getattr(_outside, "device", None))
            _outside.device = device
        yield


@contextmanager
def callers_device() -> Iterator[None]:
    """Go back to the default device that the caller has set: the user's module counts on it."""
    device = getattr(_outside, "device", None)
    if device is None:
        yield
        return
    with _default_device(device):
        yield


@contextmanager
def _default_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def is_recordable(tensor: Tensor) -> bool:
    """Whether autograd can save a tensor: one that was not made in inference mode.

    What ``module.double()`` puts into a parameter that was made in it looks ordinary, and is not.
    """
    if tensor.is_inference():
        return False
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def as_recordable(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor on the memory of one that was made in inference mode; any other as it is.

    Autograd saves no tensor of inference mode, whichever mode it is used in.
    """
    if is_recordable(tensor):
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return own.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
