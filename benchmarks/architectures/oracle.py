"""The kernel of a user's module without this library: ``torch.autograd.grad``, row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from .architecture import Built


def fresh_copy(built: Built, dtype: torch.dtype) -> Built:
    """Copy a module that has not run yet, in some precision; inputs that are indices stay what they are."""
    model = copy.deepcopy(built.model).to(dtype)
    if dtype == torch.float64 and built.for_float64 is not None:
        built.for_float64(model)
    return replace(built, model=model, x=built.x.to(dtype) if built.x.is_floating_point() else built.x)


def outputs(built: Built, x: Tensor) -> Tensor:
    """Return what the module says of some examples, as a matrix."""
    returned = built.model(x)
    tensor = returned if built.output_fn is None else built.output_fn(returned)
    return tensor.reshape(len(x), -1)


def chosen(built: Built) -> dict[str, nn.Parameter]:
    """The parameters of J."""
    named = dict(built.model.named_parameters())
    patterns = built.params
    return {n: p for n, p in named.items() if patterns is None or any(fnmatchcase(n, each) for each in patterns)}


def reached(built: Built) -> set[str]:
    """Names of the parameters of J that some output depends on."""
    built.model.requires_grad_(True)
    parameters = chosen(built)
    returned = outputs(built, built.x)
    mixture = (returned * torch.randn_like(returned)).sum()
    gradients = torch.autograd.grad(mixture, list(parameters.values()), allow_unused=True)
    return {name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.any()}


def kernel(built: Built) -> Tensor:
    """Return ``J Jᵀ`` in float64, from gradients in the precision of the module, one example at a time."""
    built.model.requires_grad_(True)
    parameters, rows = list(chosen(built).values()), []
    for example in built.x.split(1):
        for output in outputs(built, example)[0]:
            gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            row = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in row]).double())
    J = torch.stack(rows)
    return J @ J.mT


class LowerPrecision(TorchFunctionMode):
    """Notes the first function of torch that returns something in float32 which depends on parameters.

    Attributes:
        found: Its name, or None where a model in float64 computes in float64 alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and look at its result."""
        result = func(*args, **(kwargs or {}))
        if self.found is None and isinstance(result, Tensor) and result.dtype in (torch.float32, torch.bfloat16):
            # A property has no name that is worth printing; what it returns is seen elsewhere too.
            name = resolve_name(func)
            if result.requires_grad and name is not None and "__get__" not in name:
                self.found = name
        return result


def lower_precision(built: Built) -> str | None:
    """Find out whether a model in float64 computes in float32 somewhere between parameters and outputs."""
    built.model.requires_grad_(True)
    with LowerPrecision() as seen:
        outputs(built, built.x[:1])
    return seen.found
