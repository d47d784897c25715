"""One application of a model to a few examples, and what it did to the tensors it was given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.arithmetic import Arithmetic
from ntk_lazy.engines.exchange import OriginalsWatch
from ntk_lazy.engines.perturbed import MeasuredRounding
from ntk_lazy.engines.rounding import Rounding, largest
from ntk_lazy.engines.suspects import Call, EmbeddingWatch, named
from ntk_lazy.errors import NonFiniteError, ShapeError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.module_state import ModuleState
from ntk_lazy.widened import HALF

# A rare event (dropout with a small p) must show in one of these.
_TRIALS_OF_RANDOM_MODELS = 8
# Output, another one, names of buffers that were written to, whether anything was, whether numbers were drawn.
_Seen: TypeAlias = tuple[Tensor, Tensor | None, list[str], bool, bool]


@final
@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What one forward pass returned and did; it ran on private copies of all tensors.

    Attributes:
        copy: The model on these copies; its buffers are as the last application left them.
        x: The examples.
        output: Shape ``(b, C)``, finite and real.
        again: What another application returned, before anything was put back; None if there was none.
        calls: The modules that were called.
        embeddings: What was noticed about embeddings.
        written_buffers: Names of the buffers that were written to.
        is_writing: Whether these, or tensors in attributes, were written to.
        draws_numbers: Whether random numbers were drawn.
        touched: Names of parameters whose originals were used, and not their copies.
        rounding: What rounding may do to outputs and gradients, by their size.
        measured: What it really does, should that be more.
        arithmetic: The precision that was computed in.
    """

    copy: FunctionalModel
    x: Tensor
    output: Tensor
    again: Tensor | None
    calls: list[Call]
    embeddings: EmbeddingWatch
    written_buffers: list[str]
    is_writing: bool
    draws_numbers: bool
    touched: set[str]
    rounding: Rounding
    measured: MeasuredRounding
    arithmetic: Arithmetic

    @classmethod
    def run(cls, model: FunctionalModel, x: Tensor, *, is_repeated: bool = False) -> Self:
        """Apply the model, and refuse what has no derivative.

        Args:
            model: The model.
            x: Examples.
            is_repeated: Whether it is applied twice in a row.

        Raises:
            NonFiniteError: The output for an example is not finite.
            ShapeError: No outputs, or examples that are not the first dimension.
            UnsupportedModuleError: A parameter was written to, or the outputs are not real numbers.
        """
        copy = replace(
            model,
            params={name: p.detach().clone() for name, p in model.params.items()},
            constants={name: t.detach().clone() for name, t in model.constants.items()},
            has_private_buffers=False,
        )
        running: list[Call] = []
        arithmetic = Arithmetic(copy.params.values(), x, running)
        touched: set[str] = set()
        with (
            suspects.recorded_calls(model.call.module, running) as calls,
            EmbeddingWatch(copy.constants.values()) as embeddings,
        ):

            def look(call: Callable[[Tensor], Tensor], state: ModuleState) -> _Seen:
                states, writes, watch = _random_states(x), _Writes(copy, model), OriginalsWatch(own)
                with watch, arithmetic:
                    output = _apply(call, x)
                touched.update(watch.touched)
                num_calls, draws = len(calls), states != _random_states(x)
                _refuse_made_parameters(model, copy)
                written = writes.names()
                _refuse_written_parameters(
                    copy, [name for name in written if name not in model.buffer_names], calls, lambda: call(x)
                )
                _check_output(output)
                again = call(x) if is_repeated else None
                del calls[num_calls:]
                return output, again, written, bool(written) or state.is_written_to, draws

            own = model.own_params(model.params)
            copy, (output, again, written, is_writing, draws) = _in_a_row(copy, look)
        wider = arithmetic.widen(copy, x, output, is_random=draws)
        if wider is not copy:
            copy = wider
            output, again = copy.in_a_row(lambda call, _: (call(x), call(x) if is_repeated else None))
        rounding = Rounding.of((*copy.params.values(), output))
        measured = MeasuredRounding(replace(model, is_widened=copy.is_widened), x, coarsest=arithmetic.coarsest)
        return cls(
            copy=copy,
            x=x,
            output=output,
            again=again,
            calls=calls,
            embeddings=embeddings,
            written_buffers=written,
            is_writing=is_writing,
            draws_numbers=draws,
            touched=touched,
            rounding=rounding,
            measured=measured,
            arithmetic=arithmetic,
        )

    @property
    def writes_buffers(self) -> bool:
        """Whether a call needs its own copies of the buffers, and of tensors in attributes."""
        return self.is_writing

    def check_is_settled(self, example: int) -> None:
        """Raise if the output for one example alone is that in the batch once the model has seen the batch."""
        alone = self.x[example : example + 1]
        expected = self.output[example : example + 1]
        found = self.copy.in_a_row(lambda call, _: (call(self.x), call(alone))[1])
        if not self.has_other_outputs(found, expected):
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
        """Compare with another application, to the module as the first one left it; raise if it returned otherwise."""
        drawing = suspects.random_modules(self.calls)
        if drawing:
            raise UnsupportedModuleError(
                f"random numbers are drawn in train mode by {named(drawing)}, so that no two products would be with "
                "the same kernel. Call model.eval() first."
            )
        trials = _TRIALS_OF_RANDOM_MODELS - 1 if self.draws_numbers else 0
        more = (self.copy(self.copy.params, self.x) for _ in range(trials))
        first = [] if self.again is None else [self.again]
        if not any(self.has_other_outputs(output, self.output) for output in chain(first, more)):
            return
        if not self.draws_numbers:
            _, second, third = self.copy.in_a_row(lambda call, _: [call(self.x) for _ in range(3)])
            if not self.has_other_outputs(third, second):
                raise not_settled("it returns something else than the second, for the same examples")
            if self.written_buffers:
                owners = suspects.owners_of(self.calls, self.written_buffers)
                raise UnsupportedModuleError(
                    "two applications of the model to the same examples differ, because "
                    f"{named(owners)} writes to buffer {self.written_buffers[0]!r}. Call model.eval() first, or take "
                    "that out of the forward pass."
                )
        raise UnsupportedModuleError(
            "two applications of the model to the same examples differ: its forward pass is random or keeps state. "
            "Call model.eval() first, or take that out of the forward pass."
        )


