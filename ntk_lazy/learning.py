"""Output, target and residual of one network on the rows of its kernel: where they lie, and where a step takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ntk_lazy.alignment import relative_energy, spectral_position
from ntk_lazy.columns import HasVectors
from ntk_lazy.dynamics import LossReduction, first_order_error, first_order_step, loss_factor
from ntk_lazy.engines.flat import FlatLayout
from ntk_lazy.errors import ShapeError
from ntk_lazy.estimate import Estimate
from ntk_lazy.model import FunctionalModel
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.outputs import OutputLayout, OutputMode
from ntk_lazy.shapes import Block

_CHUNK = 4_096


@final
@dataclass(frozen=True, eq=False)
class Learning:
    """What the network does on the probes and what it should do, as columns on the rows of its kernel.

    Attributes:
        kernel: The kernel at the network's parameters, square, on the probes.
        functional: The network as a function of its parameters.
        inputs: The probes.
        outputs: Which outputs make up the rows.
        reduction: How the loss is reduced.
        output: f, shape ``(n, 1)``, or ``(N, C)`` in trace mode.
        target: y, shaped alike.
    """

    kernel: NTKLinearOperator
    functional: FunctionalModel
    inputs: Tensor
    outputs: OutputMode
    reduction: LossReduction
    output: Block
    target: Block

    @classmethod
    def of(
        cls,
        functional: FunctionalModel,
        kernel: NTKLinearOperator,
        inputs: Tensor,
        target: Tensor,
        *,
        outputs: OutputMode = "full",
        reduction: LossReduction = "half_mean",
    ) -> Learning:
        """Evaluate the network on the probes and bring target and output onto the rows.

        Cost: one forward pass.

        Raises:
            ShapeError: The target has another number of entries than the output.
        """
        output = evaluate(functional, functional.params, inputs)
        if target.numel() != output.numel():
            raise ShapeError(
                f"the target has shape {tuple(target.shape)}, but the model returns {tuple(output.shape)} on the "
                "probes."
            )
        target = target.detach().to(output).reshape(output.shape)
        if outputs != "trace":
            layout = OutputLayout(outputs, kernel.num_outputs)
            output, target = (layout.lower(t.unsqueeze(0)) for t in (output, target))
        return cls(kernel, functional, inputs, outputs, reduction, output, target)

    @property
    def residual(self) -> Block:
        """``f − y``."""
        return self.output - self.target

    @property
    def _factor(self) -> float:
        """The factor c in ``∂L/∂f = c (f − y)``."""
        K = self.kernel
        return loss_factor(self.reduction, num_examples=K.num_examples, num_outputs=K.num_outputs)

    @property
    def loss(self) -> float:
        """The squared error in the convention of the reduction: ``c/2 Σ (f − y)²`` for all four."""
        return 0.5 * self._factor * self.residual.double().square().sum().item()

    def function(self, name: Literal["target", "output", "residual"]) -> Block:
        """Return y, f or f − y."""
        return {"target": self.target, "output": self.output, "residual": self.residual}[name]

    def energy(self, name: Literal["target", "output", "residual"], pairs: HasVectors) -> tuple[float, ...]:
        """Measure ``E(φ, 1..k)`` of one of the three.

        Raises:
            DegenerateError: It is zero.
            NonFiniteError: It is not finite.
        """
        return tuple(relative_energy(pairs, self.function(name)).tolist())

    def spectral_position(self, trace: Estimate) -> float:
        """Measure ``gᵀKg / (‖g‖² tr K)`` of the gradient of the loss with respect to the outputs.

        Cost: one half product.
        """
        return float(spectral_position(self.kernel, self.residual, trace=trace))

    def first_order(self, lr: float) -> dict[str, float]:
        """Take a step of full-batch gradient descent, see how the outputs change, and compare with what K says.

        Needs ``outputs="full"``. Nothing is said of a step that changes nothing.

        Cost: three products and one forward pass.
        """
        descent = self.kernel.jacobian_rmatmul(self.residual).mul_(-lr * self._factor)
        parts = FlatLayout.of(self.functional.params).views(descent.mT)
        moved = {n: p + parts[n].squeeze(0) for n, p in self.functional.params.items()}
        actual = evaluate(self.functional, moved, self.inputs).reshape(-1, 1) - self.output
        if not bool((actual != 0).any()):
            return {}
        predicted = first_order_step(self.kernel, self.residual, lr, reduction=self.reduction)
        found = first_order_error(actual, predicted)
        return {"first_order_error": found.error, "first_order_cosine": found.cosine}


def evaluate(functional: FunctionalModel, params: dict[str, Tensor], inputs: Tensor) -> Block:
    """Evaluate the outputs on all examples, in chunks, shape ``(N, C)``."""
    return torch.cat([functional(params, chunk) for chunk in inputs.split(_CHUNK)])
