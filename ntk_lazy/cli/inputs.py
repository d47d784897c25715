"""What the user names on the command line: a model, weights, data; loaded, checked, or refused in one line."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk_lazy.cli.weights import check_file, read_weights
from ntk_lazy.errors import ArgumentError, NonFiniteError, ShapeError
from ntk_lazy.study.config import check_device

# What a factory or a forward pass may end with when it is given the wrong thing; a traceback would not help its user.
_USER_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
    SystemExit,
)


def load_model(spec: str, weights: Path | None, *, device: str) -> nn.Module:
    """Make the model that ``package.module:factory`` names, in eval mode, with its weights.

    Args:
        spec: A module of Python, found from the working directory too, and the name of a factory or of a Module in it.
        weights: safetensors or a torch file with a state dict; None keeps the weights of the factory.
        device: Where to put it.

    Raises:
        ArgumentError: Whatever is wrong, named.
    """
    check_device(device)
    model = _make(spec)
    if weights is not None:
        try:
            model.load_state_dict(read_weights(weights))
        except (RuntimeError, TypeError) as error:
            raise ArgumentError(f"the weights {weights} do not fit {spec}: {_why(error)}") from error
    return model.to(device).eval()


def load_array(path: Path, *, name: str) -> Tensor:
    """Read a ``.npy`` file.

    Raises:
        ArgumentError: It is missing, or no array of numbers.
        NonFiniteError: It holds a NaN or an infinity.
    """
    check_file(path, name=name, needed="an .npy file")
    try:
        array = _read_npy(path)
    except OSError as error:
        raise ArgumentError(f"{name}: cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        # Not NumPy's own words, which advise to run what is pickled in the file.
        raise ArgumentError(
            f"{name}: {path} is not a whole .npy file of numbers; write one with numpy.save(FILE, array)."
        ) from error
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise ArgumentError(f"{name}: {path} is not one .npy array of real numbers with a dimension of examples.")
    if array.size == 0:
        raise ShapeError(f"{name}: {path} has shape {array.shape}, so that it holds nothing.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        raise NonFiniteError(f"{name}: {path} holds a NaN or an infinity, first at index {tuple(int(i) for i in bad)}.")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def fit_data(model: nn.Module, data: Tensor) -> Tensor:
    """Move data to the device and, if they are floating, to the dtype of the model.

    Raises:
        ArgumentError: The model has no parameters, or cannot be applied to the data.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise ArgumentError("the model has no parameters, so that it has no kernel.")
    data = data.to(parameter.device, parameter.dtype if data.is_floating_point() else data.dtype)
    try:
        with torch.no_grad():
            model(data[:2])
    except _USER_ERRORS as error:
        raise ArgumentError(
            f"the model cannot be applied to data of shape {tuple(data.shape)} and dtype {data.dtype}: {_why(error)}"
        ) from error
    return data


def _read_npy(path: Path) -> NDArray[Any]:
    """Read one array, and nothing else that ``numpy.load`` would take, such as an archive of several."""
    with path.open("rb") as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _why(error: BaseException) -> str:
    """Say in words what somebody else's code has raised; by its class only where its words say nothing."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    words = " ".join(str(error).split())
    return words if words and not isinstance(error, KeyError) else f"{type(error).__name__} {words}".rstrip()


def _make(spec: str) -> nn.Module:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ArgumentError(f"--model is {spec!r}; package.module:factory is needed, for example mynet:build.")
    if module_name.endswith(".py") or "/" in module_name or os.sep in module_name:
        raise ArgumentError(
            f"--model is {spec!r}, a path, and a module is needed: {_as_module(module_name)}:{attribute}."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, *_USER_ERRORS) as error:
        raise ArgumentError(f"--model: cannot import {module_name!r}: {_why(error)}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ArgumentError(f"--model: {module_name} has no {attribute!r}.")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ArgumentError(f"--model: {spec} is a {type(found).__name__}, neither a Module nor a factory of one.")
    try:
        model = found()
    except _USER_ERRORS as error:
        raise ArgumentError(f"--model: {spec}() failed: {_why(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"--model: {spec}() returned a {type(model).__name__}, and a torch.nn.Module is needed.")
    return model


def _as_module(path: str) -> str:
    """Turn the path of a file of Python into what ``--model`` wants, with the folder to start from where it matters."""
    place = Path(path).with_suffix("")
    if place.is_absolute() or ".." in place.parts:
        return f"in the folder {place.parent}, write {place.name}"
    return f"write {'.'.join(place.parts)}"