def _in_a_row(
    model: FunctionalModel, look: Callable[[Callable[[Tensor], Tensor], ModuleState], _Seen]
) -> tuple[FunctionalModel, _Seen]:
    """Apply a model; one with parameters in half precision, which are widened, may need its own casts widened too."""
    try:
        return model, model.in_a_row(look)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        module = model.call.module
        if model.is_widened or module is None or not any(p.dtype in HALF for p in module.parameters()):
            raise
        model = replace(model, is_widened=True)
        return model, model.in_a_row(look)


def not_settled(what: str) -> UnsupportedModuleError:
    """Say what the first call of a module does that later ones do not."""
    return UnsupportedModuleError(
        f"the model initialises itself in its first call: {what}. Call it once, on a batch like those that it is made "
        "for, before you ask for its kernel."
    )


class _Writes:
    """Which tensors of a copy are no longer those of the model."""

    def __init__(self, copy: FunctionalModel, model: FunctionalModel) -> None:
        self._originals = model.params | model.constants
        self._tensors = copy.params | copy.constants
        self._versions = {name: t._version for name, t in self._tensors.items()}

    def names(self) -> list[str]:
        """List those that were written to; what is written through ``.data`` shows in the numbers alone."""
        return [
            name
            for name, t in self._tensors.items()
            if t._version != self._versions[name] or not _is_same(t, self._originals[name])
        ]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN is one."""
    return torch.equal(one, other) or torch.equal(one.nan_to_num(0.5, 1.5, 2.5), other.nan_to_num(0.5, 1.5, 2.5))


def _apply(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return call(x)
    except ValueError as error:
        if x.shape[0] == 1 and "more than 1 value per channel" in str(error):
            raise UnsupportedModuleError(
                "a batch-norm layer wants statistics of the batch, which one example does not have. Call model.eval() "
                "first; with track_running_stats=False, set that to True, or use GroupNorm or LayerNorm."
            ) from error
        raise


def _refuse_made_parameters(model: FunctionalModel, copy: FunctionalModel) -> None:
    """Refuse a module that has other parameters after its first call than before."""
    if model.call.module is None:
        return
    now = dict(model.call.module.named_parameters())
    known = copy.params | copy.constants
    made = [name for name, p in now.items() if name not in known or p is not known[name]]
    if made:
        raise not_settled(f"it makes parameter {made[0]!r}")


def _refuse_written_parameters(
    copy: FunctionalModel, names: list[str], calls: list[Call], call: Callable[[], Tensor]
) -> None:
    if not names:
        return
    owners, first = named(suspects.owners_of(calls, names)), replace(copy, params={n: copy.params[n] for n in names})
    before = replace(first, params={name: p.clone() for name, p in first.params.items()}, constants={})
    writes = _Writes(replace(first, constants={}), before)
    call()
    if not writes.names():
        raise not_settled(f"{owners} writes to parameter {names[0]!r}")
    raise UnsupportedModuleError(
        f"the forward pass of {owners} writes to parameter {names[0]!r}, so that there is no point to differentiate "
        "at. An embedding with max_norm does so: renormalise its weight once and set max_norm=None."
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
