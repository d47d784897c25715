"""The factors of all examples, held where they fit and made anew where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, final

import torch
from torch import Tensor

from ntk_lazy.engines.chunks import is_same_view, largest_that, require, shortage, slack, slices, working_set
from ntk_lazy.engines.contract import Preflight
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.factor_chunk import Chunk, join
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.engines.uses import Rows, Use, relabelled
from ntk_lazy.errors import BudgetError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout

_KEPT_SHARE = 0.5  # of the budget: factors that stay while a product, or a series of them, runs
_SETS_SHARE = 0.125  # of the budget: several sets of them, which lie in memory as they come; one alone may have all
_ANY_NUMBER = 1 << 62
PIECES_BYTES = 16 << 20  # what contractions make at a time: a factor that is scaled, its copy, products
_PASS_SHARE = 0.25  # of the budget: a forward and a backward pass
_PASS_SETS = 2  # working sets of one: twice the examples take a fifth off a transformer, whose operations are many

Chunked: TypeAlias = Callable[[], Iterable[Chunk]]  # goes through all chunks, as often as it is called
# Examples with their chunks, the set that was last asked for at the end.
Kept: TypeAlias = dict[tuple[int, torch.Size, tuple[int, ...], frozenset[str]], "KeptSet"]


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are multiplied together, with the factors of both sides.

    Attributes:
        widths: Entries of each parameter, or as many of them as take part.
        left: Chunks of the rows.
        right: Chunks of the columns; the same for one set of examples.
        num_bytes: What stands beside columns of them: factors that are held, or a pass through a chunk.
    """

    widths: dict[str, int]
    left: Chunked
    right: Chunked
    num_bytes: int

    def relabelled(self, name: str) -> Group:
        """Of one parameter, held on both sides, the entries that occur."""
        left = list(self.left())
        right = [] if self.right is self.left else list(self.right())
        before = [uses[name] for chunk in (*left, *right) for uses in chunk.uses]
        after = relabelled(before)
        used = next((use for uses in after for use in uses), None)
        if used is None or used.num_entries == self.widths[name]:
            return self
        renewed = iter(after)
        chunks = [Chunk(c.examples, tuple({name: next(renewed)} for _ in c.uses)) for c in (*left, *right)]
        first, second = chunks[: len(left)], chunks[len(left) :] or chunks
        return Group({name: used.num_entries}, lambda: first, lambda: second, self.num_bytes)


@final
@dataclass(frozen=True, eq=False)
class KeptSet:
    """Factors that are held.

    Attributes:
        x: The examples.
        chunks: Their factors.
        num_bytes: In memory; 0 in files.
    """

    x: Tensor
    chunks: list[Chunk]
    num_bytes: int


