"""One application of a model to a few examples, and what it did to the tensors it was given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, final

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.arithmetic import Arithmetic
from ntk_lazy.engines.flops import FlopCount
from ntk_lazy.engines.linearisation import Tangents, with_graph
from ntk_lazy.engines.live_bytes import LiveBytes
from ntk_lazy.engines.perturbed import MeasuredRounding
from ntk_lazy.engines.rounding import Rounding, largest
from ntk_lazy.engines.suspects import Call, EmbeddingWatch, named
from ntk_lazy.engines.writes import WriteWatch
from ntk_lazy.errors import NonFiniteError, ShapeError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.out_of_memory import refuse_out_of_memory
from ntk_lazy.widened import HALF

# A rare event (dropout with a small p) must show in one of these.
_TRIALS_OF_RANDOM_MODELS = 8


@final
@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What one forward pass returned and did, with a graph, as reverse mode runs it.

    Buffers were private copies. Parameters were the user's own: a write to one is refused before it is done.

    Attributes:
        copy: The model on these copies; its buffers are as the last application left them.
        x: The examples.
        output: Shape ``(b, C)``, finite and real, without its graph.
        calls: The modules that were called.
        embeddings: What was noticed about embeddings.
        written_buffers: Names of the buffers that were written to.
        draws_numbers: Whether random numbers were drawn.
        flops: Operations for one example, as far as they can be counted.
        is_counted: Whether all of them can.
        activation_bytes: What the graph keeps for the backward pass of one example, beside parameters and output.
        largest_bytes: Of the largest result on the way, for one example.
        rounding: What rounding may do to outputs and gradients, by their size.
        measured: What it really does, should that be more.
        arithmetic: The precision that was computed in.
    """

    copy: FunctionalModel
    x: Tensor
    output: Tensor
    calls: list[Call]
    embeddings: EmbeddingWatch
    written_buffers: list[str]
    draws_numbers: bool
    flops: float
    is_counted: bool
    activation_bytes: int
    largest_bytes: int
    rounding: Rounding
    measured: MeasuredRounding
    arithmetic: Arithmetic

    @classmethod
    def run(cls, model: FunctionalModel, x: Tensor, then: Callable[[Tensor, Tangents], None] | None = None) -> Self:
        """Apply the model once, watch it, and refuse what has no derivative.

        Args:
            model: The model.
            x: A few examples.
            then: Called with the outputs and the leaves of the graph, while it is there.

        Raises:
            NonFiniteError: The output for an example is not finite.
            ShapeError: No outputs, or examples that are not the first dimension.
            UnsupportedModuleError: A parameter is written to, or none reaches the outputs, or these are not real.
        """
        buffers = {name: model.constants[name].detach().clone() for name in model.buffer_names}
        copy = replace(model, constants=model.constants | buffers, has_private_buffers=False)
        versions = {name: t._version for name, t in buffers.items()}
        states = _random_states(x)
        found: list[tuple[Tensor, bool, float, int, int]] = []
        fixed = {name: t for name, t in (copy.params | copy.constants).items() if name not in buffers}
        writes = WriteWatch(fixed, lambda name: _written(model, name))
        flops, live = FlopCount(), LiveBytes((*copy.params.values(), *copy.constants.values(), x))

        def look(output: Tensor, leaves: Tangents) -> None:
            draws = states != _random_states(x)
            saved = live.total - live.bytes_of(output)
            b = x.shape[0]
            found.append((output.detach(), draws, flops.total / b, -(-saved // b), -(-live.largest // b)))
            if writes.found is not None:
                raise _written(model, writes.found)
            _check_output(output.detach())
            _check_reached(output)
            if then is not None:
                then(output, leaves)

        running: list[Call] = []
        arithmetic = Arithmetic(copy.params.values(), x, running)
        watched = suspects.recorded_calls(model.call.module, running), EmbeddingWatch(copy.constants.values())
        with watched[0] as calls, watched[1] as embeddings, live, flops, writes, arithmetic:
            copy = _apply_half(copy, x, look)
        output, draws, num_operations, activation_bytes, largest_bytes = found[-1]
        if arithmetic.widen(copy, x, output, is_random=draws).is_widened != copy.is_widened:
            wide = cls.run(replace(model, is_widened=True), x, then)
            return replace(wide, measured=wide.measured.at(x, coarsest=arithmetic.coarsest), arithmetic=arithmetic)
        written = [name for name, t in buffers.items() if t._version != versions[name]]
        rounding = Rounding.of((*copy.params.values(), output))
        return cls(
            copy=copy,
            x=x,
            output=output,
            calls=calls,
            embeddings=embeddings,
            written_buffers=written,
            draws_numbers=draws,
            flops=num_operations,
            is_counted=flops.is_complete,
            activation_bytes=activation_bytes,
            largest_bytes=largest_bytes,
            rounding=rounding,
            measured=MeasuredRounding(replace(model, is_widened=copy.is_widened), x, coarsest=arithmetic.coarsest),
            arithmetic=arithmetic,
        )

    def apart(self) -> Self:
        """The same with examples of its own, which hold no others."""
        x = self.x.clone()
        return replace(self, x=x, measured=self.measured.at(x))

    @property
    def writes_buffers(self) -> bool:
        """Whether a call needs its own copies of the buffers."""
        return bool(self.written_buffers)

    def has_other_outputs(self, found: Tensor, expected: Tensor) -> bool:
        """Whether outputs differ by more than rounding from what they should be."""
        scale = largest(self.output)
        return self.rounding.separates(found, expected, scale=scale, measured=lambda: self.measured.outputs)

    def has_other_gradients(self, found: Tensor, expected: Tensor, *, scale: float) -> bool:
        """Whether entries of gradients of a normal mixture of outputs differ by more than rounding.

        Args:
            found: Any entries.
            expected: What they should be.
            scale: Largest entry of all parameters.
        """
        return self.rounding.separates(found, expected, scale=scale, measured=lambda: self.measured.gradients)

    def check_determinism(self) -> None:
        """Apply the model again, to the buffers as the last application left them; raise if it returns otherwise.

        The examples come in the opposite order, on which nothing must depend either.
        """
        drawing = suspects.random_modules(self.calls)
        if drawing:
            raise UnsupportedModuleError(
                f"random numbers are drawn in train mode by {named(drawing)}, so that no two products would be with "
                "the same kernel. Call model.eval() first."
            )
        trials = _TRIALS_OF_RANDOM_MODELS if self.draws_numbers else 1
        if not any(self.has_other_outputs(self._again(self.x.flip(0)).flip(0), self.output) for _ in range(trials)):
            return
        if not any(self.has_other_outputs(self._again(self.x), self.output) for _ in range(_TRIALS_OF_RANDOM_MODELS)):
            raise suspects.coupled(self.calls, "the output for an example depends on its place in the batch")
        if self.writes_buffers and not self.draws_numbers:
            owners = suspects.owners_of(self.calls, self.written_buffers)
            raise UnsupportedModuleError(
                f"two applications of the model to the same examples differ, because {named(owners)} writes to buffer "
                f"{self.written_buffers[0]!r}. Call model.eval() first, or take that out of the forward pass."
            )
        raise UnsupportedModuleError(
            "two applications of the model to the same examples differ: its forward pass is random or keeps state. "
            "Call model.eval() first, or take that out of the forward pass."
        )

    def _again(self, x: Tensor) -> Tensor:
        return with_graph(self.copy, x, lambda output, _: output.detach())


def _apply_half(model: FunctionalModel, x: Tensor, then: Callable[[Tensor, Tangents], None]) -> FunctionalModel:
    """Apply a model; one with parameters in half precision, which are widened, may need its own casts widened too."""
    try:
        _apply(model, x, then)
    except RuntimeError as error:
        refuse_out_of_memory(error)
        module = model.call.module
        if model.is_widened or module is None or not any(p.dtype in HALF for p in module.parameters()):
            raise
        model = replace(model, is_widened=True)
        _apply(model, x, then)
    return model


def _apply(model: FunctionalModel, x: Tensor, then: Callable[[Tensor, Tangents], None]) -> None:
    try:
        with_graph(model, x, then)
    except ValueError as error:
        if x.shape[0] == 1 and "more than 1 value per channel" in str(error):
            raise UnsupportedModuleError(
                "a batch-norm layer wants statistics of the batch, which one example does not have. Call model.eval() "
                "first; with track_running_stats=False, set that to True, or use GroupNorm or LayerNorm."
            ) from error
        raise
    except RuntimeError as error:
        # Of autograd, where a parameter is written to outside of no_grad.
        if "leaf Variable that requires grad" in str(error) and "in-place" in str(error):
            raise _written(model, None) from error
        raise


def _written(model: FunctionalModel, name: str | None) -> UnsupportedModuleError:
    """Name the module that writes to a parameter, of which autograd does not say which it is."""
    module, owner, parameter = model.call.module, "the model", "a parameter"
    if name is not None:
        parameter = f"parameter {name!r}"
        path = name.rpartition(".")[0]
        owner = "the model" if module is None else str(Call(path, module.get_submodule(path), ()))
    return UnsupportedModuleError(
        f"the forward pass of {owner} writes to {parameter}, so that there is no point to differentiate at. An "
        "embedding with max_norm does so: renormalise its weight once and set max_norm=None."
    )


def _check_reached(output: Tensor) -> None:
    if not output.requires_grad:
        raise UnsupportedModuleError(
            "no parameter that was chosen reaches the output: it is detached, computed under no_grad, or does not use "
            "them. The kernel would be zero. Choose others with params=, or return the output with its graph."
        )


def _check_output(output: Tensor) -> None:
    if output.shape[1] == 0:
        raise ShapeError("the model returned no outputs for an example: the kernel would have no rows.")
    finite = output.isfinite().all(1)
    if not finite.all():
        raise NonFiniteError(
            f"the output for example {int((~finite).nonzero()[0])} holds a NaN or an infinity, with finite parameters. "
            "Look for a logarithm, a division or an overflow in the forward pass."
        )


def _random_states(x: Tensor) -> list[object]:
    states: list[object] = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    return [*states, torch.cuda.get_rng_state(x.device).tolist()] if x.device.type == "cuda" else states
