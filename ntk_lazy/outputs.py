"""How the C outputs of an example become rows of the kernel, and what one product with them costs.

Every mode is a linear map between blocks on rows and cotangents at the model's outputs. With
``Theta_cc' = J_c J_c'^T`` the four kernels are

- ``"full"``: N*C rows, ``i*C + c``, as ``output.reshape(-1)``;
- ``"trace"``: N rows, ``1/C sum_c Theta_cc``: J is the C Jacobians side by side, so one product makes C passes;
- ``"sum"``: N rows, the Jacobian of ``1/sqrt(C) sum_c f_c``;
- an int: N rows, one output.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.errors import ArgumentError
from ntk_lazy.shapes import Block

OutputMode: TypeAlias = Literal["full", "trace", "sum"] | int


def as_output_mode(outputs: Any) -> OutputMode:
    """Read which outputs make up the rows; an integer of NumPy is one. Whether the model has it is not known here.

    Raises:
        ArgumentError: Neither the name of a mode nor an integer.
    """
    if isinstance(outputs, str) and outputs in ("full", "trace", "sum"):
        return cast("OutputMode", outputs)
    if not isinstance(outputs, bool):
        try:
            return operator.index(outputs)
        except TypeError:
            pass
    raise ArgumentError(f"outputs must be 'full', 'trace', 'sum' or an int, not {outputs!r}.")


@dataclass(frozen=True)
class OutputLayout:
    """The rows that ``num_outputs`` outputs of one example make.

    Attributes:
        mode: ``"full"``, ``"trace"``, ``"sum"`` or the index of one output.
        num_outputs: C, outputs of the model for one example, all trailing dimensions flattened.
    """

    mode: OutputMode
    num_outputs: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", as_output_mode(self.mode))
        if isinstance(self.mode, int) and not -self.num_outputs <= self.mode < self.num_outputs:
            raise ArgumentError(
                f"outputs={self.mode} asks for an output that the model does not have: it has {self.num_outputs}."
            )

    @property
    def rows_per_example(self) -> int:
        """Rows of K that one example owns."""
        return self.num_outputs if self.mode == "full" else 1

    @property
    def passes(self) -> int:
        """Cotangents that one column needs: C in trace mode, else 1."""
        return self.num_outputs if self.mode == "trace" else 1

    def lift(self, V: Block) -> Float[Tensor, "columns examples outputs"]:
        """Turn columns on the rows of some examples into cotangents at their outputs.

        Args:
            V: Shape ``(b * rows_per_example, k)``.

        Returns:
            Shape ``(k * passes, b, C)``; the pass is the fast index.
        """
        C = self.num_outputs
        if self.mode == "full":
            return V.reshape(-1, C, V.shape[1]).permute(2, 0, 1)
        if self.mode == "sum":
            return (V.mT * C**-0.5).unsqueeze(-1).expand(-1, -1, C)
        if self.mode == "trace":
            eye = torch.eye(C, dtype=V.dtype, device=V.device) * C**-0.5
            return (V.mT[:, None, :, None] * eye[None, :, None, :]).flatten(0, 1)
        lifted = V.new_zeros(V.shape[1], V.shape[0], C)
        lifted[:, :, self.mode] = V.mT
        return lifted

    def lower(self, Y: Float[Tensor, "columns examples outputs"]) -> Block:
        """Apply the transpose of ``lift``: shape ``(k * passes, b, C)`` becomes ``(b * rows_per_example, k)``."""
        C = self.num_outputs
        if self.mode == "full":
            return Y.permute(1, 2, 0).flatten(0, 1)
        if self.mode == "sum":
            return Y.sum(-1).mT * C**-0.5
        if self.mode == "trace":
            return Y.unflatten(0, (-1, C)).diagonal(dim1=1, dim2=3).sum(-1).mT * C**-0.5
        return Y[:, :, self.mode].mT

    def cotangents(self, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "rows outputs"]:
        """List the cotangents whose gradients are the Jacobian rows of one example.

        Returns:
            Shape ``(rows_per_example * passes, C)``; the pass is the fast index.
        """
        eye = torch.eye(self.num_outputs, dtype=dtype, device=device)
        if self.mode == "full":
            return eye
        if self.mode == "trace":
            return eye * self.num_outputs**-0.5
        if self.mode == "sum":
            return eye.sum(0, keepdim=True) * self.num_outputs**-0.5
        return eye[self.mode].unsqueeze(0)
