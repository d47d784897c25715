"""How a model can be differentiated: by which modes, whether over many examples at once, and in how many bytes.

Found out when it is asked for. A model that has factors for all of its parameters may never need it, and the first use
of some of these transforms loads a good part of torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
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
from ntk_lazy.engines.rounding import largest, noise, pieces
from ntk_lazy.engines.suspects import TRANSFORM_ERRORS, named
from ntk_lazy.gemm import times_transposed_in_float64
from ntk_lazy.model import FunctionalModel, generators_kept
from ntk_lazy.out_of_memory import refuse_out_of_memory
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.shapes import SmallMatrix
from ntk_lazy.threads import exclusive

# Bytes of a parameter vector up to which what a product holds is measured: that takes a dozen of them.
_MEASURED_BYTES = 2 << 20


@final
@dataclass(frozen=True)
class Derivatives:
    """What automatic differentiation can do with a model.

    Attributes:
        mode: How J is multiplied: forward over reverse mode, reverse mode twice, or once for each row of J.
        footprint: Bytes of ``Jᵀ`` and then J, as a function of examples and columns.
        note: Why there is no forward mode, or no second derivative, naming the module; empty where there is.
        find_vectorises: Finds out about ``vectorises``.
    """

    mode: LinearisationMode
    footprint: Footprint
    note: str
    find_vectorises: Callable[[], bool]

    @classmethod
    def of(cls, model: FunctionalModel, forward: ForwardPass) -> Self:
        """Try on a few examples, each way against plain reverse mode.

        Args:
            model: The model at its parameters; it has passed the rest of the preflight.
            forward: A forward pass of it.

        Cost: Three forward passes over the examples, with five backward passes or as much behind them; memory for 3
            parameter vectors. Small models go through eight products more, whose bytes are measured. The first call
            in a process loads parts of torch, which takes a second or two.
        """
        with quiet(forward.x):
            mode, note = _choose_mode(model, forward)
            footprint = _footprint(model, forward, mode)
        return cls(mode, footprint, note, partial(_vectorises, model, forward, mode))

    @cached_property
    def vectorises(self) -> bool:
        """Whether the gradients of single examples can be had by one vectorised call, at its full speed.

        Cost: where it is first asked for, two passes over two examples, with memory for 4 parameter vectors.
        """
        return self.find_vectorises()


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
    if forward.embeddings.has_padding:
        # Reverse mode skips the row of padding_idx, forward mode does not; whether it shows depends on the tokens.
        at_fault = named(suspects.embedding_modules(calls, "padding_idx"), otherwise="an embedding")
        reason = "forward and reverse mode disagree on padding_idx"
    elif forward.arithmetic.ties:
        # The examples here may have no ties, and others have.
        rule, at_fault = next(iter(forward.arithmetic.ties.items()))
        reason = f"forward and reverse mode disagree at ties on {rule}"
    else:
        reason = _disagreement(ForwardOverReverse, model, forward)
        if not reason:
            return "forward-over-reverse", ""
        found = suspects.first_without_forward_mode(model, x)
        at_fault, reason = ("the forward pass", reason) if found is None else (str(found[0]), found[1])
    second = _disagreement(DoubleReverse, model, forward)
    if not second:
        return "double-reverse", f"{at_fault}: no forward mode ({reason}); reverse mode is applied twice instead."
    return "reverse by rows", (
        f"{at_fault}: no forward mode ({reason}), and reverse mode once only ({second}); rows of J are made one by one."
    )


def fault_of_second_derivatives(model: FunctionalModel, forward: ForwardPass) -> str:
    """Say why a model cannot be differentiated twice in reverse mode, as gradients of K ask for; "" where it can.

    A backward pass that is marked as differentiable once, or that works on detached tensors, leaves its part out of the
    gradient of a gradient, and autograd may say nothing.

    Cost: Three forward passes over the examples, with five backward passes or as much behind them.
    """
    with quiet(forward.x):
        return _disagreement(DoubleReverse, model, forward)


def _disagreement(kind: type[Linearisation], model: FunctionalModel, forward: ForwardPass) -> str:
    """Say how a way of multiplying fails: by an exception, in Jᵀ, or in ⟨J w, u⟩ = ⟨w, Jᵀ u⟩; "" where it works.

    Two columns at once, of which the first is compared with plain reverse mode and both with J.
    """
    U = noise((2, *forward.output.shape), like=forward.output, seed=2)
    try:
        pulled = kind(model, forward.x).pull(U)
        reference = DoubleReverse(model, forward.x).pull(U[:1])
        scale = largest(*reference.values())
        if any(forward.has_other_gradients(pulled[name][:1], g, scale=scale) for name, g in reference.items()):
            return "its gradient differs from that of plain autograd"
        del reference
        W, size = _tangents(model)
        right = sum(_inner(g, W[name]) for name, g in pulled.items())
        del pulled
        pushed = kind(model, forward.x).push(W)
    except TRANSFORM_ERRORS as error:
        refuse_out_of_memory(error)
        return suspects.first_line(error)
    left = torch.einsum("abc,dbc->ad", U.double(), pushed.double())
    difference = (left - right).abs()
    norms = U.double().flatten(1).norm(dim=1)[:, None] * pushed.double().flatten(1).norm(dim=1)
    is_adjoint = (difference <= forward.rounding.bound * norms).all()
    if not is_adjoint:
        # Errors of entries of Jᵀ u, summed up with the random signs of w.
        is_adjoint = (difference <= forward.measured.gradients * size).all()
    return "" if is_adjoint else "forward and reverse mode disagree"


def _tangents(model: FunctionalModel) -> tuple[Tangents, float]:
    """Draw two random parameter vectors, and tell their norm; one is the other moved on, so that they share memory."""
    generator, n = torch.Generator().manual_seed(3), model.num_params
    numbers = torch.randn(n + 1, generator=generator, dtype=model.dtype).to(model.device)
    return FlatLayout.of(model.params).views(numbers.as_strided((2, n), (1, 1))), float(numbers.norm())


def _vectorises(model: FunctionalModel, forward: ForwardPass, mode: LinearisationMode) -> bool:
    """Compare vectorised gradients of two examples with plain autograd, in a sum in which each has its own weight."""
    if mode != "forward-over-reverse":
        return False
    x = forward.x[:2]
    cotangents = noise((1, forward.output.shape[1]), like=forward.output, seed=1)
    weights = [1.0, 1.5][: x.shape[0]]
    with quiet(x) as caught:
        try:
            stacked = example_gradients(model, x, cotangents)
        except TRANSFORM_ERRORS as error:
            refuse_out_of_memory(error)
            return False
        if any("batching rule" in str(warning.message) for warning in caught):
            return False  # torch would loop over the examples, and say so at every call
        together = DoubleReverse(model, x).pull(torch.stack([weight * cotangents for weight in weights], 1))
        scale = largest(*together.values())
        for name, expected in together.items():
            found = torch.tensordot(torch.tensor(weights).to(stacked[name]), stacked.pop(name)[:, 0], 1).unsqueeze(0)
            if forward.has_other_gradients(found, expected, scale=scale):
                return False
    return True


def _footprint(model: FunctionalModel, forward: ForwardPass, mode: LinearisationMode) -> Footprint:
    """Find out what a chunk holds, for small models from products that are watched while they run."""
    x, num_outputs, flat = forward.x, forward.output.shape[1], FlatLayout.of(model.params)
    parameter_bytes = model.num_params * model.dtype.itemsize
    if mode != "forward-over-reverse":
        return Footprint.by_column(activation_bytes=forward.activation_bytes, parameter_bytes=parameter_bytes)

    def run(examples: int, columns: int) -> Tensor:
        chunk = linearisation(mode)(model, x[torch.arange(examples, device=x.device) % x.shape[0]])
        W = torch.zeros(columns, model.num_params, dtype=model.dtype, device=model.device)
        U = torch.zeros(columns, examples, num_outputs, dtype=model.dtype, device=model.device)
        flat.add(W, chunk.pull(U))
        return chunk.push(flat.views(W))

    return (Footprint.measure(run) if parameter_bytes <= _MEASURED_BYTES else None) or Footprint.vectorised(
        activation_bytes=forward.activation_bytes,
        largest_bytes=forward.largest_bytes,
        parameter_bytes=parameter_bytes,
        largest_parameter_bytes=max(p.nbytes for p in model.params.values()),
    )


def _inner(left: Tensor, right: Tensor) -> SmallMatrix:
    """Multiply all columns of one block with all of another."""
    return sum(
        (times_transposed_in_float64(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in pieces(left, right)),
        torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device),
    )
