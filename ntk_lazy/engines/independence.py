"""Whether the outputs for one example depend on the others of its batch, in values or in gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.forward_pass import ForwardPass
from ntk_lazy.engines.linearisation import Tangents, gradients, outputs, with_graph
from ntk_lazy.engines.rounding import largest
from ntk_lazy.engines.suspects import LOOKUP_ERRORS, TRANSFORM_ERRORS
from ntk_lazy.errors import NonFiniteError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.out_of_memory import refuse_out_of_memory


def check_independence(model: FunctionalModel, forward: ForwardPass, U: Tensor, gradient: Tangents) -> None:
    """Compare a batch with two parts of it, the first example and the others: outputs, and the sum of the gradients.

    Whatever couples examples (a statistic of the batch, a dimension that was taken for another, a capacity that they
    share) has other terms in at least one of the parts; what depends on their order shows when they are turned round.

    Args:
        model: The model.
        forward: What it returned for the batch.
        U: Cotangents of the batch, shape ``(b, C)``.
        gradient: Its gradient along these, finite.

    Cost: two forward-and-backward passes over parts; memory for 2 parameter vectors.

    Raises:
        UnsupportedModuleError: Examples depend on each other.
    """
    x, calls = forward.x, forward.calls
    if x.shape[0] < 2:
        return
    total: Tangents = {}
    for part in (slice(0, 1), slice(1, None)):
        for name, g in _check_part(model, forward, U, part).items():
            total[name] = total[name] + g if name in total else g  # not in place: g may lie in the memory of U
    scale = largest(*gradient.values())
    for name in gradient.keys() | total.keys():
        one, other = (g[name] if name in g else torch.zeros_like(model.params[name]) for g in (total, gradient))
        if forward.has_other_gradients(one, other, scale=scale):
            raise suspects.coupled(calls, f"the gradient of {name!r} over a batch is not the sum over its examples")
    _check_unequal_rows(model, forward)


def _check_part(model: FunctionalModel, forward: ForwardPass, U: Tensor, part: slice) -> Tangents:
    x, calls, has_returned = forward.x, forward.calls, []

    def look(output: Tensor, leaves: Tangents) -> Tangents | None:
        has_returned.append(True)
        is_other = forward.has_other_outputs(output.detach(), forward.output[part])
        return None if is_other else reverse(output, leaves, U[part])

    try:
        found = with_graph(model, x[part], look)
    except (*TRANSFORM_ERRORS, *LOOKUP_ERRORS) as error:
        refuse_out_of_memory(error)
        if has_returned:
            raise
        what = f"the model takes a batch, but not one example alone ({suspects.first_line(error)})"
        raise suspects.coupled(calls, what) from error
    if found is None:
        forward.check_is_settled(part)
        who = "example 0 alone" if part.start == 0 else "examples without the first"
        raise suspects.coupled(calls, f"the output for {who} differs from that in a batch of {x.shape[0]}")
    return found


def _check_unequal_rows(model: FunctionalModel, forward: ForwardPass) -> None:
    """Where all examples are the same, try once more with different ones: equal rows hide what couples them."""
    x = forward.x
    if not x.is_floating_point() or not (x == x[:1]).all():
        return
    factors = torch.linspace(0.5, 1.0, x.shape[0], dtype=x.dtype, device=x.device)
    spread = x * factors.reshape(-1, *[1] * (x.ndim - 1))
    together = outputs(model, spread)
    for part in (slice(0, 1), slice(1, None)):
        if forward.has_other_outputs(outputs(model, spread[part]), together[part]):
            what = f"the output for one example differs from that in a batch of {x.shape[0]}"
            raise suspects.coupled(forward.calls, what)


def reverse(output: Tensor, leaves: Tangents, u: Tensor) -> Tangents:
    """Multiply with Jᵀ by plain autograd, which is what the kernel is defined by."""
    try:
        return gradients(output, leaves, u)
    except TRANSFORM_ERRORS as error:
        refuse_out_of_memory(error)
        raise UnsupportedModuleError(
            f"torch.autograd.grad does not work on this model ({suspects.first_line(error)}). Reentrant activation "
            "checkpointing is one cause: set use_reentrant=False."
        ) from error


def check_finite(model: FunctionalModel, x: Tensor, U: Tensor, gradient: Tangents) -> None:
    """Refuse a gradient that is not finite, naming the first example whose own is not.

    Raises:
        NonFiniteError: It holds a NaN or an infinity.
    """
    name = _first_not_finite(gradient)
    if name is None:
        return
    who = "the first examples"
    for i in range(x.shape[0]):
        alone = with_graph(model, x[i : i + 1], lambda output, leaves, u=U[i : i + 1]: reverse(output, leaves, u))  # type: ignore[misc]
        found = _first_not_finite(alone)
        if found is not None:
            name, who = found, f"example {i}"
            break
    raise NonFiniteError(
        f"the gradient of {name!r} at {who} holds a NaN or an infinity, with finite outputs. Look for a square root or "
        "a norm at zero in the forward pass."
    )


def _first_not_finite(gradient: Tangents) -> str | None:
    return next((name for name, g in gradient.items() if not math.isfinite(largest(g))), None)
