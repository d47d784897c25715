"""K written down, or single entries of it, from factors of both sides that are held together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor

from ntk_lazy.engines.chunks import is_same_view, slices, working_set
from ntk_lazy.engines.contract import Entries, GramMatrix, RowIndex
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.factor_chunk import Chunk
from ntk_lazy.engines.factor_store import FactorStore
from ntk_lazy.engines.matches import Matches, add_matches, matched_entries
from ntk_lazy.engines.tiles import (
    Side,
    add_entries,
    add_tile,
    merged_layers,
    paired_products,
    part_of,
    plain_parameters,
    row_slices,
)
from ntk_lazy.gemm import times_transposed
from ntk_lazy.outputs import OutputLayout

_ROWS_SHARE = 0.0625  # of the budget: rows of J of one layer
_ROWS_SETS = 4  # working sets of these: positions are unfolded once for each part of them
_TILE = 1024  # rows of a tile of K, or fewer under a small budget
_TILE_SHARE = 0.0625  # of the budget: one tile, beside which stand the products that it is made of
_TILES = 4
_ROWS_TILE = 256  # from rows of J: what tiles on the diagonal compute twice is less, and sums are long enough


@final
@dataclass(frozen=True, eq=False)
class FactorTiles:
    """Adds what covered parameters contribute to K.

    Attributes:
        store: Where factors come from.
        coverage: The parameters that have factors.
        layout: Rows and passes of an example.
        budget: In bytes.
    """

    store: FactorStore
    coverage: Coverage
    layout: OutputLayout
    budget: int

    @property
    def _tile(self) -> int:
        """Rows of a tile."""
        return max(1, min(_TILE, int((self.budget * _TILE_SHARE / self.store.model.dtype.itemsize) ** 0.5)))

    def held(self, num_examples: int) -> int:
        """Bytes that stand beside a K of so many examples while it is made."""
        store, r = self.store, self.layout.rows_per_example
        factors = min(num_examples, 2 * store.half_size()) * store.bytes_per_example
        tiles = _TILES * min(self._tile, num_examples * r) ** 2 * store.model.dtype.itemsize
        return factors + max(store.transient(store.chunk_size(num_examples)), tiles)

    def add_gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        """Add all of K; of the same tensor twice one half, and its mirror image in place of whatever is in the other.

        Cost: ``2 n1 n2 (sum d_in + sum d_out)`` flops for plain layers, half of that for the same tensor twice.
        """
        r, is_symmetric = self.layout.rows_per_example, x1 is x2
        # Factors of both sides of a tile are held, in the share of the budget that kept ones have.
        size = self.store.half_size()
        for i in slices(x1.shape[0], max(size, 2 * size - x2.shape[0])):
            self._add_strip(x1[i], x2, out[_rows(i, r)], begin=i.start if is_symmetric else 0, size=size)
        if is_symmetric:
            _mirror(out, self._tile)

    def add_entries(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex, out: Entries) -> None:
        """Add entries, pair by pair. Cost: ``2 (sum d_in + sum d_out)`` flops each for plain layers."""
        # Sorted by their rows, the pairs of a piece have few examples.
        order = rows1.argsort()
        num_examples = self._distinct(rows1) + self._distinct(rows2)
        size = max(1, rows1.shape[0]) if self.store.keeps(num_examples) else self.store.half_size()
        for piece in slices(rows1.shape[0], size):
            at = order[piece]
            part = torch.zeros(at.shape[0], dtype=out.dtype, device=out.device)
            self._add_entries_of(x1, x2, rows1[at], rows2[at], part)
            out[at] += part

    def _add_strip(self, x1: Tensor, x2: Tensor, out: GramMatrix, *, begin: int, size: int) -> None:
        """Add the rows of K of some examples, from the column of an example on, in blocks of so many examples."""
        r = self.layout.rows_per_example
        # Two sets of factors are held, of both sides.
        left = list(self.store.chunks(x1, is_held=True, together=2 * x1.shape[0])())
        right: list[Chunk] = []
        for j in slices(x2.shape[0] - begin, size):
            columns = slice(j.start + begin, j.stop + begin)
            part, right = x2[columns], []  # let go before its successor is made
            right = (
                left
                if is_same_view(x1, part)
                else list(self.store.chunks(part, is_held=True, together=2 * part.shape[0])())
            )
            for number in range(self.layout.passes):
                self._add_gram(number, left, right, out[:, _rows(columns, r)])

    def _add_gram(self, number: int, left: list[Chunk], right: list[Chunk], out: GramMatrix) -> None:
        """Add one pass; of a symmetric K the tiles on the diagonal and above."""
        r, is_symmetric = self.layout.rows_per_example, left is right
        uses = [[chunk.uses[number] for chunk in side] for side in (left, right)]
        plain = plain_parameters(uses[0] + uses[1])
        tiles = self._tiles(out.shape, self._tile, is_symmetric=is_symmetric)
        first = merged_layers(uses[0], plain)
        second = first if is_symmetric else merged_layers(uses[1], plain)
        for (names, layer), (i, j) in product(first.items(), tiles):
            tile = out[_rows(i, r), _rows(j, r)].unflatten(1, (-1, r)).unflatten(0, (-1, r))
            add_tile(part_of(layer, i), part_of(second[names], j), tile)
        del first, second
        # Positions are unfolded once for each part of a layer: few large parts cost less.
        limit = int(min(self.budget * _ROWS_SHARE, _ROWS_SETS * working_set(out.device.type)))
        for name in [name for name in self.coverage.costs if name not in plain]:
            tables = self._tables(number, name, left, right)
            if tables is not None:
                for i, j in tiles:
                    tile = out[_rows(i, r), _rows(j, r)]
                    add_matches(tables[0].part(i), tables[1].part(j), tile, num_entries=limit // out.itemsize)
                continue
            sides = self._row_sides(number, name, left, right)
            for rows1, rows2 in row_slices(*sides, limit // out.dtype.itemsize):
                for i, j in self._tiles(out.shape, min(_ROWS_TILE, self._tile), is_symmetric=is_symmetric):
                    out[_rows(i, r), _rows(j, r)] += times_transposed(rows1[_rows(i, r)], rows2[_rows(j, r)])
                del rows1, rows2

    def _add_entries_of(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex, out: Entries) -> None:
        """Add entries between examples whose factors are held together."""
        r, is_symmetric = self.layout.rows_per_example, is_same_view(x1, x2)
        if is_symmetric:
            x1, rows = _occurring(x1, torch.cat([rows1, rows2]), r)
            rows1, rows2 = rows.chunk(2)
        else:
            (x1, rows1), (x2, rows2) = _occurring(x1, rows1, r), _occurring(x2, rows2, r)
        together = x1.shape[0] if is_symmetric else x1.shape[0] + x2.shape[0]
        as_rows = self.store.row_parameters(together)
        left = list(self.store.chunks(x1, is_held=True, together=together, as_rows=as_rows)())
        right = (
            left if is_symmetric else list(self.store.chunks(x2, is_held=True, together=together, as_rows=as_rows)())
        )
        limit = int(min(self.budget * _ROWS_SHARE, 2 * working_set(out.device.type)))
        for number in range(self.layout.passes):
            uses = [[chunk.uses[number] for chunk in side] for side in (left, right)]
            plain = plain_parameters(uses[0] + uses[1])
            first = merged_layers(uses[0], plain)
            second = first if is_symmetric else merged_layers(uses[1], plain)
            for names, layer in first.items():
                add_entries(layer, second[names], rows1, rows2, out)
            del first, second
            for name in [name for name in self.coverage.costs if name not in plain]:
                tables = self._tables(number, name, left, right)
                if tables is not None:
                    out += matched_entries(*tables, rows1, rows2, num_entries=limit // out.itemsize)
                    continue
                for flat1, flat2 in row_slices(*self._row_sides(number, name, left, right), limit // out.itemsize):
                    out += paired_products(flat1, flat2, (rows1,), (rows2,))

    def _tables(self, number: int, name: str, left: list[Chunk], right: list[Chunk]) -> tuple[Matches, Matches] | None:
        """What both sides look up, of a table that is larger than what two examples have in common."""
        first = Matches.of([chunk.uses[number][name] for chunk in left])
        if first is None or first.pair_flops > self.coverage.costs[name].num_matched:
            return None
        second = first if left is right else Matches.of([chunk.uses[number][name] for chunk in right])
        return None if second is None else (first, second)

    def _row_sides(self, number: int, name: str, left: list[Chunk], right: list[Chunk]) -> tuple[Side, Side]:
        """Rows and uses of one parameter in each chunk, the same list twice for the same examples."""
        r = self.layout.rows_per_example
        sides = [
            [(chunk.num_examples * r, chunk.uses[number][name]) for chunk in side]
            for side in ((left,) if left is right else (left, right))
        ]
        return sides[0], sides[-1]

    def _distinct(self, rows: RowIndex) -> int:
        return (rows // self.layout.rows_per_example).unique().shape[0]

    def _tiles(self, shape: torch.Size, size: int, *, is_symmetric: bool) -> list[tuple[slice, slice]]:
        """Examples of the tiles of K, of about so many rows; of a symmetric K those on the diagonal and above."""
        r = self.layout.rows_per_example
        rows, columns = (list(slices(n // r, max(1, size // r))) for n in shape)
        return [(i, j) for i in rows for j in columns if not is_symmetric or j.start >= i.start]


def _occurring(x: Tensor, rows: RowIndex, rows_per_example: int) -> tuple[Tensor, RowIndex]:
    """Take the examples that rows belong to, once each, and number the rows among theirs."""
    examples, place = (rows // rows_per_example).unique(return_inverse=True)
    kept = x if examples.shape[0] == x.shape[0] else x[examples]
    return kept, place * rows_per_example + rows % rows_per_example


def _rows(examples: slice, rows_per_example: int) -> slice:
    return slice(examples.start * rows_per_example, examples.stop * rows_per_example)


def _mirror(K: GramMatrix, size: int) -> None:
    """Copy what is above the diagonal to its other side, a tile at a time; whatever is below it is not read."""
    for i in slices(K.shape[0], size):
        for j in slices(i.start, size):
            K[i, j] = K[j, i].mT
        upper = K[i, i].triu()
        K[i, i] = upper + upper.triu(1).mT
