"""Kernels of the zoo and their dense Jacobians; what is costly about them is made once in a process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from case import Case
from oracle import dense_jacobian
from torch import Generator, Tensor

import ntk_lazy as nl

N = 5


@cache
def jacobian(case: Case, n: int = N, seed: int = 0) -> Tensor:
    """Return the dense Jacobian of a case."""
    module = case.module()
    return dense_jacobian(module, case.inputs(n, seed), names=case.parameter_names(module), output_fn=case.output_fn)


def make(case: Case, n: int = N, **options: object) -> nl.NTKLinearOperator:
    """Make the kernel of a case, from end to end."""
    params = None if case.params is None else list(case.params)
    return nl.ntk(case.module(), case.inputs(n), params=params, output_fn=case.output_fn, **options)


@cache
def checked(case: Case) -> nl.NTKLinearOperator:
    """Return the kernel of a case on ``N`` points as ``ntk`` makes it."""
    return make(case)


def kernel(case: Case, **options: object) -> nl.NTKLinearOperator:
    """Make it in another way; the check of the model, which does not depend on the options, is not repeated."""
    preflight = checked(case).explain().preflight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ntk_lazy.kernel.check", lambda model, x: preflight)
        return make(case, **options)


def columns(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Draw a block."""
    return torch.randn(rows, k, generator=Generator().manual_seed(k), dtype=torch.float64).to(dtype)
