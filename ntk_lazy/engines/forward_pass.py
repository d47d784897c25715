"""One application of a model to a few examples, and what it did to the tensors it was given."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Self, final

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.perturbed import MeasuredRounding
from ntk_lazy.engines.rounding import Rounding, largest
from ntk_lazy.engines.suspects import Call, EmbeddingWatch, named
from ntk_lazy.errors import NonFiniteError, ShapeError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel

# A rare event (dropout with a small p) must show in one of these.
_TRIALS_OF_RANDOM_MODELS = 8


@final
@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What one forward pass returned and did; it ran on private copies of all tensors.

    Attributes:
        copy: The model on these copies; its buffers are as the last application left them.
        x: The examples.
        output: Shape ``(b, C)``, finite and real.
        calls: The modules that were called.
        embeddings: What was noticed about embeddings.
        written_buffers: Names of the buffers that were written to.
        draws_numbers: Whether random numbers were drawn.
        rounding: What rounding may do to outputs and gradients, by their size.
        measured: What it really does, should that be more.
    """

    copy: FunctionalModel
    x: Tensor
    output: Tensor
    calls: list[Call]
    embeddings: EmbeddingWatch
    written_buffers: list[str]
    draws_numbers: bool
    rounding: Rounding
    measured: MeasuredRounding

    @classmethod
    def run(cls, model: FunctionalModel, x: Tensor) -> Self:
        """Apply the model once, and refuse what has no derivative.

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
        tensors = copy.params | copy.constants
        versions = {name: t._version for name, t in tensors.items()}
        states = _random_states(x)
        with suspects.recorded_calls(model.call.module) as calls, EmbeddingWatch(copy.constants.values()) as watch:
            output = _apply(copy, x)
        written = [name for name, t in tensors.items() if t._version != versions[name]]
        _refuse_written_parameters([name for name in written if name not in model.buffer_names], calls)
        _check_output(output)
        draws = states != _random_states(x)
        rounding = Rounding.of((*copy.params.values(), output))
        return cls(copy, x, output, calls, watch, written, draws, rounding, MeasuredRounding(model, x))

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
        """Apply the model again, to the buffers as the last application left them; raise if it returns otherwise."""
        drawing = suspects.random_modules(self.calls)
        if drawing:
            raise UnsupportedModuleError(
                f"random numbers are drawn in train mode by {named(drawing)}, so that no two products would be with "
                "the same kernel. Call model.eval() first."
            )
        trials = _TRIALS_OF_RANDOM_MODELS if self.draws_numbers else 1
        again = (self.copy(self.copy.params, self.x) for _ in range(trials))
        if not any(self.has_other_outputs(output, self.output) for output in again):
            return
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


def _apply(model: FunctionalModel, x: Tensor) -> Tensor:
    try:
        return model(model.params, x)
    except ValueError as error:
        if x.shape[0] == 1 and "more than 1 value per channel" in str(error):
            raise UnsupportedModuleError(
                "a batch-norm layer wants statistics of the batch, which one example does not have. Call model.eval() "
                "first; with track_running_stats=False, set that to True, or use GroupNorm or LayerNorm."
            ) from error
        raise


def _refuse_written_parameters(names: list[str], calls: list[Call]) -> None:
    if names:
        raise UnsupportedModuleError(
            f"the forward pass of {named(suspects.owners_of(calls, names))} writes to parameter {names[0]!r}, so that "
            "there is no point to differentiate at. An embedding with max_norm does so: renormalise its weight once "
            "and set max_norm=None."
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
