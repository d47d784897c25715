"""``ntk``: from a model and inputs to the lazy kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lazy.engines.chunks import parse_budget
from ntk_lazy.engines.forward_pass import ForwardPass
from ntk_lazy.engines.preflight import check
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.engines.suspects import AS_ONE_EXAMPLE, LOOKUP_ERRORS, TRANSFORM_ERRORS, first_line
from ntk_lazy.errors import ArgumentError, NTKLazyError, ShapeError, UnsupportedModuleError
from ntk_lazy.model import (
    FunctionalModel,
    OutputFunction,
    ParameterChoice,
    ParameterFunction,
    as_ieee,
    check_output_fn,
    generators_kept,
)
from ntk_lazy.modes import ordinary_mode
from ntk_lazy.operator import NTKLinearOperator, Side
from ntk_lazy.outputs import OutputLayout, OutputMode, as_output_mode
from ntk_lazy.plan import EngineName, EngineSettings
from ntk_lazy.precision import ieee_precision
from ntk_lazy.probes import Probes

_PREFLIGHT_EXAMPLES = 4
_MOST_BYTES = 64 << 20  # of inputs that all go through a model at once, to find out why some do not
_CONVERSIONS = {torch.float32: "model.float()", torch.float64: "model.double()"}


@ordinary_mode()
def ntk(  # noqa: PLR0913  (the front door: each option is one word)
    model: nn.Module | ParameterFunction | FunctionalModel,
    x1: Tensor | np.ndarray | Probes,
    x2: Tensor | np.ndarray | Probes | None = None,
    *,
    params: ParameterChoice | Mapping[str, Tensor] = None,
    outputs: OutputMode = "full",
    output_fn: OutputFunction | None = None,
    engine: EngineName = "auto",
    memory_budget: int | float | str | None = None,
    max_dense_bytes: int | None = None,
    chunk_size: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    input_dims: int | None = None,
) -> NTKLinearOperator:
    """Take the empirical neural tangent kernel ``K = J1 J2ᵀ`` of a model without writing it down.

    Args:
        model: A module, a plain function ``f(params, x)``, or a ``FunctionalModel``. A module is neither copied nor
            changed, and what its forward pass does to it is put back; K follows its parameters. Put it into ``eval()``
            mode first if it has dropout or batch-norm.
            Half-precision parameters are copied to float32, exactly, and K stays with the copy.
        x1: Inputs of the rows, N examples: any dtype, token ids included.
        x2: Inputs of the columns; None, or ``x1`` itself, makes K square, on ``x1``.
        params: Which parameters make up J: None for all (frozen ones too), names or glob patterns, or a predicate on
            ``(name, parameter)``. For a plain function, the mapping of its tensors.
        outputs: ``"full"`` (``n = N*C`` rows, row ``i*C + c``), ``"trace"`` (``1/C sum_c K_cc``, N rows), ``"sum"``
            (the Jacobian of ``1/sqrt(C) sum_c f_c``, N rows), or the index of one output (N rows).
        output_fn: Applied to what the module returns, for modules that return dicts or tuples.
        engine: ``"autodiff"`` for any model; ``"factors"``, products from the inputs and output gradients of layers;
            ``"gram"``, K written down under half of the budget and ``max_dense_bytes``, or made anew strip by strip;
            ``"auto"`` for the one that a cost model and the measured rates of the machine say is fastest.
        memory_budget: Bytes, or ``"4GB"``, that a product may hold beside operands and result; None for a quarter of
            what is free.
        max_dense_bytes: The largest K that ``to_dense()`` may write down; None for the memory budget.
        chunk_size: Examples that go through the model at once; None derives it from the budget.
        scratch: A folder on a local disk. What products have in common and does not fit the budget, the factors of
            layers or K itself (up to ``max_dense_bytes``), is kept there in memory-mapped files, which are gone with
            it; None to make it anew for each product. For products on the CPU.
        input_dims: Trailing dimensions of one example; None for all but the first. With it, leading dimensions are
            batches of kernels.

    Returns:
        A ``LinearOperator`` of shape ``(*batch, n1, n2)``, in the dtype and on the device of the parameters.

    Cost: a check on up to four examples (a few passes each way), and one look at all inputs for NaN.

    Raises:
        UnsupportedModuleError: The Jacobian would be random, coupled between examples, or does not exist; the module
            initialises itself in its first call, or reaches a parameter by a way that cannot be followed.
        NonFiniteError: A NaN or an infinity in inputs, parameters, outputs or gradients.
        ShapeError: Inputs or outputs whose first dimension is not the examples, inputs on another device, or of a dtype
            that the model cannot take.
        ArgumentError: No such parameter, output, engine, budget or scratch folder.

    Source: Jacot, Gabriel, Hongler, Neural Tangent Kernel (2018); row order and modes as in
        Kopitkov and Indelman, arXiv 1910.08720, and Mohamadi et al., arXiv 2206.12543.
    """
    functional, mode = _functional(model, params, output_fn), as_output_mode(outputs)
    x2 = None if x2 is x1 else x2
    probes = Probes.of(x1, input_dims=input_dims)
    others = None if x2 is None else Probes.of(x2, input_dims=probes.input_dims if input_dims is None else input_dims)
    for each in (probes, others):
        if each is not None:
            _check_inputs(each, functional)
    few = _examples(probes, _PREFLIGHT_EXAMPLES)
    with _dtypes_named(functional, few), _whole_named(functional, probes, few):
        preflight = check(functional, few)
    functional = replace(functional, is_widened=preflight.is_widened)
    if others is not None:
        _check_columns(functional, others, preflight.num_outputs)
    layout = OutputLayout(mode, preflight.num_outputs)
    budget = parse_budget(memory_budget, functional.device)
    settings = EngineSettings(
        engine=engine,
        memory_budget=budget,
        max_dense_bytes=budget if max_dense_bytes is None else max_dense_bytes,
        chunk_size=chunk_size,
        scratch=None if scratch is None else Scratch.at(scratch, functional.device),
    )
    sides = [
        None if each is None else Side(each.inputs, None, each.input_dims, layout.rows_per_example)
        for each in (probes, others)
    ]
    return NTKLinearOperator.of(
        functional, cast(Side, sides[0]), sides[1], layout=layout, preflight=preflight, settings=settings
    )


def _functional(model: Any, params: Any, output_fn: OutputFunction | None) -> FunctionalModel:
    """Make a pure function of whatever the user calls a model."""
    if isinstance(model, FunctionalModel):
        if params is not None or output_fn is not None:
            raise ArgumentError("a FunctionalModel has its own params and output_fn; give them when you make it.")
        return model
    check_output_fn(output_fn)
    if isinstance(model, nn.Module):
        return FunctionalModel.from_module(model, params=params, output_fn=output_fn)
    if type(model).__name__ == "ExportedProgram":  # its module of torch takes long to load
        raise ArgumentError("model is an ExportedProgram, which holds a module. Pass model.module().")
    if not callable(model):
        raise ArgumentError(f"model must be a module or a function f(params, x), not {type(model).__name__}.")
    if not isinstance(params, Mapping):
        raise ArgumentError("a plain function f(params, x) needs params={'name': tensor, ...}.")
    return FunctionalModel.from_function(model, params, output_fn=output_fn)


def _examples(probes: Probes, count: int) -> Tensor:
    """Take the first examples, whatever batch they are in."""
    return probes.inputs.reshape(-1, *probes.inputs.shape[probes.inputs.ndim - probes.input_dims :])[:count]


@contextmanager
def _dtypes_named(model: FunctionalModel, x: Tensor) -> Iterator[None]:
    """Say so where a model fails on inputs for no other reason than their dtype, which torch words in many ways."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        wanted = model.dtype
        differs = as_ieee(x).dtype != wanted
        if not differs or _runs(model, x) or not _runs(model, x.to(wanted)):
            raise
        conversion = _CONVERSIONS.get(as_ieee(x).dtype) if model.call.module is not None else None
        raise ShapeError(
            f"inputs are {x.dtype} and parameters are {wanted}, and the model fails on the two together. Convert the "
            f"inputs, x.to({wanted}) or for an array x.astype({str(wanted).removeprefix('torch.')!r}), or convert the "
            f"parameters{f', {conversion}' if conversion else ''}."
        ) from error