@final
class FactorStore:
    """Captures the factors of examples, chunk by chunk, and holds those of the last few sets of examples in a series.

    Attributes:
        budget: Bytes; half of them are for what is held.
        scratch: Where it is held if that is not enough, or None.
    """

    def __init__(
        self,
        model: FunctionalModel,
        layout: OutputLayout,
        coverage: Coverage,
        *,
        preflight: Preflight,
        budget: int,
        chunk_size: int | None,
        scratch: Scratch | None = None,
    ) -> None:
        self.model, self.layout = model, layout
        self.preflight, self.coverage = preflight, coverage
        self.budget, self._asked_size = budget, chunk_size
        self.scratch = scratch
        # With the inputs: while these are held, no others can lie at the address that stands in the key.
        self._kept: Kept | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Hold factors between products, within the context: of the sets that were last asked for, as many as fit."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    @property
    def bytes_per_example(self) -> int:
        """Factors of one example, or its rows of J where these are smaller."""
        q = self.layout.rows_per_example * self.layout.passes
        factors = sum(c.source_bytes + q * c.gradient_bytes for c in self.coverage.costs.values())
        return factors + sum(self._extra_bytes(name) for name in self._compact)

    def fits(self, num_examples: int) -> bool:
        """Whether there is memory to hold the factors of so many examples."""
        return num_examples * self.bytes_per_example <= self._room(2 * self.largest_column)

    def fits_beside(self, num_examples: int, others: int) -> bool:
        """Whether the factors of so many examples stay in memory while those of a few others come and go."""
        return (num_examples + others) * self.bytes_per_example <= self.budget * _SETS_SHARE

    def keeps(self, num_examples: int) -> bool:
        """Whether the factors of so many examples are held between products, and between the halves of one."""
        return self.scratch is not None or self.fits(num_examples)

    def row_parameters(self, num_examples: int) -> frozenset[str]:
        """Parameters whose rows of J are held in place of their factors, as far as there is room for them.

        Where positions are more than outputs, rows make a product ``S / q`` times cheaper, and to sum positions once
        costs no more than half a product by position with q columns.
        """
        room = self._room(2 * self.largest_column) - num_examples * self.bytes_per_example
        chosen = set(self._compact)
        for extra, name in sorted((self._extra_bytes(name), name) for name in self.coverage.costs):
            if name not in chosen and self._gains_by_rows(name) and extra * num_examples <= room:
                chosen.add(name)
                room -= extra * num_examples
        return frozenset(chosen)

    def kept_bytes(self, num_examples: int) -> int:
        """Bytes that are held while a product runs."""
        if not self.fits(num_examples):
            return 0  # those of a chunk, while it is captured
        return self._set_bytes(num_examples, self.row_parameters(num_examples))

    def half_size(self) -> int:
        """Examples of one of two sets whose factors are held together."""
        if self.scratch is not None:
            return _ANY_NUMBER
        # Positions are unfolded beside them, in pieces.
        room = self._room(0) - min(PIECES_BYTES, self.budget / 8)
        return max(1, int(room / 2) // max(1, self.bytes_per_example))

    def transient(self, size: int) -> int:
        """Bytes of a forward pass, its graph, a backward pass over a chunk, and the factors that come out of it."""
        q, costs = self.layout.rows_per_example * self.layout.passes, self.coverage.costs
        rows = q * sum(costs[name].gradient_bytes for name in self.coverage.by_rows)
        # Vectorised over q rows as well, and gradients once more while they are put in place.
        vectorised = (1 + q) * self.preflight.activation_bytes + rows if rows else 0
        return int(self._slack * (2 * self.preflight.activation_bytes + vectorised + self.bytes_per_example) * size)

    def chunk_size(self, num_examples: int) -> int:
        """Examples that go through the model at once.

        Raises:
            BudgetError: They do not fit, as many as were asked for, or one.
        """
        one = max(1, self.transient(1))
        size = min(num_examples, self._least_size)
        require(one * size, self.budget, _asked(size), largest_chunk=int(self.budget // one) if size > 1 else 0)
        room = min(self.budget * _PASS_SHARE, _PASS_SETS * working_set(self.model.device.type))
        return size if self._asked_size else min(num_examples, max(1, int(room // one)))

    @property
    def column(self) -> int:
        """Bytes of one column of the parameters that have factors, while it is made of those of chunks."""
        return sum(map(self._column_of, self.coverage.costs)) + self.largest_column

    @property
    def largest_column(self) -> int:
        """The same of one parameter alone, without what it is made of."""
        return max(map(self._column_of, self.coverage.costs), default=0)

    def shortage_of_products(self, num_examples: int) -> BudgetError | None:
        """Tell what is missing for a product with one column, if anything is.

        Args:
            num_examples: Of both sides together.
        """
        if self.keeps(num_examples) and (self.scratch is None or self._room(2 * self.largest_column) >= 0):
            return None
        size = min(num_examples, self._least_size)
        made_anew = self.transient(size) + self.column
        kept = num_examples * self.bytes_per_example
        beside = max(self.transient(self._least_size), 2 * self.largest_column)
        if self.scratch is None:
            beside = max(kept + beside, int(kept / _KEPT_SHARE))
        largest = 0
        if size > 1:
            largest = largest_that(size, lambda b: self.transient(b) + self.column <= self.budget)
        return shortage(min(made_anew, beside), self.budget, f"{_asked(size)} beside one column", largest_chunk=largest)

    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        """Tell what is missing for tiles of K, if anything is."""
        size, pair = min(num_examples, self._least_size), 2 * self.bytes_per_example
        largest = 0
        if size > 1:
            largest = largest_that(size, lambda b: self.transient(b) + pair <= self.budget)
        return shortage(self.transient(size) + pair, self.budget, _asked(size), largest_chunk=largest)

    def groups(self, x1: Tensor, x2: Tensor, *, is_compact: bool) -> Iterator[Group]:
        """Divide the covered parameters into groups that are multiplied one after the other.

        Where all factors are held, each parameter is a group, so that no block of all of them is needed, and of a table
        that is looked up only the rows that occur take part, if the caller agrees (``is_compact``). Where chunks are
        made anew each time, all parameters go together.
        """
        widths = {name: cost.num_params for name, cost in self.coverage.costs.items()}
        if not widths:
            return
        is_symmetric = is_same_view(x1, x2)
        together = x1.shape[0] if is_symmetric else x1.shape[0] + x2.shape[0]
        is_held, as_rows = self.keeps(together), self.row_parameters(together)
        left = self.chunks(x1, is_held=is_held, as_rows=as_rows, together=together)
        right = left if is_symmetric else self.chunks(x2, is_held=is_held, as_rows=as_rows, together=together)
        if not is_held:
            yield Group(widths, left, right, self.transient(self.chunk_size(together)))
            return
        kept = self.kept_bytes(together)
        for name, width in widths.items():
            group = Group({name: width}, left, right, kept)
            yield group.relabelled(name) if is_compact else group

    def chunks(self, x: Tensor, *, is_held: bool, together: int, as_rows: frozenset[str] | None = None) -> Chunked:
        """Go through the factors of all examples, which are held or made anew each time.

        Args:
            x: The examples; also a stretch of those whose factors are held.
            is_held: Whether there is room for all, of which kind ever.
            together: Examples whose factors are held at once.
            as_rows: Parameters whose rows of J are wanted in place of factors; None for what is held already.
        """
        if not is_held:
            return lambda: self.capture(x, as_rows=self._compact)
        part = self._part_of_kept(x, as_rows)
        if part is not None:
            return lambda: part
        as_rows = self._compact if as_rows is None else as_rows
        key = (x.data_ptr(), x.shape, x.stride(), as_rows)
        if self._kept is not None and key in self._kept:
            held = self._kept[key].chunks
        else:
            allocate = None if self.scratch is None or self.fits(together) else self.scratch.empty
            num_bytes = self._set_bytes(x.shape[0], as_rows) if allocate is None else 0
            if self._kept is not None:
                self._make_room(self._kept, num_bytes)
            held = join(self.capture(x, as_rows=as_rows), x.shape[0], allocate)
            if self._kept is not None:
                self._kept[key] = KeptSet(x, held, num_bytes)
        return lambda: held

    def capture(self, x: Tensor, *, as_rows: frozenset[str] = frozenset()) -> Iterator[Chunk]:
        """Run the model, chunk by chunk."""
        cotangents = self.layout.cotangents(dtype=self.model.dtype, device=x.device)
        passes = cotangents.reshape(self.layout.rows_per_example, self.layout.passes, -1).unbind(1)
        for examples in slices(x.shape[0], self.chunk_size(x.shape[0])):
            factors = [self.coverage.factors(self.model, x[examples], u) for u in passes]
            for uses in factors:
                uses |= {name: [_as_rows(uses[name])] for name in as_rows if uses[name]}
            yield Chunk(examples, tuple(factors))

    def _make_room(self, kept: Kept, num_bytes: int) -> None:
        """Let go of sets for another one: of that in files for one in files, else of those used longest ago."""
        rivals = [key for key, one in kept.items() if (one.num_bytes == 0) == (num_bytes == 0)]
        for key in rivals:
            held = sum(one.num_bytes for one in kept.values())
            if num_bytes and held + num_bytes <= self.budget * _SETS_SHARE:
                break
            del kept[key]

    def _set_bytes(self, num_examples: int, as_rows: frozenset[str]) -> int:
        """Bytes of the factors of so many examples, some parameters as rows of J."""
        extra = sum(self._extra_bytes(name) for name in as_rows - self._compact)
        return num_examples * (self.bytes_per_example + extra)

    def _part_of_kept(self, x: Tensor, as_rows: frozenset[str] | None) -> list[Chunk] | None:
        """The factors of a stretch of the examples whose factors are held."""
        if self._kept is None:
            return None
        for key, one in self._kept.items():
            start = _offset(x, one.x)
            if start is not None and as_rows in (None, key[-1]):
                self._kept[key] = self._kept.pop(key)  # as the last one that was asked for
                found = [chunk.within(slice(start, start + x.shape[0])) for chunk in one.chunks]
                return [chunk for chunk in found if chunk is not None]
        return None

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
    def _least_size(self) -> int:
        """Examples of the smallest chunk that may be taken."""
        return self._asked_size or 1

    def _room(self, beside: int) -> float:
        """Bytes for factors that are held, beside a pass through the smallest chunk, or something else afterwards."""
        return min(self.budget * _KEPT_SHARE, self.budget - max(self.transient(self._least_size), beside))

    def _column_of(self, name: str) -> int:
        return self.coverage.costs[name].num_params * self.layout.passes * self.model.dtype.itemsize

    @property
    def _slack(self) -> float:
        return slack(self.model.device.type)


def _asked(size: int) -> str:
    return "one example" if size == 1 else f"a chunk of {size} examples"


def _offset(x: Tensor, whole: Tensor) -> int | None:
    """Where a tensor begins in another one, if it is a stretch of its examples."""
    step = whole.stride(0)
    is_view = x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and x.dtype == whole.dtype
    if not is_view or x.stride() != whole.stride() or x.shape[1:] != whole.shape[1:] or step == 0:
        return None
    start, remainder = divmod(int(x.storage_offset()) - int(whole.storage_offset()), step)
    return start if remainder == 0 and 0 <= start <= whole.shape[0] - x.shape[0] else None


def _as_rows(uses: list[Use]) -> Rows:
    first, *others = (use.as_rows() for use in uses)
    for other in others:
        first.R.add_(other.R)
    return first
