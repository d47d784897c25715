"""What a Gaussian process takes for inputs, vectors or numbers of examples, as what a network takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from ntk_lazy.errors import ArgumentError, ShapeError
from ntk_lazy.gp.dataset import IndexedExamples
from ntk_lazy.model import FunctionalModel
from ntk_lazy.probes import Probes


@final
@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """How inputs of shape ``(*batch, N, D)`` stand for N examples.

    Attributes:
        shape: Of one example, whose entries are the D columns; None where an example is a vector.
        dataset: Where the examples are, of which the inputs are the numbers, D = 1; None where they are the inputs.
    """

    shape: tuple[int, ...] | None
    dataset: IndexedExamples | None

    def __post_init__(self) -> None:
        if self.shape is not None and self.dataset is not None:
            raise ArgumentError("dataset holds examples in their own shape; leave input_shape out.")

    @property
    def input_dims(self) -> int:
        """Trailing dimensions of one point of the operator."""
        if self.dataset is not None:
            return 0
        return 1 if self.shape is None else len(self.shape)

    def points(self, x: Tensor) -> Tensor:
        """View inputs as the points of an operator, without a copy.

        Args:
            x: Shape ``(*batch, N, D)``.

        Returns:
            Shape ``(*batch, N, *shape)``, or the numbers of examples, ``(*batch, N)``.

        Raises:
            NonFiniteError: A NaN or an infinity.
            ShapeError: Integers or half precision where numbers of float32 or float64 are needed, integers that
                number no example, or a D that does not fit.
        """
        if self.dataset is not None:
            return _numbers(x, len(self.dataset))
        if not x.is_floating_point():
            raise ShapeError(
                f"inputs are {x.dtype}, and a GP takes vectors of real numbers. For token ids, or examples by number, "
                "pass NTKKernel(..., dataset=data), where data[i] is example i, and integers of shape (N, 1)."
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"inputs are {x.dtype}, and the solves of a GP need float32 or float64: pass x.float().")
        if self.shape is not None:
            if x.shape[-1] != prod(self.shape):
                raise ShapeError(
                    f"inputs of shape {tuple(x.shape)} have {x.shape[-1]} columns, and input_shape={self.shape} makes "
                    f"{prod(self.shape)} of them. Pass one example a row: x.flatten(1) for x of shape (N, ...)."
                )
            x = x.reshape(*x.shape[:-1], *self.shape)
        Probes(x.detach(), self.input_dims).check_finite()
        return x

    def outputs_of_some_columns(self, x: Tensor, network: FunctionalModel) -> int | None:
        """Count the outputs of a network that takes some of the columns, nobody knows which; None if it takes none."""
        for width in range(x.shape[-1] - 1, 0, -1):
            try:
                points = self.points(x.detach()[(0,) * (x.ndim - 2)][:1, :width])
                with torch.no_grad():
                    return int(network(network.params, points).shape[-1])
            except (RuntimeError, ValueError, IndexError):  # of the network, or a ShapeError
                continue
        return None


def active_columns(x: Tensor, dims: Tensor | None) -> Tensor:
    """The active columns, where whoever asks has not chosen them: kernels around another go past its ``__call__``."""
    is_whole = dims is not None and x.shape[-1] != len(dims) and int(dims.max()) < x.shape[-1]
    return x.index_select(-1, dims) if dims is not None and is_whole else x


def _numbers(x: Tensor, size: int) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool or x.shape[-1] != 1:
        raise ShapeError(
            f"inputs are {x.dtype} of shape {tuple(x.shape)}, and this kernel has a dataset: pass the numbers of its "
            "examples as integers of shape (N, 1), torch.arange(N)[:, None] for the first N."
        )
    if x.numel() and not bool(((x >= 0) & (x < size)).all()):
        raise ShapeError(f"inputs number examples {int(x.min())} to {int(x.max())} of a dataset of {size}, from 0 on.")
    return x.squeeze(-1).long()
