"""linear_operator's own suites, whole and in float64, on operators of every shape the kernel comes in."""

from __future__ import annotations

import unittest

import pytest
import torch
from suites import Rectangular, Square
from torch import Tensor, nn

import ntk_lazy as nl

# The suites test solvers by sampling, and densify on purpose where their subject is small.
pytestmark = pytest.mark.filterwarnings(
    "ignore::linear_operator.utils.warnings.NumericalWarning",
    "ignore:.*torch.isclose call:linear_operator.utils.warnings.PerformanceWarning",
)


def _mlp(num_outputs: int = 1, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, num_outputs)).double()


def _inputs(*shape: int) -> Tensor:
    # Far apart, so that log-determinants are well away from zero and their relative tolerance means something.
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class TestScalarMLP(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(6, 3))


class TestChunked(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(6, 3), chunk_size=2)


class TestTwoOutputs(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3))


class TestBatched(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(3, 5, 3), input_dims=1)


class TestBatchedTwoOutputs(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(2, 3, 3), input_dims=1)


class TestTwiceBatched(Square, unittest.TestCase):
    skip_slq_tests = True

    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(2, 3, 5, 3), input_dims=1)


class TestConvolutionalImages(Square, unittest.TestCase):
    def create_linear_op(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 2)).double()
        return nl.ntk(net, _inputs(3, 2, 4, 4))


class TestBatchNormInEvalMode(Square, unittest.TestCase):
    def create_linear_op(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).double()
        net(_inputs(20, 3))
        return nl.ntk(net.eval(), _inputs(6, 3))


class TestScaled(Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3), chunk_size=3) * 0.7


class TestIndexSelected(Square, unittest.TestCase):
    def create_linear_op(self):
        index = torch.tensor([7, 0, 4, 11, 2, 5])
        return nl.ntk(_mlp(3), _inputs(5, 3))[index][:, index]


class TestRectangular(Rectangular, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3), _inputs(3, 3) + 1)


class TestRectangularBroadcastBatch(Rectangular, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(3, 1, 4, 3), _inputs(2, 5, 3) + 1, input_dims=1)


if __name__ == "__main__":
    unittest.main()
