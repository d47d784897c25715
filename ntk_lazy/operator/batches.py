"""Many small kernels of a batch as blocks of few larger ones: what a network costs for each call is paid once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.contract import X1, X2, Engine
from ntk_lazy.operator.bilinear import BilinearGradient
from ntk_lazy.operator.entries import block
from ntk_lazy.operator.side import Side

_SHARE = 0.125  # of the budget: entries of a larger kernel
_TILE_ROWS = 256  # of one whose blocks beside the diagonal nobody wants


@final
@dataclass(frozen=True, eq=False)
class SetsOfPoints:
    """One side of the kernels of a batch.

    Attributes:
        x: The points of all sets, one set below the other.
        which: The set of each kernel.
        num_sets: Sets.
        side: The side that they come from, for what an example is.
    """

    x: Tensor
    which: Int64[Tensor, " kernels"]
    num_sets: int
    side: Side

    @classmethod
    def of(cls, side: Side, batch: torch.Size, *, is_apart: bool) -> SetsOfPoints:
        """Flatten a side.

        Args:
            side: Its batch dimensions broadcast to those of the batch.
            batch: Shape of the batch.
            is_apart: Keep equal sets apart, as whoever wants their gradients has to.
        """
        own, x = side.batch_shape, side.x
        if own.numel() > 1 and not is_apart and _is_one_set(x, side.axis):
            x, own = x[(0,) * side.axis], torch.Size()
        which = torch.arange(own.numel(), device=x.device).reshape(own).expand(batch).reshape(-1)
        return cls(x.reshape(-1, *side.x.shape[side.axis + 1 :]), which, own.numel(), side)

    @property
    def rows_per_set(self) -> int:
        """Rows of all outputs of all examples of a set."""
        return self.side.num_examples * self.side.rows_per_example

    @property
    def all_rows(self) -> Side:
        """All rows of all sets as one side."""
        return self._side(self.x)

    def rows_of(self, sets: Tensor) -> Side:
        """All rows of some sets as one side."""
        if len(sets) == self.num_sets:
            return self.all_rows
        return self._side(self.x.unflatten(0, (self.num_sets, -1))[sets].flatten(0, 1))

    def among_all(self, kernels: Tensor, rows: Tensor) -> Tensor:
        """Number rows of kernels among all rows of all sets."""
        return self.which[kernels] * self.rows_per_set + self.side.among_all(rows)

    def _side(self, x: Tensor) -> Side:
        return Side(x, None, self.side.example_dims, self.side.rows_per_example)


@final
@dataclass(frozen=True, eq=False)
class BatchOfKernels:
    """The kernels between two sides of a batch.

    Attributes:
        engine: Of the model.
        first: Their rows.
        second: Their columns; the same object where they are the same rows.
    """

    engine: Engine
    first: SetsOfPoints
    second: SetsOfPoints

    @classmethod
    def of(
        cls, engine: Engine, side1: Side, side2: Side | None, batch: torch.Size, *, apart: frozenset[str] = frozenset()
    ) -> BatchOfKernels:
        """Flatten both sides; those are kept apart, X1 and X2, whose gradients are wanted."""
        first = SetsOfPoints.of(side1, batch, is_apart=X1 in apart)
        second = first if side2 is None else SetsOfPoints.of(side2, batch, is_apart=X2 in apart)
        return cls(engine, first, second)

    def dense(self) -> Float[Tensor, "kernels n1 n2"]:
        """Write all of them down. Builds no graph."""
        one, two = self.first.side, self.second.side
        out = self.first.x.new_empty(len(self.first.which), one.num_rows, two.num_rows, dtype=self.engine.model.dtype)
        for kernels, (rows, columns), (place1, place2) in self._groups():
            K = block(self.engine, rows, columns)
            K = K.unflatten(1, (-1, self.second.rows_per_set)).unflatten(0, (-1, self.first.rows_per_set))
            # Of the large kernel the blocks that are wanted, and of these the rows and columns.
            out[kernels] = _gathered(two, _gathered(one, K[place1, :, place2], 1), 2)
        return out

    def dense_gradient(self, upstream: Float[Tensor, "kernels n1 n2"], total: BilinearGradient, wrt: set[str]) -> None:
        """Add the gradient of ``sum_b ⟨upstream_b, K_b⟩`` to one that is empty; sides in ``wrt`` were kept apart."""
        is_symmetric, sets = self.second is self.first, {X1: self.first, X2: self.second}
        found = {name: torch.zeros_like(sets[name].x, requires_grad=False) for name in wrt & {X1, X2}}
        for kernels, sides, (place1, place2) in self._groups():
            G = upstream.new_zeros(
                int(place1.max()) + 1, self.first.rows_per_set, int(place2.max()) + 1, self.second.rows_per_set
            )
            full = _scattered(self.second.side, _scattered(self.first.side, upstream[kernels], 1), 2)
            G.permute(0, 2, 1, 3).index_put_((place1, place2), full, accumulate=True)
            part = BilinearGradient(sides[0], None if is_symmetric else sides[1])
            part.add_dense(self.engine, (), sides, G.flatten(2, 3).flatten(0, 1), wrt=wrt)
            for name in wrt:
                gradient = part.gradient(name)
                if gradient is None:
                    continue
                if name in (X1, X2):
                    own = sets[name].which[kernels].unique()
                    found[name].unflatten(0, (sets[name].num_sets, -1))[own] += gradient.unflatten(0, (len(own), -1))
                else:
                    found[name] = found[name] + gradient if name in found else gradient
        for name, gradient in found.items():
            total.put(name, gradient.reshape(sets[name].side.x.shape) if name in (X1, X2) else gradient)

    def _groups(self) -> Iterator[tuple[slice, tuple[Side, Side], tuple[Tensor, Tensor]]]:
        """Go through kernels that are blocks of one: these, its sides, and where each kernel has its sets."""
        one, two = self.first, self.second
        entries = max(1, one.rows_per_set * two.rows_per_set)
        room = max(1, int(_SHARE * self.engine.budget) // (entries * self.engine.model.dtype.itemsize))
        if one.num_sets > 1 and two.num_sets > 1:
            room = max(1, min(isqrt(room), _TILE_ROWS // max(one.rows_per_set, two.rows_per_set, 1)))
        for kernels in slices(len(one.which), room):
            sets1, place1 = one.which[kernels].unique(return_inverse=True)
            rows = one.rows_of(sets1)
            if two is one:
                yield kernels, (rows, rows), (place1, place1)
                continue
            sets2, place2 = two.which[kernels].unique(return_inverse=True)
            yield kernels, (rows, two.rows_of(sets2)), (place1, place2)


def _is_one_set(x: Tensor, axis: int) -> bool:
    """Whether all sets of a batch are equal."""
    if all(stride == 0 or size == 1 for stride, size in zip(x.stride()[:axis], x.shape[:axis], strict=True)):
        return True
    return torch.equal(x, x[(0,) * axis].expand_as(x))


def _gathered(side: Side, K: Tensor, dim: int) -> Tensor:
    """Keep the rows of a side, along a dimension."""
    return K if side.selected is None else K.index_select(dim, side.selected)


def _scattered(side: Side, K: Tensor, dim: int) -> Tensor:
    """Give a dimension all rows of a side; the transpose of ``_gathered``."""
    if side.selected is None:
        return K
    shape = list(K.shape)
    shape[dim] = side.num_examples * side.rows_per_example
    return K.new_zeros(shape).index_add_(dim, side.selected, K)
