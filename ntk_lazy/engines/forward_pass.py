"""One application of a model to a few examples, and what it did to the tensors it was given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self, cast, final

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.arithmetic import Arithmetic
from ntk_lazy.engines.exchange import OriginalsWatch, refuse_unreached
from ntk_lazy.engines.flops import FlopCount
from ntk_lazy.engines.linearisation import Tangents, with_graph
from ntk_lazy.engines.live_bytes import LiveBytes
from ntk_lazy.engines.perturbed import MeasuredRounding
from ntk_lazy.engines.rounding import Rounding, largest
from ntk_lazy.engines.suspects import Call, EmbeddingWatch, named
from ntk_lazy.engines.writes import (
    Writes,
    WriteWatch,
    not_settled,
    refuse_made_parameters,
    refuse_written_parameters,
    written_parameter,
)
from ntk_lazy.errors import NonFiniteError, ShapeError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.module_state import ModuleState
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
        again: What another application to the examples in opposite order returned, in the order of ``output``.
        calls: The modules that were called.
        embeddings: What was noticed about embeddings.
        written_buffers: Names of the buffers that were written to.
        is_writing: Whether these, or tensors in attributes, were written to.
        draws_numbers: Whether random numbers were drawn.
        touched: Names of parameters whose originals were used, and not their copies.
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
    again: Tensor
    calls: list[Call]
    embeddings: EmbeddingWatch
    written_buffers: list[str]
    is_writing: bool
    draws_numbers: bool
    touched: set[str]
    flops: float
    is_counted: bool
    activation_bytes: int
    largest_bytes: int
    rounding: Rounding
    measured: MeasuredRounding
    arithmetic: Arithmetic

    @classmethod
    def run(cls, model: FunctionalModel, x: Tensor, then: Callable[[Tensor, Tangents], None] | None = None) -> Self:
        """Apply the model twice, watch it the first time, and refuse what has no derivative.

        Args:
            model: The model.
            x: A few examples.
            then: Called with the outputs and the leaves of the graph, while it is there.

        Raises:
            NonFiniteError: The output for an example is not finite.
            ShapeError: No outputs, or examples that are not the first dimension.
            UnsupportedModuleError: A parameter is written to, or none reaches the outputs, or these are not real.
        """
        leaves = {name: p.detach().clone().requires_grad_() for name, p in model.params.items()}
        constants = {name: t.detach() for name, t in model.constants.items()}
        constants |= {name: constants[name].clone() for name in model.buffer_names}
        copy = replace(model, params=leaves, constants=constants, has_private_buffers=False)
        fixed = {name: t for name, t in constants.items() if name not in model.buffer_names}
        writes = WriteWatch(fixed, lambda name: written_parameter(model, name))
        running: list[Call] = []
        arithmetic = Arithmetic(leaves.values(), x, running)
        own = model.own_params(model.params)
        with (
            suspects.recorded_calls(model.call.module, running) as calls,
            EmbeddingWatch(constants.values()) as embeddings,
        ):

            def look(call: Callable[[Tensor], Tensor], state: ModuleState) -> _Seen:
                states, marks, watch = _random_states(x), Writes(copy, model), OriginalsWatch(own)
                flops, live = FlopCount(), LiveBytes((*leaves.values(), *constants.values(), x))
                with watch, live, flops, writes, arithmetic:
                    output = _apply(model, call, x)
                draws, saved = states != _random_states(x), live.total - live.bytes_of(output)
                num_calls = len(calls)
                if writes.found is not None:
                    raise written_parameter(model, writes.found)
                refuse_made_parameters(model, copy)
                written = marks.names()
                refuse_written_parameters(
                    copy, [name for name in written if name not in model.buffer_names], calls, lambda: call(x)
                )
                _check_output(output.detach())
                refuse_unreached(output, leaves)
                if then is not None:
                    then(output, leaves)
                seen = _Seen(
                    output=output.detach(),
                    written=written,
                    is_writing=bool(written) or state.is_written_to,
                    draws=draws,
                    touched=watch.touched,
                    flops=flops,
                    activation_bytes=-(-saved // x.shape[0]),
                    largest_bytes=-(-live.largest // x.shape[0]),
                )
                del output  # and its graph
                seen = replace(seen, again=call(x.flip(0)).detach().flip(0))
                del calls[num_calls:]
                return seen

            copy, seen = _in_a_row(copy, look)
        if arithmetic.widen(copy, x, seen.output, is_random=seen.draws).is_widened != copy.is_widened:
            wide = cls.run(replace(model, is_widened=True), x, then)
            return replace(wide, measured=wide.measured.at(x, coarsest=arithmetic.coarsest), arithmetic=arithmetic)
        # The copies of the parameters have done their work: a kernel that holds this holds none.
        params = {name: p.detach() for name, p in model.params.items()}
        return cls(
            copy=replace(copy, params=params),
            x=x,
            output=seen.output,
            again=cast(Tensor, seen.again),
            calls=calls,
            embeddings=embeddings,
            written_buffers=seen.written,
            is_writing=seen.is_writing,
            draws_numbers=seen.draws,
            touched=seen.touched,
            flops=seen.flops.total / x.shape[0],
            is_counted=seen.flops.is_complete,
            activation_bytes=seen.activation_bytes,
            largest_bytes=seen.largest_bytes,
            rounding=Rounding.of((*leaves.values(), seen.output)),
            measured=MeasuredRounding(replace(model, is_widened=copy.is_widened), x, coarsest=arithmetic.coarsest),
            arithmetic=arithmetic,
        )

    def apart(self) -> Self:
        """The same with examples of its own, which hold no others."""
        x = self.x.clone()
        return replace(self, x=x, measured=self.measured.at(x))

    @property
    def writes_buffers(self) -> bool:
        """Whether a call needs its own copies of the buffers, and of tensors in attributes."""
        return self.is_writing

    def check_is_settled(self, part: slice) -> None:
        """Raise if the outputs for some of the examples are those in the batch once the model has seen the batch."""
        found = self._in_a_row([self.x, self.x[part]])[1]
        if not self.has_other_outputs(found, self.output[part]):
            raise not_settled("what it makes of its first examples changes the output of later ones")

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
        """Compare with another application, to the module as the first one left it; raise if it returned otherwise.

        It had the examples in the opposite order, on which nothing must depend either.
        """
        drawing = suspects.random_modules(self.calls)
        if drawing:
            raise UnsupportedModuleError(
                f"random numbers are drawn in train mode by {named(drawing)}, so that no two products would be with "
                "the same kernel. Call model.eval() first."
            )
        trials = _TRIALS_OF_RANDOM_MODELS - 1 if self.draws_numbers else 0
        more = (self._again(self.x) for _ in range(trials))
        if not any(self.has_other_outputs(output, self.output) for output in chain([self.again], more)):
            return
        if not self.draws_numbers:
            _, second, third = self._in_a_row([self.x] * 3)
            is_same = not self.has_other_outputs(second, self.output)
            if not is_same and not self.has_other_outputs(third, second):
                raise not_settled("it returns something else than the second, for the same examples")
        else:
            again = (self._again(self.x) for _ in range(_TRIALS_OF_RANDOM_MODELS))
            is_same = not any(self.has_other_outputs(output, self.output) for output in again)
        if is_same:
            raise suspects.coupled(self.calls, "the output for an example depends on its place in the batch")
        if self.written_buffers and not self.draws_numbers:
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

    def _in_a_row(self, batches: list[Tensor]) -> list[Tensor]:
        """Apply the model to one batch after the other, without anything put back between."""
        with torch.enable_grad():
            return self.copy.in_a_row(lambda call, _: [call(x).detach() for x in batches])


@final
@dataclass(frozen=True, eq=False)
class _Seen:
    """What a forward pass showed; see ``ForwardPass``."""

    output: Tensor
    written: list[str]
    is_writing: bool
    draws: bool
    touched: set[str]
    flops: FlopCount
    activation_bytes: int
    largest_bytes: int
    again: Tensor | None = None


def _in_a_row(
    model: FunctionalModel, look: Callable[[Callable[[Tensor], Tensor], ModuleState], _Seen]
) -> tuple[FunctionalModel, _Seen]:
    """Apply a model; one with parameters in half precision, which are widened, may need its own casts widened too."""
    try:
        with torch.enable_grad():  # views of parameters are made with their graph
            return model, model.in_a_row(look)
    except RuntimeError as error:
        refuse_out_of_memory(error)
        module = model.call.module
        if model.is_widened or module is None or not any(p.dtype in HALF for p in module.parameters()):
            raise
        model = replace(model, is_widened=True)
        with torch.enable_grad():
            return model, model.in_a_row(look)


def _apply(model: FunctionalModel, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return call(x)
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
            raise written_parameter(model, None) from error
        raise


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
