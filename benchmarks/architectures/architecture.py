"""What one line of the page is about: a public architecture, built tiny with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = {
    "language": "Language",
    "experts": "Mixtures of experts",
    "state_space": "State spaces and linear attention",
    "vision": "Vision",
    "audio": "Audio and time series",
    "graphs": "Graphs",
    "implicit": "Implicit networks",
    "equations": "Differential equations",
    "adapters": "Adapters",
}

# What is tried in each precision; in float32 auto takes gram where that is faster.
ENGINES = {"float64": ("auto", "autodiff", "factors", "gram"), "float32": ("auto", "autodiff", "factors")}


@dataclass(frozen=True)
class Built:
    """What ``ntk`` is given.

    Attributes:
        model: As its package makes it, in float32.
        x: A few examples.
        output_fn: Turns what the model returns into one tensor, where it returns anything else.
        params: Names or patterns of the parameters of J; None for all of them.
        for_float64: Applied to a copy that is to run in float64, where the model as it comes can not.
    """

    model: nn.Module
    x: Tensor
    output_fn: Callable[[Any], Tensor] | None = None
    params: list[str] | None = None
    for_float64: Callable[[nn.Module], Any] | None = None


@dataclass(frozen=True)
class Architecture:
    """One public architecture.

    Attributes:
        name: As the page calls it.
        family: The file that it stands in.
        package: What has to be installed.
        build: Makes it.
        cure: The name of an architecture that is this one with what its refusal asks for.
    """

    name: str
    family: str
    package: str
    build: Callable[[], Built]
    cure: str | None = None


REGISTERED: dict[str, Architecture] = {}


def architecture(
    name: str, package: str, *, cure: str | None = None
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a function that builds one."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        family = build.__module__.rpartition(".")[2]
        if name in REGISTERED:
            raise ValueError(f"two architectures are called {name}.")
        REGISTERED[name] = Architecture(name, family, package, build, cure)
        return build

    return register


def all_architectures() -> dict[str, Architecture]:
    """Every one, family by family; no package is imported."""
    for family in FAMILIES:
        import_module(f"architectures.{family}")
    return REGISTERED


def tokens(count: int = 4, length: int = 7, vocabulary: int = 60) -> Tensor:
    """Random token ids; none is one of the first five, which models keep for padding and the like."""
    return torch.randint(5, vocabulary, (count, length))


def images(count: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    """Random images."""
    return torch.randn(count, channels, size, size)


class WithArguments(nn.Module):
    """A model with arguments beside its inputs, as a user would write it."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Any:
        """Call the model."""
        return self.call(self.model, x)
