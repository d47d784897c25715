"""The engine of layers: J from the inputs of layers and the gradients at their outputs, by matrix products alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import (
    ROWS_OF_ONE,
    Chunks,
    is_same_view,
    raise_largest,
    shortage,
    slack,
    slices,
    working_set,
)
from ntk_lazy.engines.contract import (
    ColumnsFirst,
    Engine,
    Entries,
    ExampleRows,
    GramMatrix,
    OtherBlock,
    Preflight,
    RowIndex,
)
from ntk_lazy.engines.cost import CostModel
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.factor_chunk import Chunk
from ntk_lazy.engines.factor_store import PIECES_BYTES, Chunked, FactorStore, Group
from ntk_lazy.engines.factor_tiles import FactorTiles
from ntk_lazy.engines.flat import FlatLayout, squared_norms
from ntk_lazy.engines.rates import machine_rates
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.engines.uses import Coefficients
from ntk_lazy.errors import BudgetError
from ntk_lazy.gemm import times_transposed_in_float64
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix
from ntk_lazy.solves import ColumnCosts

_ROWS_SHARE = 0.0625  # of the budget: rows of J of one layer
_BLOCK_SHARE = 0.5  # of the budget: parameter columns of one layer, or of all, and what they are added up from
_LEAST_BLOCK_SHARE = 0.125  # beside factors that are held


@final
class FactorEngine(Engine):
    """Products from the factors of layers; of parameters that have none from their rows of J, or by autodiff.

    Cost of a product with k columns: ``4 N S P k`` flops by position or ``4 N P C (S + k)`` by example, whichever is
    less for each layer, and one forward and C + 1 backward passes for factors that are not kept. Memory:
    ``N S (sum d_in + C sum d_out)`` numbers for the factors, or those of one chunk where these do not fit half of the
    budget.
    """

    def __init__(
        self,
        model: FunctionalModel,
        layout: OutputLayout,
        *,
        preflight: Preflight,
        budget: int,
        chunk_size: int | None,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(model, layout, budget)
        self.model = replace(
            model, has_private_buffers=preflight.writes_buffers, keeps_generators=preflight.draws_numbers
        )
        self.chunk_size = chunk_size
        self.preflight = preflight
        self.coverage = _coverage(model, layout, preflight, budget)
        self.store = FactorStore(
            self.model,
            layout,
            self.coverage,
            preflight=preflight,
            budget=budget,
            chunk_size=chunk_size,
            scratch=scratch,
        )
        self._tiles = FactorTiles(self.store, self.coverage, layout, budget)
        self.flat = FlatLayout.of(model.params)

        def autodiff(model: FunctionalModel) -> AutodiffEngine:
            return AutodiffEngine(model, layout, preflight=preflight, budget=budget, chunk_size=chunk_size)

        self.autodiff = autodiff(model)
        uncovered = {n: p for n, p in model.params.items() if n not in self.coverage.costs}
        covered = {n: p for n, p in model.params.items() if n in self.coverage.costs}
        rest = replace(model, params=uncovered, constants=model.constants | covered)
        self.rest = autodiff(rest) if uncovered else None

    @override
    @contextmanager
    def linearised(self, num_columns: int = 1) -> Iterator[None]:
        with nullcontext() if self.rest is None else self.rest.linearised(), self.store.keeping():
            yield

    @override
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        k, passes = V.shape[1], self.layout.passes
        W = V.new_zeros(k * passes, self.model.num_params)
        places = self.flat.slices()
        self._require(x.shape[0])
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                rest = self.rest.pull(x, V).reshape(k * passes, -1)
                for name, place in self.rest.flat.slices().items():
                    W[:, places[name]] = rest[:, place]
            for group in self.store.groups(x, x, is_compact=False):
                for columns in slices(k, self._columns(group, k)):
                    for name, part in self._pull(group.left, V[:, columns], group.widths).items():
                        W.view(k, passes, -1)[columns, :, places[name]] = part.transpose(0, 1)
        return W.reshape(k, self.num_features)

    @override
    def pull_with_graph(self, x: Tensor, V: Block) -> ColumnsFirst:
        return self.autodiff.pull_with_graph(x, V)

    @override
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        k, passes = W.shape[0], self.layout.passes
        views = W.reshape(k, passes, -1)
        places = self.flat.slices()
        Y = W.new_zeros(x.shape[0] * self.layout.rows_per_example, k)
        self._require(x.shape[0])
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                own = torch.cat([views[..., places[name]] for name in self.rest.flat.shapes], 2)
                Y += self.rest.push(x, own.reshape(k, -1))
            for group in self.store.groups(x, x, is_compact=False):
                columns = {name: views[..., places[name]].transpose(0, 1).contiguous() for name in group.widths}
                self._push(group.left, columns, Y)
        return Y

    @override
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        k = V.shape[1]
        Y = V.new_zeros(x1.shape[0] * self.layout.rows_per_example, k)
        if k == 0 or 0 in (x1.shape[0], x2.shape[0]):
            return Y
        self._require(*((x1.shape[0],) if is_same_view(x1, x2) else (x1.shape[0], x2.shape[0])))
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                Y += self.rest.product(x1, x2, V)
            for group in self.store.groups(x1, x2, is_compact=True):
                for columns in slices(k, self._columns(group, k)):
                    self._push(group.left, self._pull(group.right, V[:, columns], group.widths), Y[:, columns])
        return Y

    @override
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        k = V.shape[1]
        total = torch.zeros(k, k, dtype=torch.float64)
        self._require(x.shape[0])
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                total += self.rest.half_gram(x, V)
            for group in self.store.groups(x, x, is_compact=True):
                size = self._columns(group, k)
                # Two blocks at once where there are several: each has half of the room.
                pieces = list(slices(k, size if size == k else max(1, size // 2)))
                for i, left in enumerate(pieces):
                    W = self._pull(group.left, V[:, left], group.widths)
                    for right in pieces[i:]:
                        other = W if right is left else self._pull(group.left, V[:, right], group.widths)
                        for name in group.widths:
                            for one, two in zip(W[name], other[name], strict=True):
                                part = times_transposed_in_float64(one, two).cpu()
                                total[left, right] += part
                                if right is not left:
                                    total[right, left] += part.mT
        return total

    @override
    def energies(self, x: Tensor, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        k = V.shape[1]
        found = {name: torch.zeros(k, dtype=torch.float64) for name in self.flat.shapes}
        self._require(x.shape[0])
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                found |= self.rest.energies(x, V)
            for group in self.store.groups(x, x, is_compact=True):
                for columns in slices(k, self._columns(group, k)):
                    for name, part in self._pull(group.left, V[:, columns], group.widths).items():
                        found[name][columns] = squared_norms(part.transpose(0, 1))
        return found

    @override
    def rows(self, x: Tensor) -> ExampleRows:
        if torch.is_grad_enabled():
            return self.autodiff.rows(x)
        r, passes = self.layout.rows_per_example, self.layout.passes
        J = x.new_empty(x.shape[0], r, passes, self.model.num_params, dtype=self.model.dtype)
        places = self.flat.slices()
        if self.rest is not None:
            rest = self.rest.rows(x).unflatten(2, (passes, -1))
            for name, place in self.rest.flat.slices().items():
                J[..., places[name]] = rest[..., place]
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            for chunk in self.store.capture(x):
                for number, uses in enumerate(chunk.uses):
                    for name, found in uses.items():
                        J[chunk.examples, :, number, places[name]] = sum(use.rows() for use in found)
        return J.flatten(2)

    @override
    def gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        if not out.numel():
            return
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is None:
                out.zero_()
            else:
                self.rest.gram(x1, x2, out)
            self._tiles.add_gram(x1, x2, out)

    @override
    def entries(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex) -> Entries:
        """Pair by pair from the factors of the two examples: ``2 (sum d_in + sum d_out)`` flops for plain layers."""
        if torch.is_grad_enabled():
            return super().entries(x1, x2, rows1, rows2)
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is None:
                out = torch.zeros(rows1.shape[0], dtype=self.model.dtype, device=self.model.device)
            else:
                out = self.rest.entries(x1, x2, rows1, rows2)
            self._tiles.add_entries(x1, x2, rows1, rows2, out)
        return out

    @override
    def _prefers_tiles(self, num_examples1: int, num_examples2: int, num_columns: int) -> bool:
        cost = self._cost(num_examples1, num_examples2, is_symmetric=False)
        return cost.tiles() <= cost.products(num_columns)

    @override
    def column_costs(self, num_examples: int, *, written: int, multiplied: int, calls: int) -> ColumnCosts:
        if not self.store.fits_beside(num_examples, written):
            return ColumnCosts()  # all factors would be made anew for a few columns at a time
        cost = self._cost(num_examples, num_examples, is_symmetric=True)
        return cost.columns(cost.products(multiplied) / multiplied, written=written)

    def _cost(self, num_examples1: int, num_examples2: int, *, is_symmetric: bool) -> CostModel:
        rates = machine_rates(self.model.device, self.model.dtype)
        sizes, itemsize = (num_examples1, num_examples2), self.model.dtype.itemsize
        return CostModel(
            self.preflight, self.coverage, self.layout, self.model.num_params, sizes, is_symmetric, itemsize, rates
        )

    @override
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        self._require(num_examples)
        widths = {name: cost.num_params for name, cost in self.coverage.costs.items()}
        is_kept, size = self.store.keeps(num_examples), self.store.chunk_size(num_examples)
        kept, captured = self.store.kept_bytes(num_examples), self.store.transient(size)
        if is_kept:
            name = max(widths, key=lambda name: widths[name])
            # Of a table that is looked up only what occurs takes part.
            cost, q = self.coverage.costs[name], self.layout.rows_per_example * self.layout.passes
            occurring = num_examples * q * cost.gradient_bytes // self.model.dtype.itemsize
            widths = {name: min(widths[name], occurring) if cost.num_matched < widths[name] else widths[name]}
        beside = kept if is_kept else captured
        columns = self._fitting(widths, num_columns, beside)
        pieces = min(PIECES_BYTES, num_examples * self._piece_bytes(num_columns))
        multiplied = columns * self._column_bytes(widths) + self._result_bytes(widths) * columns + pieces
        held = kept + max(captured, multiplied) if is_kept else captured + multiplied
        rest = 0 if self.rest is None else self.rest.chunks(num_examples, num_columns).bytes
        return Chunks(size, columns, max(held, rest))

    @override
    def row_chunks(self, num_examples: int) -> list[slice]:
        needed = self._rows_of_one()
        raise_largest(self.shortage_of_tiles(num_examples), shortage(needed, self.budget, ROWS_OF_ONE))
        fits = max(1, min(self.budget, 4 * working_set(self.model.device.type)) // needed)
        ours = min(fits, self.chunk_size or fits)
        if self.rest is None:
            return list(slices(num_examples, ours))
        theirs = self.rest.row_chunks(num_examples)
        return list(slices(num_examples, min(ours, theirs[0].stop - theirs[0].start if theirs else ours)))

    @override
    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        rest = None if self.rest is None else self.rest.shortage_of_tiles(num_examples)
        found = [error for error in (self.store.shortage_of_tiles(num_examples), rest) if error is not None]
        return max(found, key=lambda error: error.requested_bytes, default=None)

    @override
    def tile_chunks(self, num_examples: int) -> Chunks:
        rest = 0 if self.rest is None else self.rest.tile_chunks(num_examples).bytes
        return Chunks(self.store.chunk_size(num_examples), 1, max(self._tiles.held(num_examples), rest))

    @override
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.autodiff.bilinear_gradient(x1, x2, U, V, wrt=wrt)

    @override
    def rows_gradient(self, x1: Tensor, x2: Tensor, G: GramMatrix, *, wrt: set[str]) -> dict[str, Tensor]:
        return self.autodiff.rows_gradient(x1, x2, G, wrt=wrt)

    # How it goes through examples.

    def _require(self, *num_examples: int) -> None:
        """Refuse what does not fit with one column, before anything is spent."""
        rest = None if self.rest is None else self.rest.rule.shortage(max(num_examples))
        raise_largest(self.store.shortage_of_products(sum(num_examples)), rest)

    def _rows_of_one(self) -> int:
        # By parameter, in their place in the flat row, and what is made of them.
        rows = 3 * self.layout.rows_per_example * self.layout.passes * self.model.num_params
        return int(slack(self.model.device.type) * rows * self.model.dtype.itemsize) + self.store.transient(1)

    def _column_bytes(self, widths: Mapping[str, int]) -> int:
        return sum(widths.values()) * self.layout.passes * self.model.dtype.itemsize

    def _result_bytes(self, widths: Mapping[str, int]) -> int:
        """Of one column: a product stands beside what it is added to, one parameter at a time."""
        return max(widths.values(), default=0) * self.layout.passes * self.model.dtype.itemsize

    def _piece_bytes(self, num_columns: int) -> int:
        """What a contraction makes of one example, at the most."""
        costs = self.coverage.costs.values()
        wide = max((cost.num_positions * cost.num_outputs for cost in costs), default=0)
        return 4 * wide * num_columns * self.model.dtype.itemsize

    def _columns(self, group: Group, num_columns: int) -> int:
        return self._fitting(group.widths, num_columns, group.num_bytes)

    def _fitting(self, widths: Mapping[str, int], num_columns: int, beside: int) -> int:
        """Columns whose parameter block fits its share of the budget, or what is left of it."""
        one = self._column_bytes(widths) + self._result_bytes(widths)
        left = max(self.budget - beside - PIECES_BYTES, self.budget * _LEAST_BLOCK_SHARE)
        return max(1, min(num_columns, int(min(self.budget * _BLOCK_SHARE, left) // max(one, 1))))

    def _coefficients(self, V: Block, chunk: Chunk) -> Coefficients:
        r = self.layout.rows_per_example
        rows = V[chunk.examples.start * r : chunk.examples.stop * r]
        return rows.reshape(-1, r, V.shape[1])

    def _pull(self, chunks: Chunked, V: Block, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return ``(passes, k, p)`` for each parameter of a group."""
        W = {name: V.new_zeros(self.layout.passes, V.shape[1], width) for name, width in widths.items()}
        for chunk in chunks():
            coefficients = self._coefficients(V, chunk)
            for number, uses in enumerate(chunk.uses):
                for name, columns in W.items():
                    for use in uses[name]:
                        use.pull(coefficients, columns[number])
        return W

    def _push(self, chunks: Chunked, W: dict[str, Tensor], Y: Block) -> None:
        """Add ``J Wᵀ`` to Y."""
        r = self.layout.rows_per_example
        for chunk in chunks():
            part = Y[chunk.examples.start * r : chunk.examples.stop * r].unflatten(0, (-1, r))
            for number, uses in enumerate(chunk.uses):
                for name, columns in W.items():
                    for use in uses[name]:
                        use.push(columns[number], part)


def _coverage(model: FunctionalModel, layout: OutputLayout, preflight: Preflight, budget: int) -> Coverage:
    """Take rows of J for parameters without factors, if gradients of single examples vectorise and are small enough."""
    found = preflight.coverage
    rows = layout.rows_per_example * layout.passes * sum(model.params[name].nbytes for name in found.uncovered)
    # With the pass that makes them, vectorised over examples and rows.
    passes = slack(model.device.type) * (3 + layout.rows_per_example * layout.passes) * preflight.activation_bytes
    is_wanted = found.uncovered and rows <= _ROWS_SHARE * budget and passes <= budget / 2
    return found.completed(model.params) if is_wanted and preflight.derivatives.vectorises else found
