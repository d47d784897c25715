"""The check before the first product: is J what it seems, and which way of multiplying with it works.

A handful of examples goes through the model a dozen times. What comes out wrong there would come out wrong at
full size without a word: dropout that changes between two passes, batch statistics, gradients that are dropped,
derivatives whose forward and reverse modes disagree. Here it is an error that names the module and the cure.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.contract import PassTimes, Preflight
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.derivatives import Derivatives, fault_of_second_derivatives, quiet
from ntk_lazy.engines.exchange import refuse_other_ways, refuse_unreached
from ntk_lazy.engines.flops import FlopCount
from ntk_lazy.engines.forward_pass import ForwardPass
from ntk_lazy.engines.linearisation import (
    DoubleReverse,
    LinearisationMode,
    Tangents,
    linearisation,
)
from ntk_lazy.engines.rates import seconds
from ntk_lazy.engines.rounding import largest, noise
from ntk_lazy.engines.suspects import AS_ONE_EXAMPLE, LOOKUP_ERRORS, TRANSFORM_ERRORS, Call, named
from ntk_lazy.errors import NonFiniteError, UnsupportedModuleError
from ntk_lazy.model import FunctionalModel

_PROBES = 3
_TIMED_BYTES, _TIMED_EXAMPLES, _TIMED_COLUMNS = 16 << 20, 64, 2  # as in a product: small ones pay for overheads


def check(model: FunctionalModel, x: Tensor) -> Preflight:
    """Refuse a model whose kernel would be wrong, and find out how to multiply with its Jacobian.

    The module, the random number generators and all global switches come back as they were.

    Args:
        model: The model at its parameters.
        x: A few examples, shape ``(b, ...)``; two at least let the independence of examples be tested.

    Cost: About a dozen passes over ``x``; memory for up to ``8 + 2 b`` parameter vectors.

    Raises:
        NonFiniteError: A parameter, an output or a gradient is not finite.
        ShapeError: The outputs do not have the examples as their first dimension.
        UnsupportedModuleError: The outputs are random, depend on the other examples of the batch or are not
            real floating-point numbers; no parameter reaches them; or no way of differentiating works.
    """
    _check_parameters(model)
    with quiet(x) as caught:
        forward = ForwardPass.run(model, x, is_repeated=True)
        forward.check_determinism()
        model = replace(
            model,
            has_private_buffers=forward.writes_buffers,
            keeps_generators=forward.draws_numbers,
            is_widened=forward.copy.is_widened,
        )
        activation_bytes = _measure_activations(model, x)
        with FlopCount() as counter:
            model(model.params, x)
        _refuse_known(forward)
        refuse_other_ways(model, forward.touched, x, _weighted_cotangents(forward.output)[:1], forward.rounding)
        by_example = _check_independence(model, forward)
        _refuse_dropped_gradients(caught)
        coverage = _find_factors(model, forward, by_example)
        times = None
        find = partial(Derivatives.of, model, x.clone(), activation_bytes)
        if coverage.uncovered:
            derivatives = find()  # needed in any case: a model without any is better refused now
            find = partial(_same, derivatives)
            if not counter.is_complete:
                times = _time_passes(model, x, derivatives.mode, activation_bytes)
    return Preflight(
        find_derivatives=find,
        find_second_fault=partial(fault_of_second_derivatives, model, x.clone()),
        num_outputs=forward.output.shape[1],
        writes_buffers=forward.writes_buffers,
        draws_numbers=forward.draws_numbers,
        forward_flops=counter.total / x.shape[0],
        times=times,
        activation_bytes=activation_bytes,
        coverage=coverage,
        is_widened=model.is_widened,
        remarks=forward.arithmetic.remarks,
    )


def _same(derivatives: Derivatives) -> Derivatives:
    return derivatives


def _check_parameters(model: FunctionalModel) -> None:
    for name, tensor in (model.params | model.constants).items():
        # Buffers may hold infinities for good reasons: attention masks do.
        if name not in model.buffer_names and tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"parameter {name!r} holds a NaN or an infinity. Use an earlier checkpoint.")


def _measure_activations(model: FunctionalModel, x: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, by example; each storage once."""
    leaves = {name: p.detach().requires_grad_() for name, p in model.params.items()}
    model = replace(model, constants={name: t.detach() for name, t in model.constants.items()})
    owned = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *model.constants.values(), x)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in owned:
            kept[address] = tensor  # which also keeps the address from being used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(leaves, x)
    refuse_unreached(output, leaves)
    return -(-sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // x.shape[0])


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


def _check_independence(model: FunctionalModel, forward: ForwardPass) -> list[Tangents]:
    """Compare a batch with its single rows, in the outputs and in the gradients.

    Returns:
        For each example, ``_weight`` times its gradients along the two ``_cotangents``, each ``(2, *shape)``.
    """
    x, calls = forward.x, forward.calls
    U = _weighted_cotangents(forward.output)
    by_example = []
    for i in range(x.shape[0]):
        example = slice(i, i + 1)
        try:
            alone = model(model.params, x[example])
        except (*TRANSFORM_ERRORS, *LOOKUP_ERRORS) as error:
            what = f"the model takes a batch, but not one example alone ({suspects.first_line(error)})"
            raise _coupled(calls, what) from error
        if forward.has_other_outputs(alone, forward.output[example]):
            forward.check_is_settled(i)
            raise _coupled(calls, f"the output for example {i} alone differs from that in a batch of {x.shape[0]}")
        by_example.append(_reverse(model, x[example], U[:, example]))
        _check_gradient(by_example[-1], example=i)
    together = _reverse(model, x, U)
    scale = largest(*together.values())
    for name, gradient in together.items():
        if forward.has_other_gradients(torch.stack([g[name] for g in by_example]).sum(0), gradient, scale=scale):
            raise _coupled(calls, f"the gradient of {name!r} over a batch is not the sum over its examples")
    _check_unequal_rows(model, forward)
    return by_example


def _check_unequal_rows(model: FunctionalModel, forward: ForwardPass) -> None:
    """Where all examples are the same, try once more with different ones: equal rows hide what couples them."""
    x = forward.x
    if x.shape[0] < 2 or not x.is_floating_point() or not (x == x[:1]).all():
        return
    factors = torch.linspace(0.5, 1.0, x.shape[0], dtype=x.dtype, device=x.device)
    spread = x * factors.reshape(-1, *[1] * (x.ndim - 1))
    output = model(model.params, spread)
    for i in range(x.shape[0]):
        alone = model(model.params, spread[i : i + 1])
        if forward.has_other_outputs(alone, output[i : i + 1]):
            raise _coupled(forward.calls, f"the output for one example differs from that in a batch of {x.shape[0]}")


def _reverse(model: FunctionalModel, x: Tensor, U: Tensor) -> Tangents:
    """Multiply with Jᵀ by plain autograd, which is what the kernel is defined by."""
    try:
        return DoubleReverse(model, x).pull(U)
    except torch.OutOfMemoryError:
        raise
    except TRANSFORM_ERRORS as error:
        raise UnsupportedModuleError(
            f"torch.autograd.grad does not work on this model ({suspects.first_line(error)}). Reentrant activation "
            "checkpointing is one cause: set use_reentrant=False."
        ) from error


def _check_gradient(gradient: Tangents, *, example: int) -> None:
    for name, g in gradient.items():
        if not g.isfinite().all():
            raise NonFiniteError(
                f"the gradient of {name!r} at example {example} holds a NaN or an infinity, with finite outputs. Look "
                "for a square root or a norm at zero in the forward pass."
            )


def _coupled(calls: list[Call], what: str) -> UnsupportedModuleError:
    time_first = suspects.time_first_modules(calls)
    if time_first:
        cure = f"The first dimension is time to {named(time_first)}: set batch_first=True."
    else:
        cure = f"Compute each example of dimension 0 by itself; where it squeezes, let it squeeze(-1). {AS_ONE_EXAMPLE}"
    return UnsupportedModuleError(f"{what}. {cure}")


def _refuse_dropped_gradients(caught: list[warnings.WarningMessage]) -> None:
    if any("Gradients will be None" in str(warning.message) for warning in caught):
        raise UnsupportedModuleError(
            "reentrant activation checkpointing drops the gradient of a block whose input has none. "
            "Set use_reentrant=False in torch.utils.checkpoint.checkpoint."
        )


def _find_factors(model: FunctionalModel, forward: ForwardPass, by_example: list[Tangents]) -> Coverage:
    """Find out for which parameters J can be had as factors, and check them against the gradients of each example."""
    # Three examples, whatever there are: the place of the examples in a tensor does not show with one of them.
    members = [i % len(by_example) for i in range(_PROBES)]
    scale = max(largest(*g.values()) for g in by_example)

    def agrees(name: str, rows: Tensor) -> bool:
        expected = torch.stack([by_example[i][name].reshape(2, -1) / _weight(i) for i in members])
        return not forward.has_other_gradients(rows, expected.to(rows.dtype), scale=scale)

    try:
        return Coverage.of(model, forward.x[members], cotangents=_cotangents(forward.output), agrees=agrees)
    except torch.OutOfMemoryError:
        raise
    except TRANSFORM_ERRORS as error:
        return Coverage({}, dict.fromkeys(model.params, suspects.first_line(error)))


def _time_passes(model: FunctionalModel, x: Tensor, mode: LinearisationMode, activation_bytes: int) -> PassTimes:
    """Time Jᵀ and J with a few columns on a small chunk of examples, and the gradient of one example.

    Not a forward pass itself: the derivatives of fused layers run through other, slower kernels.

    Cost: Three products with 64 examples at most.
    """
    num_examples = min(max(x.shape[0], _TIMED_BYTES // max(activation_bytes, 1)), _TIMED_EXAMPLES)
    examples = x[torch.arange(num_examples, device=x.device) % x.shape[0]]
    U = torch.ones_like(model(model.params, examples)).expand(_TIMED_COLUMNS, -1, -1)

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


def _weighted_cotangents(output: Tensor) -> Tensor:
    """Return two cotangents for all examples, shape ``(2, b, C)``."""
    weights = torch.tensor([_weight(i) for i in range(output.shape[0])]).to(output)
    return _cotangents(output)[:, None, :] * weights[:, None]


def _weight(example: int) -> float:
    """Give each example another share of the cotangents, so that a sum over them cannot hide one for another."""
    return 1 + example / 2
