"""The check before the first product: is J what it seems, and which way of multiplying with it works.

A handful of examples goes through the model a few times. What comes out wrong there would come out wrong at
full size without a word: dropout that changes between two passes, batch statistics, gradients that are dropped,
derivatives whose forward and reverse modes disagree. Here it is an error that names the module and the cure.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.contract import PassTimes, Preflight
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.derivatives import Derivatives, fault_of_second_derivatives, quiet
from ntk_lazy.engines.exchange import refuse_other_ways
from ntk_lazy.engines.forward_pass import ForwardPass
from ntk_lazy.engines.independence import check_finite, check_independence, reverse
from ntk_lazy.engines.linearisation import (
    DoubleReverse,
    LinearisationMode,
    Tangents,
    linearisation,
    outputs,
)
from ntk_lazy.engines.rates import seconds
from ntk_lazy.engines.rounding import largest, noise
from ntk_lazy.engines.suspects import TRANSFORM_ERRORS, named
from ntk_lazy.errors import NonFiniteError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.out_of_memory import refuse_out_of_memory

_PROBES = 3
_TIMED_BYTES, _TIMED_EXAMPLES, _TIMED_COLUMNS = 16 << 20, 64, 2  # as in a product: small ones pay for overheads


def check(model: FunctionalModel, x: Tensor) -> Preflight:
    """Refuse a model whose kernel would be wrong, and find out how to multiply with its Jacobian.

    The module, the random number generators and all global switches come back as they were.

    Args:
        model: The model at its parameters.
        x: A few examples, shape ``(b, ...)``; two at least let the independence of examples be tested.

    Cost: Five forward passes over ``x`` or parts of it, with backward passes behind four of them, and, for a model with
        parameters that have no factors, those of ``Derivatives.of``; memory for 3 parameter vectors.

    Raises:
        NonFiniteError: A parameter, an output or a gradient is not finite.
        ShapeError: The outputs do not have the examples as their first dimension.
        UnsupportedModuleError: The outputs are random, depend on the other examples of the batch or are not
            real floating-point numbers; no parameter reaches them; or no way of differentiating works.
    """
    _check_parameters(model)
    with quiet(x) as caught:
        forward, U, gradient = _forward_and_backward(model, x)
        forward.check_determinism()
        model = replace(
            model,
            has_private_buffers=forward.writes_buffers,
            keeps_generators=forward.draws_numbers,
            is_widened=forward.copy.is_widened,
        )
        _refuse_known(forward)
        refuse_other_ways(model, forward.touched, x, U[None], forward.rounding)
        if isinstance(gradient, UnsupportedModuleError):
            raise gradient
        check_finite(model, x, U, gradient)
        check_independence(model, forward, U, gradient)
        _refuse_dropped_gradients(caught)
        coverage = _find_factors(model, forward, gradient)
        del gradient
        times = None
        apart = forward.apart()
        find = partial(Derivatives.of, model, apart)
        if coverage.uncovered:
            derivatives = find()  # needed in any case: a model without any is better refused now
            find = partial(_same, derivatives)
            if not forward.is_counted:
                times = _time_passes(model, x, derivatives.mode, forward.activation_bytes)
    return Preflight(
        find_derivatives=find,
        find_second_fault=partial(fault_of_second_derivatives, model, apart),
        num_outputs=forward.output.shape[1],
        writes_buffers=forward.writes_buffers,
        draws_numbers=forward.draws_numbers,
        forward_flops=forward.flops,
        times=times,
        activation_bytes=forward.activation_bytes,
        coverage=coverage,
        is_widened=model.is_widened,
        remarks=forward.arithmetic.remarks,
    )


def _forward_and_backward(
    model: FunctionalModel, x: Tensor
) -> tuple[ForwardPass, Tensor, Tangents | UnsupportedModuleError]:
    """Apply the model once, and take the gradient of a mixture of its outputs, another one for each example.

    Returns:
        The forward pass, the cotangents, and the gradient or why there is none: much is refused for other reasons.
    """
    found: list[tuple[Tensor, Tangents | UnsupportedModuleError]] = []

    def look(output: Tensor, leaves: Tangents) -> None:
        U = _mixture(x.shape[0], output) @ _cotangents(output)
        try:
            found.append((U, reverse(output, leaves, U)))
        except UnsupportedModuleError as error:
            found.append((U, error))

    forward = ForwardPass.run(model, x, look)
    return forward, *found[-1]  # casts may have been left out in a second pass


def _same(derivatives: Derivatives) -> Derivatives:
    return derivatives


def _check_parameters(model: FunctionalModel) -> None:
    for name, tensor in (model.params | model.constants).items():
        # Buffers may hold infinities for good reasons: attention masks do.
        if name in model.buffer_names or not tensor.is_floating_point():
            continue
        if not math.isfinite(largest(tensor.detach())):
            raise NonFiniteError(f"parameter {name!r} holds a NaN or an infinity. Use an earlier checkpoint.")


def _refuse_known(forward: ForwardPass) -> None:
    """Refuse what is wrong whatever the examples are: these few may not show it."""
    calls = forward.calls
    coupled = suspects.batch_statistics_modules(calls)
    if coupled:
        cure = "call model.eval() first" if coupled[0].module.training else "set track_running_stats=True"
        raise UnsupportedModuleError(
            f"{named(coupled)} normalises with statistics of the batch, so that one example depends on the others and "
            f"K on the chunks. Cure: {cure}, or use GroupNorm or LayerNorm."
        )
    if forward.embeddings.has_frequencies:
        at_fault = named(suspects.embedding_modules(calls, "scale_grad_by_freq"), otherwise="an embedding")
        raise UnsupportedModuleError(
            f"the gradient of {at_fault} depends on how often a token occurs in the batch. "
            "Set scale_grad_by_freq=False."
        )
    if forward.embeddings.is_sparse:
        at_fault = named(suspects.embedding_modules(calls, "sparse"), otherwise="an embedding")
        raise UnsupportedModuleError(f"the gradients of {at_fault} are sparse tensors. Set sparse=False.")


def _refuse_dropped_gradients(caught: list[warnings.WarningMessage]) -> None:
    if any("Gradients will be None" in str(warning.message) for warning in caught):
        raise UnsupportedModuleError(
            "reentrant activation checkpointing drops the gradient of a block whose input has none. "
            "Set use_reentrant=False in torch.utils.checkpoint.checkpoint."
        )


def _find_factors(model: FunctionalModel, forward: ForwardPass, gradient: Tangents) -> Coverage:
    """Find out for which parameters J can be had as factors, and check them against the gradient of the mixture."""
    # Three examples at least: the place of the examples in a tensor does not show with one of them.
    b = forward.x.shape[0]
    members = [i % b for i in range(max(b, _PROBES))]
    mixture = _mixture(len(members), forward.output)
    mixture[b:] = 0  # the first ones again, which the gradient has once
    scale = largest(*gradient.values())

    def agrees(name: str, total: Tensor) -> bool:
        expected = gradient[name].reshape(-1) if name in gradient else torch.zeros_like(total)
        return not forward.has_other_gradients(total, expected.to(total.dtype), scale=scale)

    try:
        return Coverage.of(
            model, forward.x[members], cotangents=_cotangents(forward.output), mixture=mixture, agrees=agrees
        )
    except TRANSFORM_ERRORS as error:
        refuse_out_of_memory(error)
        return Coverage({}, dict.fromkeys(model.params, suspects.first_line(error)))


def _time_passes(model: FunctionalModel, x: Tensor, mode: LinearisationMode, activation_bytes: int) -> PassTimes:
    """Time Jᵀ and J with a few columns on a small chunk of examples, and the gradient of one example.

    Not a forward pass itself: the derivatives of fused layers run through other, slower kernels.

    Cost: Three products with 64 examples at most.
    """
    num_examples = min(max(x.shape[0], _TIMED_BYTES // max(activation_bytes, 1)), _TIMED_EXAMPLES)
    examples = x[torch.arange(num_examples, device=x.device) % x.shape[0]]
    U = torch.ones_like(outputs(model, examples)).expand(_TIMED_COLUMNS, -1, -1)

    def run() -> None:
        chunk = linearisation(mode)(model, examples)
        chunk.push(chunk.pull(U))

    # As the cost model counts: one forward pass in each half, and two passes' worth for each column.
    passes = 2 * (1 + 2 * _TIMED_COLUMNS) * (1 if mode == "forward-over-reverse" else 2)
    in_batch = seconds(run, model.device.type, repeats=2) / (passes * num_examples)
    alone = seconds(lambda: DoubleReverse(model, x[:1]).pull(U[:1, :1]), model.device.type) / 3
    return PassTimes(in_batch, alone)


def _cotangents(output: Tensor) -> Tensor:
    return noise((2, output.shape[1]), like=output, seed=1)


def _mixture(num_examples: int, output: Tensor) -> Tensor:
    """Give each example another share of the two cotangents, so that a sum cannot hide one for another."""
    return noise((num_examples, 2), like=output, seed=4)
