"""The suites of GPyTorch and linear_operator, whole, on the kernel and on what Gaussian processes make of it."""

from __future__ import annotations

import unittest
from functools import cache

import pytest
import torch
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from linear_operator.operators import (
    AddedDiagLinearOperator,
    BatchRepeatLinearOperator,
    ConstantMulLinearOperator,
    DiagLinearOperator,
)
from suites import Float64, Square, dense_from_tensors
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.gp import NTKKernel

# The suites test solvers by sampling, and densify on purpose where their subject is small.
pytestmark = pytest.mark.filterwarnings(
    "ignore::linear_operator.utils.warnings.NumericalWarning",
    "ignore:.*torch.isclose call:linear_operator.utils.warnings.PerformanceWarning",
    # torch asks whoever makes sparse tensors, as linear_operator does of indices, whether it should check them.
    "ignore:Sparse invariant checks:UserWarning",
)


class _AnyWidth(nn.Module):
    """A network for vectors of any width, which the suite of kernels wants: fixed weights of its first columns."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(10, 24) / 2), nn.Linear(24, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.weight[: x.shape[1]]).tanh())


def _network(num_outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, num_outputs))


def _inputs(*shape: int) -> Tensor:
    # Far apart, so that log-determinants are well away from zero and their relative tolerance means something.
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class TestKernel(Float64, BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NTKKernel(_AnyWidth(1), **kwargs)


class TestKernelOfTrainedNetwork(Float64, BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NTKKernel(_AnyWidth(1), trainable=True, num_outputs=1, **kwargs)


class TestKernelOfTwoOutputs(Float64, BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NTKKernel(_AnyWidth(2), **kwargs)


class TestScaledKernel(Float64, BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs):
        batch = {name: kwargs[name] for name in kwargs.keys() & {"batch_shape"}}
        return ScaleKernel(NTKKernel(_AnyWidth(1), **kwargs), **batch)


def _dense_with_diagonal(op: AddedDiagLinearOperator) -> Tensor:
    return dense_from_tensors(op._linear_op) + op._diag_tensor.to_dense()


def _dense_with_constants(op: ConstantMulLinearOperator) -> Tensor:
    (constants,) = (t for t in op._args if isinstance(t, Tensor))
    return dense_from_tensors(op.base_linear_op.base_linear_op) * constants[..., None, None]


@cache
def _kernel(num_outputs: int = 1, batch_shape: tuple[int, ...] = ()) -> ScaleKernel:
    """Make a kernel once: the suites ask for some sixty operators, and each network is checked for its first."""
    kernel = ScaleKernel(NTKKernel(_network(num_outputs), trainable=True), batch_shape=torch.Size(batch_shape))
    if batch_shape:
        kernel.outputscale = torch.tensor([0.7, 1.4])
    return kernel


class TestScaled(Square, unittest.TestCase):
    def create_linear_op(self):
        op = _kernel()(_inputs(5, 3)).evaluate_kernel()
        assert isinstance(op, nl.NTKLinearOperator)
        return op


class TestScaledByBatch(Square, unittest.TestCase):
    dense = staticmethod(_dense_with_constants)

    def create_linear_op(self):
        op = _kernel(batch_shape=(2,))(_inputs(5, 3)).evaluate_kernel()
        assert isinstance(op, ConstantMulLinearOperator)
        assert isinstance(op.base_linear_op, BatchRepeatLinearOperator)
        return op


class TestNoiseAdded(Square, unittest.TestCase):
    should_call_cg = False  # it has its own
    dense = staticmethod(_dense_with_diagonal)

    def create_linear_op(self):
        noise = GaussianLikelihood()._shaped_noise_covar(torch.Size([6]))
        op = _kernel()(_inputs(6, 3)).evaluate_kernel() + noise
        assert isinstance(op, AddedDiagLinearOperator)
        return op


class TestDiagonalAdded(Square, unittest.TestCase):
    should_call_cg = False  # it has its own
    dense = staticmethod(_dense_with_diagonal)

    def create_linear_op(self):
        return _kernel(2)(_inputs(4, 3)).evaluate_kernel() + DiagLinearOperator(torch.linspace(0.3, 1.4, 8))
