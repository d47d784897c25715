"""linear_operator's suites in float64, and K from the tensors that an operator holds, for them to compare with."""

from __future__ import annotations

import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from torch import Tensor

import ntk_lazy as nl


def dense_from_tensors(op: nl.NTKLinearOperator) -> Tensor:
    """Write K down by one gradient a row, in the graph of the operator's own tensors."""
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


class Float64:
    """The suites draw in the default dtype."""

    seed = 0

    def setUp(self):
        torch.set_default_dtype(torch.float64)
        super().setUp()

    def tearDown(self):
        super().tearDown()
        torch.set_default_dtype(torch.float32)


class Square(Float64, LinearOperatorTestCase):
    should_call_lanczos = False  # it has its own
    dense = staticmethod(dense_from_tensors)

    def evaluate_linear_op(self, linear_op):
        for tensor in linear_op.representation():
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.requires_grad_(False)
        with torch.enable_grad():
            leaves = linear_op if linear_op.requires_grad else linear_op.detach().requires_grad_(True)
            dense = self.dense(leaves)
        return dense if linear_op.requires_grad else dense.detach()


class Rectangular(Float64, RectangularLinearOperatorTestCase):
    dense = staticmethod(dense_from_tensors)
    evaluate_linear_op = Square.evaluate_linear_op