@contextmanager
def _whole_named(model: FunctionalModel, probes: Probes, few: Tensor) -> Iterator[None]:
    """Say so where a model takes all inputs together, but not the first few."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*TRANSFORM_ERRORS, *LOOKUP_ERRORS) as error:
        if isinstance(error, NTKLazyError) or probes.inputs.nbytes > _MOST_BYTES or few.shape[0] >= probes.num_examples:
            raise
        if _runs(model, few) or not _runs(model, _examples(probes, probes.num_examples)):
            raise
        if isinstance(model.call.module, torch.fx.GraphModule):
            cure = (
                "Export it with a first dimension that may change, torch.export.export(..., dynamic_shapes=...), or "
                "pass the module that was exported."
            )
        else:
            cure = AS_ONE_EXAMPLE
        raise UnsupportedModuleError(
            f"the model takes {probes.num_examples} examples together, but not {few.shape[0]} of them "
            f"({first_line(error)}). {cure}"
        ) from error


def _runs(model: FunctionalModel, x: Tensor) -> bool:
    """Whether the model gets through one forward pass, which may write to copies of its tensors alone."""
    try:
        with torch.no_grad(), ieee_precision(), generators_kept(x.device):
            ForwardPass.run(model, x)
    except NTKLazyError:
        return True  # it got through, and what came out has a fault of its own
    except (*TRANSFORM_ERRORS, *LOOKUP_ERRORS):
        return False
    return True


def _check_columns(model: FunctionalModel, probes: Probes, num_outputs: int) -> None:
    """Run the second inputs through the model once: an error of the model now is better than in a product."""
    x = _examples(probes, 1)
    with _dtypes_named(model, x), torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        found = model(model.params, x).shape[1]
    if found != num_outputs:
        raise ShapeError(f"the model has {num_outputs} outputs for an example of x1, but {found} for one of x2.")


def _check_inputs(probes: Probes, model: FunctionalModel) -> None:
    if probes.inputs.numel() == 0 or probes.num_examples == 0:
        raise ShapeError(f"inputs of shape {tuple(probes.inputs.shape)} hold no example.")
    if probes.inputs.device != model.device:
        raise ShapeError(
            f"inputs are on {probes.inputs.device} and the model is on {model.device}; move one of them with .to()."
        )
    if probes.inputs.dtype in (torch.complex64, torch.complex128):
        raise ShapeError("inputs are complex; split them into real and imaginary parts.")
    probes.check_finite()
