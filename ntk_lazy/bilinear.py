"""The gradient of ``sum_d u_dᵀ K v_d``, gathered over the kernels of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from ntk_lazy.engines.contract import X1, X2
from ntk_lazy.side import Side

__all__ = ["X1", "X2", "BilinearGradient"]


@final
class BilinearGradient:
    """A sum over kernels that share their parameters, while each has inputs of its own.

    Attributes:
        value: ``sum_d u_dᵀ J1 J2ᵀ v_d`` so far.
        by_name: Its gradient so far; for the inputs in the shape of the batched inputs.
    """

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.value: Tensor = torch.zeros(())
        self._inputs = {X1: sides[0].x, X2: sides[1].x}

    def add(self, index: tuple[int, ...], value: Tensor, gradient: Mapping[str, Tensor]) -> None:
        """Add the part of the kernel at ``index`` of the batch."""
        self.value = self.value.to(value) + value
        for name, part in gradient.items():
            if name in self._inputs:
                if name not in self.by_name:
                    self.by_name[name] = torch.zeros_like(self._inputs[name], requires_grad=False).contiguous()
                self.by_name[name][index] += part
            else:
                self.by_name[name] = self.by_name[name] + part if name in self.by_name else part
