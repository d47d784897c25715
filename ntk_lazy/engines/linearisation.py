"""The model near one set of parameters, on one chunk of examples: multiply with J and with its transpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp, vmap
from typing_extensions import override

from ntk_lazy.model import FunctionalModel

Cotangents: TypeAlias = Float[Tensor, "columns examples outputs"]
Tangents: TypeAlias = dict[str, Tensor]


class Linearisation(ABC):
    """J of ``model`` at its parameters on the examples ``x``; columns are the first dimension throughout."""

    def __init__(self, model: FunctionalModel, x: Tensor) -> None:
        self.model = model
        self.x = x

    @abstractmethod
    def pull(self, U: Cotangents) -> Tangents:
        """Multiply with Jᵀ: ``(k, b, C)`` becomes, for each parameter, ``(k, *shape)``."""

    @abstractmethod
    def push(self, W: Tangents) -> Cotangents:
        """Multiply with J: for each parameter ``(k, *shape)`` becomes ``(k, b, C)``."""


@final
class ForwardOverReverse(Linearisation):
    """Reverse mode for Jᵀ and forward mode for J, each vectorised over the columns."""

    def _outputs(self, params: dict[str, Tensor]) -> Tensor:
        return self.model(params, self.x)

    @override
    def pull(self, U: Cotangents) -> Tangents:
        transpose = vjp(self._outputs, self.model.params)[1]
        if U.shape[0] == 1:
            return {name: g.unsqueeze(0) for name, g in transpose(U[0])[0].items()}
        pulled: Tangents = vmap(transpose)(U)[0]
        return pulled

    @override
    def push(self, W: Tangents) -> Cotangents:
        def one(tangent: Tangents) -> Tensor:
            pushed: Tensor = jvp(self._outputs, (self.model.params,), (tangent,))[1]
            return pushed

        if next(iter(W.values())).shape[0] == 1:
            return one({name: w[0] for name, w in W.items()}).unsqueeze(0)
        return vmap(one)(W)


@final
class DoubleReverse(Linearisation):
    """Reverse mode alone, for modules without a forward-mode rule: J w is the gradient of ``⟨Jᵀu, w⟩`` in u.

    Plain ``autograd.grad`` column by column, which also serves modules that the transforms of torch.func refuse
    (activation checkpointing, weight normalisation).
    """

    @override
    def pull(self, U: Cotangents) -> Tangents:
        leaves, output = self._forward()
        columns = [
            torch.autograd.grad(
                output, leaves, u, retain_graph=True, allow_unused=True, create_graph=torch.is_grad_enabled()
            )
            for u in U
        ]
        return {
            name: torch.stack([torch.zeros_like(p) if g is None else g for g in grads])
            for (name, p), grads in zip(self.model.params.items(), zip(*columns, strict=True), strict=True)
        }

    @override
    def push(self, W: Tangents) -> Cotangents:
        leaves, output = self._forward()
        names = list(self.model.params)
        with torch.enable_grad():
            u = torch.zeros_like(output, requires_grad=True)
            pulled = torch.autograd.grad(output, leaves, u, create_graph=True, allow_unused=True)
        used = [(name, g) for name, g in zip(names, pulled, strict=True) if g is not None and g.requires_grad]
        columns = []
        for column in range(next(iter(W.values())).shape[0]):
            (pushed,) = (
                torch.autograd.grad(
                    [g for _, g in used],
                    u,
                    [W[name][column] for name, _ in used],
                    retain_graph=True,
                    allow_unused=True,
                    create_graph=torch.is_grad_enabled(),
                )
                if used
                else (None,)
            )
            columns.append(torch.zeros_like(output) if pushed is None else pushed)
        return torch.stack(columns)

    def _forward(self) -> tuple[list[Tensor], Tensor]:
        """Run the model with a graph; outside an outer graph the parameters are cut off from the user's."""
        params = self.model.params
        if torch.is_grad_enabled() and any(p.requires_grad for p in params.values()):
            leaves = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
        else:
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        with torch.enable_grad():
            return list(leaves.values()), self.model(leaves, self.x)
