"""linear_operator's own suites, whole and in float64, on operators of every shape the kernel comes in."""

from __future__ import annotations

import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
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


def _dense(op: nl.NTKLinearOperator) -> Tensor:
    """K by one gradient a row, kept in the graph of the operator's own tensors."""
    tensors = {n: t for n, t in op._differentiable_kwargs.items() if n[:2] in ("p.", "c.", "b.")}
    named = {n[2:]: t.detach() if n.startswith("b.") else t for n, t in tensors.items()}
    names = [n[2:] for n in tensors if n.startswith("p.")]
    module = op.gramian.engine.model.call.module
    sides = []
    for side in (op.gramian.side1, op.gramian.columns):
        jacobians = []
        flat = side.x.reshape(-1, *side.x.shape[side.axis :])
        for x in flat:
            out = torch.func.functional_call(module, named, (x,)).reshape(-1)
            leaves = [named[n] for n in names]
            rows = []
            for entry in out:
                with torch.enable_grad():
                    grads = torch.autograd.grad(entry, leaves, create_graph=True, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            torch.zeros_like(p).flatten() if g is None else g.flatten()
                            for p, g in zip(leaves, grads, strict=True)
                        ]
                    )
                )
            jacobian = torch.stack(rows)
            jacobians.append(jacobian if side.selected is None else jacobian[side.selected])
        sides.append(torch.stack(jacobians).reshape(*side.batch_shape, *jacobians[0].shape))
    K = sides[0] @ sides[1].mT
    return K if op.gramian.scale is None else K * op.gramian.scale


class _Float64:
    """The suites draw in the default dtype."""

    seed = 0

    def setUp(self):
        torch.set_default_dtype(torch.float64)
        super().setUp()

    def tearDown(self):
        super().tearDown()
        torch.set_default_dtype(torch.float32)


class _Square(_Float64, LinearOperatorTestCase):
    def evaluate_linear_op(self, linear_op):
        for tensor in linear_op.representation():
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.requires_grad_(False)
        with torch.enable_grad():
            leaves = linear_op if linear_op.requires_grad else linear_op.detach().requires_grad_(True)
            dense = _dense(leaves)
        return dense if linear_op.requires_grad else dense.detach()


class _Rectangular(_Float64, RectangularLinearOperatorTestCase):
    evaluate_linear_op = _Square.evaluate_linear_op


class TestScalarMLP(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(6, 3))


class TestChunked(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(6, 3), chunk_size=2)


class TestTwoOutputs(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3))


class TestBatched(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(3, 5, 3), input_dims=1)


class TestBatchedTwoOutputs(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(2, 3, 3), input_dims=1)


class TestTwiceBatched(_Square, unittest.TestCase):
    skip_slq_tests = True

    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(2, 3, 5, 3), input_dims=1)


class TestConvolutionalImages(_Square, unittest.TestCase):
    def create_linear_op(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 2)).double()
        return nl.ntk(net, _inputs(3, 2, 4, 4))


class TestBatchNormInEvalMode(_Square, unittest.TestCase):
    def create_linear_op(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).double()
        net(_inputs(20, 3))
        return nl.ntk(net.eval(), _inputs(6, 3))


class TestScaled(_Square, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3), chunk_size=3) * 0.7


class TestIndexSelected(_Square, unittest.TestCase):
    def create_linear_op(self):
        index = torch.tensor([7, 0, 4, 11, 2, 5])
        return nl.ntk(_mlp(3), _inputs(5, 3))[index][:, index]


class TestRectangular(_Rectangular, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(2), _inputs(4, 3), _inputs(3, 3) + 1)


class TestRectangularBroadcastBatch(_Rectangular, unittest.TestCase):
    def create_linear_op(self):
        return nl.ntk(_mlp(), _inputs(3, 1, 4, 3), _inputs(2, 5, 3) + 1, input_dims=1)


if __name__ == "__main__":
    unittest.main()
