"""The dense kernel, row by row, sharing no code with the library.

One ``torch.autograd.grad`` for each (example, output) pair, on one example at a time, in float64, on a
deep copy of the module. No transform of functions, no vectorisation, no chunk.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_jacobian(
    module: nn.Module,
    x: Tensor,
    *,
    names: Sequence[str] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """Return d outputs / d parameters, shape (N * C, P), row ``i * C + c``; parameters in their given order."""
    twin = copy.deepcopy(module).double().requires_grad_(True)
    named = dict(twin.named_parameters())
    chosen = [named[name] for name in (named if names is None else names)]
    rows = []
    for example in x.double().split(1) if x.is_floating_point() else x.split(1):
        returned = twin(example)
        outputs = (returned if output_fn is None else output_fn(returned)).reshape(-1)
        for output in outputs:
            gradients = torch.autograd.grad(output, chosen, retain_graph=True, allow_unused=True)
            row = [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(chosen, gradients, strict=True)
            ]
            rows.append(torch.cat([part.reshape(-1) for part in row]))
    return torch.stack(rows).detach()


def quadratic_form_gradients(
    module: nn.Module, x: Tensor, U: Tensor, V: Tensor, *, output_fn: Callable[[Any], Tensor] | None = None
) -> list[Tensor]:
    """Differentiate ``sum_d u_dᵀ J Jᵀ v_d`` in all parameters: reverse mode through rows made by reverse mode.

    ``module`` must be in float64. Flash attention, which torch cannot differentiate twice, is off.
    """
    twin = copy.deepcopy(module).requires_grad_(True)
    parameters = list(twin.parameters())
    rows = []
    for example in x.split(1):
        with sdpa_kernel(SDPBackend.MATH):
            returned = twin(example)
        for output in (returned if output_fn is None else output_fn(returned)).reshape(-1):
            gradients = torch.autograd.grad(output, parameters, create_graph=True, allow_unused=True)
            row = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in row]))
    J = torch.stack(rows)
    form = (U * (J @ (J.mT @ V))).sum()
    if not form.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(form, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def dense_kernel(J1: Tensor, J2: Tensor, num_outputs: int, outputs: str | int = "full") -> Tensor:
    """Return the kernel of two Jacobians from ``dense_jacobian`` in one of the four output modes."""
    by_output1 = J1.unflatten(0, (-1, num_outputs))
    by_output2 = J2.unflatten(0, (-1, num_outputs))
    if outputs == "full":
        return J1 @ J2.mT
    if outputs == "trace":
        return torch.einsum("icp,jcp->ij", by_output1, by_output2) / num_outputs
    if outputs == "sum":
        scale = math.sqrt(num_outputs)
        return (by_output1.sum(1) / scale) @ (by_output2.sum(1) / scale).mT
    assert isinstance(outputs, int)
    return by_output1[:, outputs] @ by_output2[:, outputs].mT


def defect(found: Tensor, expected: Tensor) -> float:
    """Return the largest entry of the difference relative to the largest entry that was expected."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert expected.numel() > 0, "nothing was compared"
    largest = expected.double().abs().max().item()
    return (found.double() - expected.double()).abs().max().item() / (largest or 1.0)
