"""``K = s J1 J2ᵀ`` on two sides, batched: what is computed, beneath what linear_operator asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import product
from math import sqrt
from typing import ParamSpec, TypeVar, final

import torch
from torch import Tensor

from ntk_lazy.engines.contract import Engine, OtherBlock
from ntk_lazy.errors import ArgumentError, ShapeError
from ntk_lazy.modes import as_recordable, ordinary_mode
from ntk_lazy.operator.bilinear import BilinearGradient
from ntk_lazy.operator.entries import block, entries
from ntk_lazy.operator.side import Side
from ntk_lazy.shapes import Block, ParameterBlock, SmallMatrix
from ntk_lazy.threads import exclusive

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def _computes(method: Callable[Rest, Result]) -> Callable[Rest, Result]:
    """Compute on ordinary tensors in ordinary mode, whatever the caller's, and for one thread at a time.

    All that an operator computes comes through here: engines keep what products share, and call the user's module.
    """

    @wraps(method)
    def compute(*args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with ordinary_mode(), exclusive():
            return method(*(as_recordable(arg) if isinstance(arg, Tensor) else arg for arg in args), **kwargs)  # type: ignore[arg-type]

    return compute


@final
@dataclass(frozen=True, eq=False)
class Gramian:
    """Inner products of the Jacobian rows of two sides.

    Attributes:
        engine: Multiplies with J.
        side1: The rows of K.
        side2: Its columns; None where they are the same rows.
        scale: s, a 0-dimensional tensor; None for 1.
    """

    engine: Engine
    side1: Side
    side2: Side | None
    scale: Tensor | None = None

    @property
    def columns(self) -> Side:
        """The side of the columns."""
        return self.side1 if self.side2 is None else self.side2

    @property
    def batch_shape(self) -> torch.Size:
        """One kernel for each index."""
        return torch.broadcast_shapes(self.side1.batch_shape, self.columns.batch_shape)

    @property
    def shape(self) -> torch.Size:
        """``(*batch, n1, n2)``."""
        return torch.Size((*self.batch_shape, self.side1.num_rows, self.columns.num_rows))

    @property
    def dtype(self) -> torch.dtype:
        """That of J."""
        return self.engine.model.dtype

    @property
    def device(self) -> torch.device:
        """That of J."""
        return self.engine.model.device

    @_computes
    def matmul(self, rhs: Tensor) -> Tensor:
        """Multiply with ``(*batch2, n2, k)``; batches of right-hand sides of one kernel are more columns of it."""
        batch = torch.broadcast_shapes(self.batch_shape, rhs.shape[:-2])
        if not self.batch_shape:
            columns = rhs.movedim(-2, 0).flatten(1)
            return self._product(self.side1, self.columns, columns).unflatten(1, (*batch, rhs.shape[-1])).movedim(0, -2)
        rhs = rhs.expand(*batch, *rhs.shape[-2:])
        result = rhs.new_empty(*batch, self.shape[-2], rhs.shape[-1])
        for index, side1, side2 in self._members(batch):
            result[index] = self._product(side1, side2, rhs[index])
        return result

    @_computes
    def matmul_afresh(self, V: OtherBlock) -> Block:
        """Multiply with a block by J alone, also where K is kept."""
        self._refuse_batch("matmul_afresh")
        side1, side2 = self.side1, self.columns
        self._check_rows(V, side2)
        return self._scaled(side1.gather(self.engine.product_afresh(side1.x, side2.x, side2.scatter(V))))

    @_computes
    def jacobian_matmul(self, W: ParameterBlock) -> Block:
        """Return ``sqrt(s) J1 W``."""
        self._refuse_batch("jacobian_matmul")
        if W.ndim != 2 or W.shape[0] != self.engine.num_features:
            raise ShapeError(f"W is {tuple(W.shape)} and J has {self.engine.num_features} columns: pass (features, k).")
        self._check_kind(W)
        return self._times_root_scale(self.side1.gather(self.engine.push(self.side1.x, W.mT.contiguous())))

    @_computes
    def jacobian_rmatmul(self, V: Block) -> ParameterBlock:
        """Return ``sqrt(s) J1ᵀ V``."""
        self._refuse_batch("jacobian_rmatmul")
        self._check_rows(V, self.side1)
        return self._times_root_scale(self.engine.pull(self.side1.x, self.side1.scatter(V))).mT

    @_computes
    def half_gram(self, V: Block) -> SmallMatrix:
        """Return ``s (J1ᵀV)ᵀ(J1ᵀV)`` in float64 on the CPU."""
        self._refuse_batch("half_gram")
        if self.side2 is not None:
            raise ShapeError("half_gram is defined for a square kernel of one set of rows.")
        self._check_rows(V, self.side1)
        return self.engine.half_gram(self.side1.x, self.side1.scatter(V)) * self._root_scale() ** 2

    @_computes
    def parameter_energies(self, V: Block) -> dict[str, Tensor]:
        """Return ``s ‖J1_pᵀ v‖²`` for each parameter and column, ``(k,)`` in float64 on the CPU."""
        self._refuse_batch("parameter_energies")
        self._check_rows(V, self.side1)
        energies = self.engine.energies(self.side1.x, self.side1.scatter(V))
        return {name: energy * self._root_scale() ** 2 for name, energy in energies.items()}

    @_computes
    def entries(self, *index: Tensor) -> Tensor:
        """Compute entries at index tensors ``(*batch, row, column)`` of one shape, in the caller's grad mode."""
        *batch, rows, cols = (i.reshape(-1) for i in index)
        found = torch.empty(0, dtype=self.dtype, device=self.device)
        places = rows.new_empty(0)
        for member, side1, side2 in self._members(self.batch_shape):
            # Without batch dimensions there is nothing to compare, and every entry is wanted.
            wanted = torch.ones_like(rows, dtype=torch.bool)
            for position, where in zip(member, batch, strict=True):
                wanted &= where == position
            if wanted.any():
                part = entries(self.engine, side1, side2, rows[wanted], cols[wanted])
                found, places = torch.cat([found, part]), torch.cat([places, wanted.nonzero().squeeze(1)])
        return self._scaled(found[places.argsort()].reshape(index[0].shape))

    @_computes
    def dense(self) -> Tensor:
        """Compute all of K, in the caller's grad mode."""
        members = [block(self.engine, side1, side2) for _, side1, side2 in self._members(self.batch_shape)]
        # One kernel alone is not copied: it may be as large as memory.
        return self._scaled(torch.stack(members).reshape(self.shape) if self.batch_shape else members[0])

    @_computes
    def bilinear(self, left: Tensor, right: Tensor, *, wrt: set[str]) -> BilinearGradient:
        """Differentiate ``sum_d left_dᵀ J1 J2ᵀ right_d``, summed over batches, in parameters and inputs.

        Args:
            left: Shape ``(*batch2, n1, d)``.
            right: Shape ``(*batch2, n2, d)``.
            wrt: Names of the engine.
        """
        total = BilinearGradient(self.side1, self.side2)
        left, right, batch = self._blocks(left, right)
        for index, side1, side2 in self._members(batch):
            total.add(self.engine, index, (side1, side2), (left[index], right[index]), wrt=wrt)
        return total

    @_computes
    def bilinear_form(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``sum_d left_dᵀ K right_d``, summed over batches, with its graph: all examples and columns at once."""
        value = torch.zeros((), dtype=self.dtype, device=self.device)
        left, right, batch = self._blocks(left, right)
        for index, side1, side2 in self._members(batch):
            halves = (
                self.engine.pull_with_graph(side.x, side.scatter(block[index]))
                for side, block in ((side1, left), (side2, right))
            )
            value = value + torch.mul(*halves).sum()
        return self._scaled(value)

    @_computes
    def dense_form(self, upstream: Tensor) -> Tensor:
        """Return ``⟨upstream, K⟩``, summed over batches, with its graph: all rows of J at once."""
        value = torch.zeros((), dtype=self.dtype, device=self.device)
        for index, side1, side2 in self._members(self.batch_shape):
            J1, J2 = (side.gather(self.engine.rows(side.x).flatten(0, 1)) for side in (side1, side2))
            value = value + (upstream[index] * (J1 @ J2.mT)).sum()
        return self._scaled(value)

    @_computes
    def dense_gradient(self, upstream: Tensor, *, wrt: set[str]) -> BilinearGradient:
        """Differentiate ``⟨upstream, J1 J2ᵀ⟩``, summed over batches, in parameters and inputs.

        Args:
            upstream: Shape ``(*batch, n1, n2)``.
            wrt: Names of the engine.
        """
        total = BilinearGradient(self.side1, self.side2)
        for index, side1, side2 in self._members(self.batch_shape):
            total.add_dense(self.engine, index, (side1, side2), upstream[index], wrt=wrt)
        return total

    def _blocks(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Give two blocks one batch shape; what meets one kernel alone is more columns of it."""
        batch = torch.broadcast_shapes(self.batch_shape, left.shape[:-2], right.shape[:-2])
        left, right = (v.expand(*batch, *v.shape[-2:]) for v in (left, right))
        if self.batch_shape:
            return left, right, batch
        return left.movedim(-2, 0).flatten(1), right.movedim(-2, 0).flatten(1), torch.Size()

    def _members(self, batch: torch.Size) -> Iterator[tuple[tuple[int, ...], Side, Side]]:
        """Go through the kernels of a batch: the index of each, and its two sides."""
        own = batch[len(batch) - len(self.batch_shape) :]
        side1 = self.side1.expand(own)
        side2 = None if self.side2 is None else self.side2.expand(own)
        for index in product(*(range(size) for size in batch)):
            inner = index[len(batch) - len(own) :]
            first = side1.with_x(side1.x[inner])
            yield index, first, first if side2 is None else side2.with_x(side2.x[inner])

    def _product(self, side1: Side, side2: Side, V: OtherBlock) -> Block:
        self._check_rows(V, side2)
        return self._scaled(side1.gather(self.engine.product(side1.x, side2.x, side2.scatter(V))))

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.scale is None else values * self.scale

    def _times_root_scale(self, fresh: Tensor) -> Tensor:
        """Scale what was made just now, in place: a copy of a block of parameters may be as large as the budget."""
        return fresh if self.scale is None else fresh.mul_(self._root_scale())

    def _root_scale(self) -> float:
        scale = 1.0 if self.scale is None else float(self.scale.detach())
        if scale < 0:
            raise ArgumentError(f"K is scaled by {scale}, so that it is not J Jᵀ of any real J.")
        return sqrt(scale)

    def _refuse_batch(self, what: str) -> None:
        if self.batch_shape:
            raise ShapeError(f"{what} serves one kernel; this is a batch of shape {tuple(self.batch_shape)}: index it.")

    def _check_rows(self, V: Tensor, side: Side) -> None:
        if V.ndim != 2 or V.shape[0] != side.num_rows:
            raise ShapeError(
                f"a block of shape {tuple(V.shape)} meets {side.num_rows} rows; pass ({side.num_rows}, k)."
            )
        self._check_kind(V)

    def _check_kind(self, V: Tensor) -> None:
        if V.dtype != self.dtype or V.device != self.device:
            raise ShapeError(
                f"a {V.dtype} block on {V.device} meets a {self.dtype} kernel on {self.device}; convert it."
            )
