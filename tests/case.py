"""What one model of the zoo is: a module from a seed, inputs from a seed, and what the library owes to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ntk_lazy.errors import ArgumentError

Draw = Callable[[Generator], Tensor]


def reals(*shape: int) -> Draw:
    """Draw a standard normal example, in float64."""
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens(length: int) -> Draw:
    """Draw token ids below 7; 0 comes first (the padding of some models) and 1 twice at the end."""

    def draw(generator: Generator) -> Tensor:
        drawn = torch.randint(0, 7, (length,), generator=generator)
        drawn[0], drawn[-2:] = 0, 1
        return drawn

    return draw


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the zoo; it stands alone.

    Attributes:
        name: Unique.
        build: Makes the module; called under a seed.
        draw: Makes one example.
        prepare: Does something to the finished module.
        output_fn: As for ``ntk``.
        params: Names or patterns, as for ``ntk``.
        is_training: The mode that the module is put in.
        dtype: Of the module and of floating-point inputs.
        error: What must be raised; None where the kernel must be right.
        says: What the message must name: the module at fault, the cure.
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Draw
    prepare: Callable[[nn.Module], object] | None = None
    output_fn: Callable[[Any], Tensor] | None = None
    params: tuple[str, ...] | None = None
    is_training: bool = True
    dtype: torch.dtype = torch.float64
    error: type[ArgumentError] | None = None
    says: tuple[str, ...] = ()

    def module(self, seed: int = 0) -> nn.Module:
        """Build the module; parameters and running statistics are random, so that no bias is zero by default."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module = self.build().to(self.dtype).train(self.is_training)
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
            if self.prepare is not None:
                self.prepare(module)
        return module

    def inputs(self, n: int, seed: int = 0) -> Tensor:
        """Draw n examples; those for a larger n begin with the same ones."""
        x = torch.stack([self.draw(Generator().manual_seed(1000 * seed + i)) for i in range(n)])
        return x.to(self.dtype) if x.is_floating_point() else x

    def parameter_names(self, module: nn.Module) -> list[str]:
        """List the parameters that make up J, by the plainest reading of ``params``."""
        names = [name for name, _ in module.named_parameters()]
        if self.params is None:
            return names
        return [name for name in names if any(name.startswith(p.removesuffix("*")) for p in self.params)]

    @property
    def tolerance(self) -> float:
        """Relative to the largest entry: 1e-10 in float64, and as many times eps in other dtypes."""
        widened = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        return 1e-10 if widened == torch.float64 else 1e3 * torch.finfo(widened).eps

    def __str__(self) -> str:
        return self.name
