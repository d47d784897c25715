"""How a model can be differentiated: by which modes, whether over many examples at once, and in how many bytes.

Found out when it is asked for. A model that has factors for all of its parameters may never need it, and the first use
of some of these transforms loads a good part of torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from ntk_lazy.engines import suspects
from ntk_lazy.engines.flat import FlatLayout
from ntk_lazy.engines.footprint import Footprint
from ntk_lazy.engines.forward_pass import ForwardPass
from ntk_lazy.engines.linearisation import (
    DoubleReverse,
    ForwardOverReverse,
    Linearisation,
    LinearisationMode,
    Tangents,
    example_gradients,
    linearisation,
)
from ntk_lazy.engines.rounding import largest, noise
from ntk_lazy.engines.suspects import TRANSFORM_ERRORS, named
from ntk_lazy.model import FunctionalModel, generators_kept
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.threads import exclusive


@final
@dataclass(frozen=True)
class Derivatives:
    """What automatic differentiation can do with a model.

    Attributes:
        mode: How J is multiplied: forward over reverse mode, reverse mode twice, or once for each row of J.
        vectorises: Whether the gradients of single examples can be had by one vectorised call, at its full speed.
        footprint: Bytes of ``Jᵀ`` and then J, as a function of examples and columns.
        note: Why there is no forward mode, or no second derivative, naming the module; empty where there is.
    """

    mode: LinearisationMode
    vectorises: bool
    footprint: Footprint
    note: str

    @classmethod
    def of(cls, model: FunctionalModel, x: Tensor, activation_bytes: int) -> Self:
        """Try on a few examples, each way against plain reverse mode.

        Args:
            model: The model at its parameters; it has passed the rest of the preflight.
            x: Examples, shape ``(b, ...)``.
            activation_bytes: Saved for the backward pass of one example.

        Cost: About a dozen passes over ``x``; memory for up to ``8 + 2 b`` parameter vectors. The first call in a
            process loads parts of torch, which takes a second or two.

        """
        with quiet(x) as caught:
            forward = ForwardPass.run(model, x)
            mode, note = _choose_mode(model, forward)
            vectorises = mode == "forward-over-reverse" and _vectorises(model, forward, caught)
            return cls(mode, vectorises, _measure_footprint(model, x, mode, activation_bytes), note)


@contextmanager
def quiet(x: Tensor) -> Iterator[list[warnings.WarningMessage]]:
    """Build no graph by default, compute in IEEE arithmetic, keep the generators, collect warnings, and be alone."""
    with (
        exclusive(),
        ieee_precision(),
        torch.no_grad(),
        differentiable_attention(),
        generators_kept(x.device),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        yield caught


def _choose_mode(model: FunctionalModel, forward: ForwardPass) -> tuple[LinearisationMode, str]:
    """Take the first way of multiplying with J that agrees with plain reverse mode; say what is wrong with others."""
    x, calls = forward.x, forward.calls
    U = noise((2, *forward.output.shape), like=forward.output, seed=2)
    W = {name: noise((2, *p.shape), like=p, seed=3 + i) for i, (name, p) in enumerate(model.params.items())}
    reference = DoubleReverse(model, x).pull(U)
    if forward.embeddings.has_padding:
        # Reverse mode skips the row of padding_idx, forward mode does not; whether it shows depends on the tokens.
        at_fault = named(suspects.embedding_modules(calls, "padding_idx"), otherwise="an embedding")
        reason = "forward and reverse mode disagree on padding_idx"
    elif forward.arithmetic.ties:
        # The examples here may have no ties, and others have.
        rule, at_fault = next(iter(forward.arithmetic.ties.items()))
        reason = f"forward and reverse mode disagree at ties on {rule}"
    else:
        reason = _disagreement(ForwardOverReverse(model, x), U, W, reference, forward)
        if not reason:
            return "forward-over-reverse", ""
        found = suspects.first_without_forward_mode(calls)
        at_fault, reason = ("the forward pass", reason) if found is None else (str(found[0]), found[1])
    second = _disagreement(DoubleReverse(model, x), U, W, reference, forward)
    if not second:
        return "double-reverse", f"{at_fault}: no forward mode ({reason}); reverse mode is applied twice instead."
    return "reverse by rows", (
        f"{at_fault}: no forward mode ({reason}), and reverse mode once only ({second}); rows of J are made one by one."
    )


def fault_of_second_derivatives(model: FunctionalModel, x: Tensor) -> str:
    """Say why a model cannot be differentiated twice in reverse mode, as gradients of K ask for; "" where it can.

    A backward pass that is marked as differentiable once, or that works on detached tensors, leaves its part out of the
    gradient of a gradient, and autograd may say nothing.

    Cost: Five passes over ``x``.
    """
    with quiet(x):
        forward = ForwardPass.run(model, x)
        U = noise((1, *forward.output.shape), like=forward.output, seed=2)
        W = {name: noise((1, *p.shape), like=p, seed=3 + i) for i, (name, p) in enumerate(model.params.items())}
        return _disagreement(DoubleReverse(model, x), U, W, DoubleReverse(model, x).pull(U), forward)


def _disagreement(way: Linearisation, U: Tensor, W: Tangents, reference: Tangents, forward: ForwardPass) -> str:
    """Say how a way of multiplying fails: by an exception, in Jᵀ, or in ⟨J w, u⟩ = ⟨w, Jᵀ u⟩; "" where it works."""
    try:
        pulled, pushed = way.pull(U), way.push(W)
    except torch.OutOfMemoryError:
        raise
    except TRANSFORM_ERRORS as error:
        return suspects.first_line(error)
    scale = largest(*reference.values())
    if any(forward.has_other_gradients(pulled[name], g, scale=scale) for name, g in reference.items()):
        return "its gradient differs from that of plain autograd"
    left = torch.einsum("abc,dbc->ad", U.double(), pushed.double())
    right = torch.stack([_flat(g) @ _flat(W[name]).mT for name, g in pulled.items()]).sum(0)
    norms = U.double().flatten(1).norm(dim=1)[:, None] * pushed.double().flatten(1).norm(dim=1)
    is_adjoint = ((left - right).abs() <= forward.rounding.bound * norms).all()
    if not is_adjoint:
        # Errors of entries of Jᵀ u, summed up with the random signs of w.
        total = sum(_flat(w).square().sum(1) for w in W.values()) ** 0.5
        is_adjoint = ((left - right).abs() <= forward.measured.gradients * total).all()
    return "" if is_adjoint else "forward and reverse mode disagree"


def _vectorises(model: FunctionalModel, forward: ForwardPass, caught: list[warnings.WarningMessage]) -> bool:
    x, num_warnings = forward.x, len(caught)
    cotangents = noise((2, forward.output.shape[1]), like=forward.output, seed=1)
    try:
        stacked = example_gradients(model, x, cotangents)
    except torch.OutOfMemoryError:
        raise
    except TRANSFORM_ERRORS:
        return False
    if any("batching rule" in str(warning.message) for warning in caught[num_warnings:]):
        return False  # torch would loop over the examples, and say so at every call
    by_example = [DoubleReverse(model, x[i : i + 1]).pull(cotangents.unsqueeze(1)) for i in range(x.shape[0])]
    scale = max(largest(*g.values()) for g in by_example)
    return not any(
        forward.has_other_gradients(stacked[name][i], g, scale=scale)
        for i, row in enumerate(by_example)
        for name, g in row.items()
    )


def _measure_footprint(model: FunctionalModel, x: Tensor, mode: LinearisationMode, activation_bytes: int) -> Footprint:
    """Find out what a chunk holds, from products that are watched while they run."""
    flat = FlatLayout.of(model.params)
    num_outputs = model(model.params, x[:1]).shape[1]

    def run(examples: int, columns: int) -> Tensor:
        chunk = linearisation(mode)(model, x[torch.arange(examples, device=x.device) % x.shape[0]])
        W = torch.zeros(columns, model.num_params, dtype=model.dtype, device=model.device)
        U = torch.zeros(columns, examples, num_outputs, dtype=model.dtype, device=model.device)
        flat.add(W, chunk.pull(U))
        return chunk.push(flat.views(W))

    measured = Footprint.measure(run) if mode == "forward-over-reverse" else None
    parameter_bytes = model.num_params * model.dtype.itemsize
    return measured or Footprint.assume(activation_bytes=activation_bytes, parameter_bytes=parameter_bytes)


def _flat(columns: Tensor) -> Tensor:
    return columns.reshape(columns.shape[0], -1).double()
