"""A file of weights: read without running what is pickled in it, or refused with the cure."""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ntk_lazy.errors import ArgumentError

_CURE = "save the weights with torch.save(model.state_dict(), FILE)"
# What a parser may end with in the middle of a file that was never meant for it.
_FOREIGN = (
    pickle.PickleError,
    SafetensorError,
    EOFError,
    ImportError,
    MemoryError,
    struct.error,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)


def check_file(path: Path, *, name: str, needed: str) -> None:
    """Raise ArgumentError unless there is a file of this name, or could be one."""
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise ArgumentError(f"{name}: cannot read {path}: {error.strerror}.") from error
    if is_folder:
        raise ArgumentError(f"{name}: {path} is a folder; {needed} is needed.")
    if not is_file:
        raise ArgumentError(f"{name}: there is no file {path}.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        path: safetensors, by its suffix, or a torch file.

    Raises:
        ArgumentError: There is no such file, or it holds something else; the message says what and names the cure.
    """
    check_file(path, name="--weights", needed="a file with a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # Torch wonders aloud about pickles that it did not write; they are refused below.
            warnings.simplefilter("ignore")
            # Without pickled code: a file of weights must not be able to run anything.
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArgumentError(f"--weights: cannot read {path}: {error.strerror or error}.") from error
    except _FOREIGN as error:
        # Not the parser's own words: they are about bytes, or advise to run what is in the file.
        raise ArgumentError(f"--weights: {path} {_what(path)}.") from error
    return _checked(path, found)


def _checked(path: Path, found: Any) -> dict[str, Tensor]:
    """Refuse what torch could read and is no state dict."""
    if not isinstance(found, dict):
        raise ArgumentError(f"--weights: {path} holds a {type(found).__name__}, not a state dict; {_CURE}.")
    for name, value in found.items():
        # A module may keep whatever it likes under this name.
        if isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state")):
            continue
        inner = " (which may be one)" if isinstance(value, dict) else ""
        raise ArgumentError(
            f"--weights: {path} is not a state dict: its entry {name!r} is a {type(value).__name__}{inner}, "
            f"not a tensor; {_CURE}."
        )
    return found


def _what(path: Path) -> str:
    """Say what a file that could not be read is, as far as its first bytes tell, and the cure."""
    with path.open("rb") as file:
        head = file.read(6)
    if not head:
        return f"is empty; {_CURE}"
    if path.suffix == ".safetensors":
        return "is not a safetensors file; save it with safetensors.torch.save_file(model.state_dict(), FILE)"
    if head == b"\x93NUMPY":
        return f"is an .npy array, not a state dict; {_CURE}"
    if head.startswith((b"PK", b"\x80")):
        return f"is not a state dict: it holds a whole module or other objects beside tensors, or is damaged; {_CURE}"
    return f"is neither a torch file nor, by its suffix, a safetensors file; {_CURE}"
