"""The engine of layers: J from the inputs of layers and the gradients at their outputs, by matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TypeAlias, final

import torch
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import Chunks, is_same_view, slack, slices, working_set
from ntk_lazy.engines.contract import ColumnsFirst, Engine, ExampleRows, GramMatrix, OtherBlock, Preflight
from ntk_lazy.engines.flat import FlatLayout
from ntk_lazy.engines.tiles import add_tile, merged_layers, part_of, plain_parameters, row_slices
from ntk_lazy.engines.uses import Coefficients, Rows, Use
from ntk_lazy.errors import BudgetError
from ntk_lazy.gemm import times_transposed
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix

_KEPT_SHARE = 0.5  # of the budget: factors that stay while a product, or a series of them, runs
_ROWS_SHARE = 0.0625  # of the budget: rows of J of one layer
_TILE = 1024  # rows of a tile of K
_BLOCK_SHARE = 0.25  # of the budget: parameter columns of one layer, or of all


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """Factors of some examples.

    Attributes:
        examples: Which ones.
        uses: For each pass, and each covered parameter, its uses.
    """

    examples: slice
    uses: tuple[dict[str, list[Use]], ...]

    @property
    def num_examples(self) -> int:
        """How many."""
        return self.examples.stop - self.examples.start


Chunked: TypeAlias = Callable[[], Iterable[Chunk]]  # goes through all chunks, as often as it is called


@final
class FactorEngine(Engine):
    """Products from the factors of layers, with automatic differentiation for parameters that have none.

    Cost of a product with k columns: ``4 N S P k`` flops by position or ``4 N P C (S + k)`` by example, whichever is
    less for each layer, and one forward and C + 1 backward passes for factors that are not kept. Memory:
    ``N S (sum d_in + C sum d_out)`` numbers for the factors, or those of one chunk where these do not fit half of the
    budget.
    """

    def __init__(
        self, model: FunctionalModel, layout: OutputLayout, *, preflight: Preflight, budget: int, chunk_size: int | None
    ) -> None:
        super().__init__(model, layout)
        self.model = replace(
            model, has_private_buffers=preflight.writes_buffers, keeps_generators=preflight.draws_numbers
        )
        self.coverage = preflight.coverage
        self.budget, self.chunk_size = budget, chunk_size
        self.preflight = preflight
        self.flat = FlatLayout.of(model.params)

        def autodiff(model: FunctionalModel) -> AutodiffEngine:
            return AutodiffEngine(model, layout, preflight=preflight, budget=budget, chunk_size=chunk_size)

        self.autodiff = autodiff(model)
        uncovered = {n: p for n, p in model.params.items() if n not in self.coverage.costs}
        covered = {n: p for n, p in model.params.items() if n in self.coverage.costs}
        rest = replace(model, params=uncovered, constants=model.constants | covered)
        self.rest = autodiff(rest) if uncovered else None
        self._kept: dict[tuple[object, ...], list[Chunk]] | None = None

    @property
    def bytes_per_example(self) -> int:
        """Factors of one example, or its rows of J where these are smaller."""
        q = self.layout.rows_per_example * self.layout.passes
        factors = sum(c.source_bytes + q * c.gradient_bytes for c in self.coverage.costs.values())
        return factors + sum(self._extra_bytes(name) for name in self._compact)

    def keeps(self, num_examples: int) -> bool:
        """Whether the factors of so many examples are held between products, and between the halves of one."""
        return num_examples * self.bytes_per_example <= self.budget * _KEPT_SHARE

    def row_parameters(self, num_examples: int) -> frozenset[str]:
        """Parameters whose rows of J are held in place of their factors, as far as there is room for them.

        Where positions are more than outputs, rows make a product ``S / q`` times cheaper, and to sum positions once
        costs no more than half a product by position with q columns.
        """
        room = self.budget * _KEPT_SHARE - num_examples * self.bytes_per_example
        chosen = set(self._compact)
        for extra, name in sorted((self._extra_bytes(name), name) for name in self.coverage.costs):
            if name not in chosen and self._gains_by_rows(name) and extra * num_examples <= room:
                chosen.add(name)
                room -= extra * num_examples
        return frozenset(chosen)

    @override
    @contextmanager
    def linearised(self, num_columns: int = 1) -> Iterator[None]:
        if self._kept is not None:
            yield
            return
        with ExitStack() as stack:
            if self.rest is not None:
                stack.enter_context(self.rest.linearised())
            self._kept = {}
            stack.callback(setattr, self, "_kept", None)
            yield

    @override
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        k, passes = V.shape[1], self.layout.passes
        W = V.new_zeros(k * passes, self.model.num_params)
        places = self.flat.slices()
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                rest = self.rest.pull(x, V).reshape(k * passes, -1)
                for name, place in self.rest.flat.slices().items():
                    W[:, places[name]] = rest[:, place]
            for names, chunks in self._groups(x, x, k):
                for name, part in self._pull(chunks[0], V, names).items():
                    W.view(k, passes, -1)[..., places[name]] = part.transpose(0, 1)
        return W.reshape(k, self.num_features)

    @override
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        k, passes = W.shape[0], self.layout.passes
        views = W.reshape(k, passes, -1)
        places = self.flat.slices()
        Y = W.new_zeros(x.shape[0] * self.layout.rows_per_example, k)
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                own = torch.cat([views[..., places[name]] for name in self.rest.flat.shapes], 2)
                Y += self.rest.push(x, own.reshape(k, -1))
            for names, chunks in self._groups(x, x, k):
                columns = {name: views[..., places[name]].transpose(0, 1).contiguous() for name in names}
                self._push(chunks[0], columns, Y)
        return Y

    @override
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        k = V.shape[1]
        Y = V.new_zeros(x1.shape[0] * self.layout.rows_per_example, k)
        if k == 0 or 0 in (x1.shape[0], x2.shape[0]):
            return Y
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                Y += self.rest.product(x1, x2, V)
            for names, (left, right) in self._groups(x1, x2, k):
                for columns in slices(k, self._columns(names, k)):
                    out = torch.zeros_like(Y[:, columns])
                    self._push(left, self._pull(right, V[:, columns], names), out)
                    Y[:, columns] += out
        return Y

    @override
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        k = V.shape[1]
        total = torch.zeros(k, k, dtype=torch.float64)
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is not None:
                total += self.rest.half_gram(x, V)
            for names, chunks in self._groups(x, x, k):
                pieces = list(slices(k, self._columns(names, k)))
                for i, left in enumerate(pieces):
                    W = self._pull(chunks[0], V[:, left], names)
                    for right in pieces[i:]:
                        other = W if right is left else self._pull(chunks[0], V[:, right], names)
                        part = sum(_gram64(W[name], other[name]) for name in names)
                        assert isinstance(part, Tensor)
                        total[left, right] += part.cpu()
                        if right is not left:
                            total[right, left] += part.cpu().mT
        return total

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
            for chunk in self._capture(x, self._chunk_size(x.shape[0]), frozenset()):
                for number, uses in enumerate(chunk.uses):
                    for name, found in uses.items():
                        J[chunk.examples, :, number, places[name]] = sum(use.rows() for use in found)
        return J.flatten(2)

    @override
    def gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        if not out.numel():
            return
        r, is_symmetric = self.layout.rows_per_example, x1 is x2
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            if self.rest is None:
                out.zero_()
            else:
                self.rest.gram(x1, x2, out)
            # Factors of both sides of a tile are held, in the share of the budget that kept ones have.
            size = max(1, int(self.budget * _KEPT_SHARE / 2) // max(1, self.bytes_per_example))
            for i in slices(x1.shape[0], size):
                self._add_strip(x1[i], x2, out[_rows(i, r)], begin=i.start if is_symmetric else 0, size=size)
            if is_symmetric:
                _mirror(out, _TILE)

    @override
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        size = self._chunk_size(num_examples)
        names = list(self.coverage.costs)
        as_rows = self.row_parameters(num_examples)
        extra = sum(self._extra_bytes(name) for name in as_rows - self._compact)
        whole = num_examples * (self.bytes_per_example + extra)
        kept = whole if self.keeps(num_examples) else size * self.bytes_per_example
        group = names if kept < whole else [max(names, key=lambda n: self.coverage.costs[n].num_params)]
        columns = self._columns(group, num_columns)
        held = kept + self._transient(size) + columns * self._column_bytes(group)
        rest = 0 if self.rest is None else self.rest.chunks(num_examples, num_columns).bytes
        return Chunks(size, columns, held + rest)

    @override
    def row_chunks(self, num_examples: int) -> list[slice]:
        q = self.layout.rows_per_example * self.layout.passes
        # By parameter, in their place in the flat row, and what is made of them.
        rows = 3 * q * self.model.num_params * self.model.dtype.itemsize
        per_example = int(self._slack * (rows + 2 * self.preflight.activation_bytes)) + self.bytes_per_example
        self._require(per_example, "the rows of J of one example")
        fits = max(1, min(self.budget, 4 * working_set(self.model.device.type)) // per_example)
        ours = min(fits, self.chunk_size or fits)
        if self.rest is None:
            return list(slices(num_examples, ours))
        theirs = self.rest.row_chunks(num_examples)
        return list(slices(num_examples, min(ours, theirs[0].stop - theirs[0].start if theirs else ours)))

    @override
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.autodiff.bilinear_gradient(x1, x2, U, V, wrt=wrt)

    # How it goes through examples.

    @cached_property
    def _compact(self) -> frozenset[str]:
        """Parameters whose rows are smaller than their factors."""
        costs = self.coverage.costs
        return frozenset(name for name in costs if self._gains_by_rows(name) and self._extra_bytes(name) <= 0)

    def _gains_by_rows(self, name: str) -> bool:
        return self.coverage.costs[name].num_positions > self.layout.rows_per_example

    def _extra_bytes(self, name: str) -> int:
        """Bytes that rows take beyond factors, for one example."""
        cost, q = self.coverage.costs[name], self.layout.rows_per_example * self.layout.passes
        return q * cost.num_params * self.model.dtype.itemsize - cost.source_bytes - q * cost.gradient_bytes

    @property
    def _slack(self) -> float:
        return slack(self.model.device.type)

    def _transient(self, size: int) -> int:
        """Bytes of a forward pass, its graph and a backward pass over a chunk."""
        return int(self._slack * 2 * self.preflight.activation_bytes * size)

    def _chunk_size(self, num_examples: int) -> int:
        """Examples that go through the model at once."""
        one = max(1, self._transient(1) + self.bytes_per_example)
        self._require(one, "one example")
        room = min(self.budget * (1 - _KEPT_SHARE - _BLOCK_SHARE), working_set(self.model.device.type))
        fits = max(1, int(room // one))
        return min(num_examples, self.chunk_size or fits)

    def _column_bytes(self, names: Iterable[str]) -> int:
        params = sum(self.coverage.costs[name].num_params for name in names)
        return params * self.layout.passes * self.model.dtype.itemsize

    def _columns(self, names: list[str], num_columns: int) -> int:
        """Columns whose parameter block fits its share of the budget."""
        one = self._column_bytes(names)
        self._require(one, "one column")
        return max(1, min(num_columns, int(self.budget * _BLOCK_SHARE // max(one, 1))))

    def _require(self, size: int, what: str) -> None:
        if size > self.budget:
            raise BudgetError(
                f"{what} takes {size:,} bytes, but the budget is {self.budget:,}. Raise memory_budget.",
                requested_bytes=size,
                available_bytes=self.budget,
            )

    def _groups(self, x1: Tensor, x2: Tensor, k: int) -> Iterator[tuple[list[str], tuple[Chunked, Chunked]]]:
        """Divide the covered parameters into groups that are multiplied one after the other.

        Where all factors are held, each parameter is a group, so that no block of all of them is needed. Where chunks
        are made anew each time, all parameters go together.
        """
        names = list(self.coverage.costs)
        if not names:
            return
        is_symmetric = is_same_view(x1, x2)
        together = x1.shape[0] if is_symmetric else x1.shape[0] + x2.shape[0]
        is_held = self.keeps(together)
        as_rows = self.row_parameters(together)
        left = self._chunks(x1, is_held=is_held, as_rows=as_rows)
        right = left if is_symmetric else self._chunks(x2, is_held=is_held, as_rows=as_rows)
        for group in [[name] for name in names] if is_held else [names]:
            yield group, (left, right)

    def _chunks(self, x: Tensor, *, is_held: bool, as_rows: frozenset[str] | None = None) -> Chunked:
        """Go through the factors of all examples, which are held or made anew each time."""
        size, as_rows = self._chunk_size(x.shape[0]), self._compact if as_rows is None else as_rows
        if not is_held:
            return lambda: self._capture(x, size, self._compact)
        key = (x.data_ptr(), x.shape, x.stride(), as_rows)
        if self._kept is not None and key in self._kept:
            held = self._kept[key]
        else:
            if self._kept is not None:
                self._kept.clear()
            held = list(self._capture(x, size, as_rows))
            if self._kept is not None:
                self._kept[key] = held
        return lambda: held

    def _capture(self, x: Tensor, size: int, as_rows: frozenset[str]) -> Iterator[Chunk]:
        cotangents = self.layout.cotangents(dtype=self.model.dtype, device=x.device)
        passes = cotangents.reshape(self.layout.rows_per_example, self.layout.passes, -1).unbind(1)
        for examples in slices(x.shape[0], size):
            factors = [self.coverage.factors(self.model, x[examples], u) for u in passes]
            for uses in factors:
                uses |= {name: [_as_rows(uses[name])] for name in as_rows if uses[name]}
            yield Chunk(examples, tuple(factors))

    def _coefficients(self, V: Block, chunk: Chunk) -> Coefficients:
        r = self.layout.rows_per_example
        rows = V[chunk.examples.start * r : chunk.examples.stop * r]
        return rows.reshape(-1, r, V.shape[1])

    def _pull(self, chunks: Chunked, V: Block, names: list[str]) -> dict[str, Tensor]:
        """Return ``(passes, k, p)`` for each parameter of a group."""
        k, passes, costs = V.shape[1], self.layout.passes, self.coverage.costs
        W = {name: V.new_zeros(passes, k, costs[name].num_params) for name in names}
        for chunk in chunks():
            coefficients = self._coefficients(V, chunk)
            for number, uses in enumerate(chunk.uses):
                for name in names:
                    for use in uses[name]:
                        use.pull(coefficients, W[name][number])
        return W

    def _add_strip(self, x1: Tensor, x2: Tensor, out: GramMatrix, *, begin: int, size: int) -> None:
        """Add the rows of K of some examples, from the column of an example on, in blocks of so many examples."""
        r = self.layout.rows_per_example
        left = list(self._chunks(x1, is_held=True)())
        right: list[Chunk] = []
        for j in slices(x2.shape[0] - begin, size):
            columns = slice(j.start + begin, j.stop + begin)
            part, right = x2[columns], []  # let go before its successor is made
            right = left if is_same_view(x1, part) else list(self._chunks(part, is_held=True)())
            for number in range(self.layout.passes):
                self._add_gram(number, left, right, out[:, _rows(columns, r)])

    def _add_gram(self, number: int, left: list[Chunk], right: list[Chunk], out: GramMatrix) -> None:
        """Add one pass; of a symmetric K the tiles on the diagonal and above."""
        r, is_symmetric = self.layout.rows_per_example, left is right
        uses = [[chunk.uses[number] for chunk in side] for side in (left, right)]
        plain = plain_parameters(uses[0] + uses[1])
        tiles = self._tiles(out.shape, _TILE, is_symmetric=is_symmetric)
        first = merged_layers(uses[0], plain)
        second = first if is_symmetric else merged_layers(uses[1], plain)
        for (names, layer), (i, j) in product(first.items(), tiles):
            tile = out[_rows(i, r), _rows(j, r)].unflatten(1, (-1, r)).unflatten(0, (-1, r))
            add_tile(part_of(layer, i), part_of(second[names], j), tile)
        del first, second
        # Positions are unfolded once for each part of a layer: few large parts cost less.
        limit = int(min(self.budget * _ROWS_SHARE, 4 * working_set(self.model.device.type)))
        for name in self.coverage.costs.keys() - plain:
            sides = [
                [(chunk.num_examples * r, chunk.uses[number][name]) for chunk in side]
                for side in ((left,) if is_symmetric else (left, right))
            ]
            for rows1, rows2 in row_slices(sides[0], sides[-1], limit // self.model.dtype.itemsize):
                for i, j in self._tiles(out.shape, _TILE // 2, is_symmetric=is_symmetric):
                    out[_rows(i, r), _rows(j, r)] += times_transposed(rows1[_rows(i, r)], rows2[_rows(j, r)])

    def _tiles(self, shape: torch.Size, size: int, *, is_symmetric: bool) -> list[tuple[slice, slice]]:
        """Examples of the tiles of K, of about so many rows; of a symmetric K those on the diagonal and above."""
        r = self.layout.rows_per_example
        rows, columns = (list(slices(n // r, max(1, size // r))) for n in shape)
        return [(i, j) for i in rows for j in columns if not is_symmetric or j.start >= i.start]

    def _push(self, chunks: Chunked, W: dict[str, Tensor], Y: Block) -> None:
        """Add ``J Wᵀ`` to Y."""
        r = self.layout.rows_per_example
        for chunk in chunks():
            rows = Y[chunk.examples.start * r : chunk.examples.stop * r]
            part = Y.new_zeros(rows.shape[0] // r, r, Y.shape[1])
            for number, uses in enumerate(chunk.uses):
                for name, columns in W.items():
                    for use in uses[name]:
                        use.push(columns[number], part)
            rows += part.flatten(0, 1)


def _as_rows(uses: list[Use]) -> Rows:
    first, *others = (use.as_rows() for use in uses)
    for other in others:
        first.R.add_(other.R)
    return first


def _rows(examples: slice, rows_per_example: int) -> slice:
    return slice(examples.start * rows_per_example, examples.stop * rows_per_example)


def _mirror(K: GramMatrix, size: int) -> None:
    """Copy what is above the diagonal to its other side, a tile at a time."""
    for i in slices(K.shape[0], size):
        for j in slices(i.start, size):
            K[i, j] = K[j, i].mT


def _gram64(left: Tensor, right: Tensor) -> Tensor:
    """Multiply ``(passes, k, p)`` blocks in float64 by pieces, summed over passes and entries."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    size = max(1, (16 << 20) // (8 * max(left.shape[1], 1)))
    for a, b in zip(left, right, strict=True):
        for piece in slices(a.shape[1], size):
            total.addmm_(a[:, piece].double(), b[:, piece].double().mT)
    return total
