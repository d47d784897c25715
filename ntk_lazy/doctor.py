"""``doctor``: whether a model has a kernel, how it would be computed, and what to do where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lazy.errors import ArgumentError
from ntk_lazy.kernel import ntk
from ntk_lazy.model import FunctionalModel, OutputFunction, ParameterChoice, ParameterFunction
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.plan import Plan
from ntk_lazy.probes import Probes

_HALF = (torch.float16, torch.bfloat16)


@final
@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found; printing it explains it.

    Attributes:
        model: Name of the model's type.
        problem: The message of the error that ``ntk`` would raise, or None.
        plan: How a product with one column would be computed, or None where there is no kernel.
        remarks: What is not wrong but worth knowing.
    """

    model: str
    problem: str | None
    plan: Plan | None
    remarks: tuple[str, ...]

    @property
    def is_supported(self) -> bool:
        """Whether the model has a kernel."""
        return self.problem is None

    def __str__(self) -> str:
        lines = [f"{self.model}: {'ready' if self.is_supported else 'no kernel'}"]
        if self.problem is not None:
            lines.append(f"  problem  {self.problem}")
        if self.plan is not None:
            lines += str(self.plan).split("\n")
        return "\n".join([*lines, *(f"  remark   {remark}" for remark in self.remarks)])


def doctor(
    model: nn.Module | ParameterFunction | FunctionalModel,
    x: Tensor | np.ndarray | Probes,
    *,
    params: ParameterChoice | Mapping[str, Tensor] = None,
    output_fn: OutputFunction | None = None,
    input_dims: int | None = None,
) -> Diagnosis:
    """Learn before any product whether a model has a kernel, how it is computed, and the cure where it has none.

    The same check as in ``ntk``, which raises what this reports. An exception that the model itself raises on
    ``x`` comes through as it is. The model is left as it was.

    Args:
        model: As for ``ntk``.
        x: A few examples; all of them are searched for NaN, the first four go through the model.
        params: As for ``ntk``.
        output_fn: As for ``ntk``.
        input_dims: As for ``ntk``.

    Cost: that of making a kernel with ``ntk`` and of ``explain``: eight passes over four examples.
    """
    kind = type(model).__name__ if not callable(model) or isinstance(model, nn.Module) else _name_of(model)
    try:
        kernel = ntk(model, x, params=params, output_fn=output_fn, input_dims=input_dims)
        plan = kernel.explain()
    except ArgumentError as error:
        return Diagnosis(model=kind, problem=str(error), plan=None, remarks=())
    return Diagnosis(model=kind, problem=None, plan=plan, remarks=tuple(_remarks(model, kernel)))


def _name_of(model: Any) -> str:
    return str(getattr(model, "__qualname__", type(model).__name__))


def _remarks(model: Any, kernel: NTKLinearOperator) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    remarks = []
    parameters = dict(model.named_parameters())
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        remarks.append(
            f"{len(frozen)} of {len(parameters)} parameters are frozen ({frozen[0]!r} first); params= decides what "
            "makes up J, not requires_grad."
        )
    if any(p.dtype in _HALF for p in parameters.values()):
        remarks.append(f"half-precision parameters are read exactly; products run in {kernel.dtype}.")
    shared = sum(1 for _ in model.named_parameters(remove_duplicate=False)) - len(parameters)
    if shared:
        remarks.append(f"tied parameters count once ({shared} further names).")
    return remarks
