"""The tensors of a module: which can be exchanged for a call, and which make up J."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ntk_lazy.errors import ArgumentError, UnsupportedModuleError
from ntk_lazy.modes import is_recordable


def refuse_wrappers(model: nn.Module) -> None:
    """Raise UnsupportedModuleError where tensors cannot be exchanged."""
    for name, inner in model.named_modules():
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModuleError(
                f"{name or 'the model'} is a {type(inner).__name__}, which copies its parameters. Pass model.module."
            )
        if isinstance(inner, torch.jit.ScriptModule):
            raise UnsupportedModuleError(
                f"{name or 'the model'} is a ScriptModule, whose parameters cannot be exchanged for a call. "
                "Pass the module that it was scripted or traced from."
            )


def refuse_uninitialised(named: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModuleError where parameters do not exist yet."""
    for name, parameter in named.items():
        if nn.parameter.is_lazy(parameter):
            raise UnsupportedModuleError(
                f"parameter {name!r} has no shape yet. Call the module on an example before you ask for its kernel."
            )


def refuse_inference_tensors(named: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModuleError for parameters that autograd keeps no record of, in any mode."""
    for name, parameter in named.items():
        if not is_recordable(parameter):
            raise UnsupportedModuleError(
                f"parameter {name!r} was made in torch.inference_mode(), so that nothing can be differentiated in it. "
                "Take copy.deepcopy(model), made outside of that mode or in torch.inference_mode(False)."
            )


def choose(named: Mapping[str, Tensor], params: Callable[[str, Tensor], bool] | list[str] | None) -> list[str]:
    """List the names that a choice of parameters fits.

    Raises:
        ArgumentError: It fits none, or a pattern of it does.
        UnsupportedModuleError: It fits one that is complex.
    """
    numbers = {n: t for n, t in named.items() if t.is_floating_point() or t.is_complex()}
    if params is None:
        chosen = list(numbers)
    elif callable(params):
        chosen = [n for n, t in numbers.items() if params(n, t)]
    else:
        chosen = []
        for pattern in params:
            found = [n for n in numbers if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not found:
                near = difflib.get_close_matches(pattern, numbers, n=3, cutoff=0.4) or list(numbers)[:5]
                raise ArgumentError(f"params: no parameter is called {pattern!r}; did you mean {', '.join(near)}?")
            chosen += found
    if not chosen:
        raise ArgumentError("params: no parameter was chosen, so that the kernel would be zero.")
    for name in chosen:
        if named[name].is_complex():
            raise UnsupportedModuleError(
                f"parameter {name!r} is complex; the kernel of real parameters is meant here. Choose others with "
                "params=, for example params=lambda name, parameter: not parameter.is_complex(); or register its real "
                "and imaginary parts."
            )
    return chosen
