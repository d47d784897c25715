"""The model near one set of parameters, on one chunk of examples: multiply with J and with its transpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Literal, TypeAlias, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp, vmap
from typing_extensions import override

from ntk_lazy.engines.ties import WrittenOut
from ntk_lazy.model import FunctionalModel

Cotangents: TypeAlias = Float[Tensor, "columns examples outputs"]
Tangents: TypeAlias = dict[str, Tensor]
LinearisationMode: TypeAlias = Literal["forward-over-reverse", "double-reverse", "reverse by rows"]
Result = TypeVar("Result")


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

    @cached_property
    def _transpose(self) -> Callable[[Tensor], tuple[Tangents]]:
        """Jᵀ with the activations that it needs: as long as this object is kept, so is the forward pass."""
        return vjp(self._outputs, self.model.params)[1]

    @override
    def pull(self, U: Cotangents) -> Tangents:
        transpose = self._transpose
        if U.shape[0] == 1:
            return {name: g.unsqueeze(0) for name, g in transpose(U[0])[0].items()}
        pulled: Tangents = vmap(transpose, randomness="same")(U)[0]
        return pulled

    @override
    def push(self, W: Tangents) -> Cotangents:
        def one(tangent: Tangents) -> Tensor:
            pushed: Tensor = jvp(self._outputs, (self.model.params,), (tangent,))[1]
            return pushed

        with WrittenOut():
            if _num_columns(W) == 1:
                return one({name: w[0] for name, w in W.items()}).unsqueeze(0)
            return vmap(one, randomness="same")(W)


class PlainReverse(Linearisation):
    """Jᵀ by plain ``autograd.grad``, column by column.

    It also serves modules that the transforms of torch.func refuse (activation checkpointing, weight normalisation).
    """

    @override
    def pull(self, U: Cotangents) -> Tangents:
        leaves = self._leaves()

        def columns(output: Tensor) -> list[tuple[Tensor | None, ...]]:
            if not output.requires_grad:  # none of them is used
                return [(None,) * len(leaves)] * len(U)
            return [self._gradients(output, leaves, u) for u in U]

        pulled = zip(*self._evaluate(leaves, columns), strict=True)
        return {
            name: torch.stack([torch.zeros_like(p) if g is None else g for g in grads])
            for (name, p), grads in zip(self.model.params.items(), pulled, strict=True)
        }

    @staticmethod
    def _gradients(output: Tensor, leaves: Tangents, u: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output,
            list(leaves.values()),
            u,
            retain_graph=True,
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )

    def _leaves(self) -> Tangents:
        """The parameters, with a graph to hang on; outside an outer graph they are cut off from the user's."""
        params = self.model.params
        if torch.is_grad_enabled() and any(p.requires_grad for p in params.values()):
            return {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
        return {n: p.detach().requires_grad_() for n, p in params.items()}

    def _evaluate(self, leaves: Tangents, then: Callable[[Tensor], Result]) -> Result:
        """Run the model with a graph, and ``then`` in the caller's grad mode while the module holds the leaves."""
        is_enabled = torch.is_grad_enabled()

        def in_callers_mode(output: Tensor) -> Result:
            with torch.set_grad_enabled(is_enabled):
                return then(output)

        with torch.enable_grad():
            return self.model.evaluate(leaves, self.x, in_callers_mode)


@final
class DoubleReverse(PlainReverse):
    """Reverse mode alone, for modules without a forward-mode rule: J w is the gradient of ``⟨Jᵀu, w⟩`` in u."""

    @override
    def push(self, W: Tangents) -> Cotangents:
        leaves = self._leaves()

        def columns(output: Tensor) -> Tensor:
            with torch.enable_grad():
                if not output.requires_grad:
                    return output.new_zeros(_num_columns(W), *output.shape)
                u = torch.zeros_like(output, requires_grad=True)
                pulled = torch.autograd.grad(output, list(leaves.values()), u, create_graph=True, allow_unused=True)
            used = [(n, g) for n, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad]
            pushed = [self._column(used, u, {n: w[i] for n, w in W.items()}) for i in range(_num_columns(W))]
            return torch.stack(pushed)

        with WrittenOut():
            return self._evaluate(leaves, columns)

    @staticmethod
    def _column(pulled: list[tuple[str, Tensor]], u: Tensor, w: Tangents) -> Tensor:
        if not pulled:
            return torch.zeros_like(u)
        (pushed,) = torch.autograd.grad(
            [g for _, g in pulled],
            u,
            [w[name] for name, _ in pulled],
            retain_graph=True,
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )
        return torch.zeros_like(u) if pushed is None else pushed


@final
class ReverseByRows(PlainReverse):
    """Reverse mode once, for modules whose backward pass has no derivative: J w is ``⟨row, w⟩`` for each row of J.

    Cost: for each example by itself a forward pass and C backward passes, and C parameter vectors at a time.
    """

    @override
    def push(self, W: Tangents) -> Cotangents:
        return torch.stack([ReverseByRows(self.model, one)._push_one(W) for one in self.x.split(1)], 1)

    def _push_one(self, W: Tangents) -> Float[Tensor, "columns outputs"]:
        leaves = self._leaves()

        def columns(output: Tensor) -> Tensor:
            pushed = output.new_zeros(_num_columns(W), output.shape[1])
            if not output.requires_grad:
                return pushed
            for c, unit in enumerate(torch.eye(output.shape[1], dtype=output.dtype, device=output.device)):
                rows = zip(leaves, self._gradients(output, leaves, unit.unsqueeze(0)), strict=True)
                parts = [W[name].flatten(1) @ row.flatten() for name, row in rows if row is not None]
                pushed[:, c] = torch.stack(parts).sum(0) if parts else 0
            return pushed

        return self._evaluate(leaves, columns)


_LINEARISATIONS: dict[LinearisationMode, type[ForwardOverReverse] | type[DoubleReverse] | type[ReverseByRows]] = {
    "forward-over-reverse": ForwardOverReverse,
    "double-reverse": DoubleReverse,
    "reverse by rows": ReverseByRows,
}


def linearisation(mode: LinearisationMode) -> type[ForwardOverReverse] | type[DoubleReverse] | type[ReverseByRows]:
    """The linearisation of a mode."""
    return _LINEARISATIONS[mode]


def example_gradients(model: FunctionalModel, x: Tensor, cotangents: Float[Tensor, "rows outputs"]) -> Tangents:
    """Return the gradients of each example along the same cotangents, vectorised over both: ``(b, rows, *shape)``.

    Not every operation has a rule for this: ask the preflight. Follows the caller's grad mode.
    """

    def of_one(example: Tensor) -> Tangents:
        transpose = vjp(lambda params: model(params, example.unsqueeze(0))[0], model.params)[1]
        pulled: Tangents = vmap(transpose, randomness="same")(cotangents)[0]
        return pulled

    return vmap(of_one, randomness="same")(x)


def _num_columns(W: Tangents) -> int:
    return next(iter(W.values())).shape[0]
