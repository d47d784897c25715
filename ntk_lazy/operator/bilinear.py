"""The gradient of ``sum_d u_dᵀ K v_d``, gathered over the kernels of a batch."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ntk_lazy.engines.contract import X1, X2, Engine
from ntk_lazy.operator.side import Side
from ntk_lazy.shapes import Block


@final
class BilinearGradient:
    """A sum over kernels that share their parameters, while each has inputs of its own.

    Attributes:
        value: ``sum_d u_dᵀ J1 J2ᵀ v_d`` so far.
    """

    def __init__(self, side1: Side, side2: Side | None) -> None:
        self.value: Tensor = torch.zeros((), dtype=torch.float64)
        self._inputs = {X1: side1.x} if side2 is None else {X1: side1.x, X2: side2.x}
        self._by_name: dict[str, Tensor] = {}

    def add(
        self,
        engine: Engine,
        index: tuple[int, ...],
        sides: tuple[Side, Side],
        blocks: tuple[Block, Block],
        *,
        wrt: set[str],
    ) -> None:
        """Add the part of one kernel.

        Args:
            engine: Of the model.
            index: Where the kernel lies in the batch of the blocks.
            sides: Its rows and its columns.
            blocks: U and V, on the rows of the sides.
            wrt: Names of parameters and constants, ``X1``, ``X2``; with one side, X1 means both of its roles.
        """
        is_symmetric = X2 not in self._inputs
        U, V = sides[0].scatter(blocks[0]), sides[1].scatter(blocks[1])
        names = wrt | {X2} if is_symmetric and X1 in wrt else wrt
        value, gradient = engine.bilinear_gradient(sides[0].x, sides[1].x, U, V, wrt=names)
        self.value = self.value.to(value) + value
        for name, part in gradient.items():
            if name in (X1, X2):
                self._add_input(X1 if is_symmetric else name, sides[0], index, part)
            else:
                self._by_name[name] = self._by_name[name] + part if name in self._by_name else part

    def add_dense(
        self,
        engine: Engine,
        index: tuple[int, ...],
        sides: tuple[Side, Side],
        G: Tensor,
        *,
        wrt: set[str],
    ) -> None:
        """Add the part of one kernel of ``⟨G, J1 J2ᵀ⟩``, G on the rows of both sides; ``value`` stays as it is.

        The rows of J are differentiated one by one: as a bilinear form with the columns of G it would be all of them
        again for each column.
        """
        is_symmetric = X2 not in self._inputs
        full = sides[1].scatter(sides[0].scatter(G).mT).mT
        # Both roles of one side at once: Jᵀ stands left and right.
        halves = [(full + full.mT, *sides, X1)] if is_symmetric else [(full, *sides, X1), (full.mT, *sides[::-1], X2)]
        for weights, rows, others, name in halves:
            names = (wrt - {X1, X2}) | ({X1} if name in wrt else set())
            for found, part in engine.rows_gradient(rows.x, others.x, weights, wrt=names).items():
                if found == X1:
                    self._add_input(name, rows, index, part)
                else:
                    self._by_name[found] = self._by_name[found] + part if found in self._by_name else part

    def put(self, name: str, gradient: Tensor) -> None:
        """Take the gradient for a name, in the shape of what it belongs to, from elsewhere."""
        self._by_name[name] = gradient

    def gradient(self, name: str) -> Tensor | None:
        """The gradient for one name, None where there is none."""
        return self._by_name.get(name)

    def _add_input(self, name: str, side: Side, index: tuple[int, ...], part: Tensor) -> None:
        """Add to the gradient of the inputs; a dimension that was broadcast is summed over."""
        x = self._inputs[name]
        own = x.shape[: x.ndim - 1 - side.example_dims]
        inner = index[len(index) - len(own) :] if own else ()
        place = tuple(0 if size == 1 else i for size, i in zip(own, inner, strict=True))
        if name not in self._by_name:
            self._by_name[name] = torch.zeros_like(x, requires_grad=False).contiguous()
        self._by_name[name][place] += part
