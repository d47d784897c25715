"""The engine that writes K down: tiles from another engine, kept where they fit, else made anew for each product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, final

import torch
from jaxtyping import Float64
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import Chunks, is_same_view, raise_largest, shortage, slices
from ntk_lazy.engines.contract import ColumnsFirst, Engine, Entries, ExampleRows, GramMatrix, OtherBlock, RowIndex
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.engines.written import WrittenKernel
from ntk_lazy.errors import BudgetError
from ntk_lazy.gemm import times_transposed_in_float64
from ntk_lazy.precision import ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix

KeptKernels: TypeAlias = dict[tuple[object, ...], tuple[WrittenKernel, Tensor, Tensor]]


@final
class GramEngine(Engine):
    """Products with K itself.

    Cost of K: that of ``inner.gram``. A product with k columns of a K that is kept takes ``2 n1 n2 k`` flops.
    Memory: K, or a strip of its rows, under the budget; and what ``inner`` holds.
    """

    def __init__(self, inner: Engine, *, budget: int, max_dense_bytes: int, scratch: Scratch | None = None) -> None:
        super().__init__(inner.model, inner.layout, budget)
        self.inner = inner
        self.max_dense_bytes = max_dense_bytes
        self.scratch = scratch
        # With the inputs: while these are held, no others can lie at the addresses that stand in the key.
        self._kept: KeptKernels | None = None

    def fits(self, num_examples1: int, num_examples2: int) -> bool:
        """Whether there is memory to write K down, and it is allowed."""
        return self.num_bytes(num_examples1, num_examples2) <= min(self.budget, self.max_dense_bytes)

    def keeps(self, num_examples1: int, num_examples2: int) -> bool:
        """Whether K may be written down and kept, in memory or in a file."""
        is_allowed = self.num_bytes(num_examples1, num_examples2) <= self.max_dense_bytes
        return self.fits(num_examples1, num_examples2) or (is_allowed and self.scratch is not None)

    @override
    @contextmanager
    def linearised(self, num_columns: int = 1) -> Iterator[None]:
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            with self.inner.linearised(num_columns):
                yield
        finally:
            self._kept = None

    @override
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        n1, n2 = x1.shape[0], x2.shape[0]
        if 0 in (n1, n2):
            return V.new_zeros(n1 * self.layout.rows_per_example, V.shape[1])
        self._require(max(n1, n2))
        with torch.no_grad(), ieee_precision():
            if self._kept is not None and self.keeps(n1, n2):
                return self._kept_kernel(self._kept, x1, x2).matmul(V)
            if self.fits(n1, n2):
                return self._written(x1, x1 if is_same_view(x1, x2) else x2) @ V
            strips = slices(n1, self._strip(n2))
            return torch.cat([self._written(x1[strip], x2) @ V for strip in strips])

    @override
    def product_afresh(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        return self.inner.product(x1, x2, V)

    @override
    def gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        self.inner.gram(x1, x2, out)

    @override
    def columns(self, x1: Tensor, x2: Tensor, which: RowIndex) -> GramMatrix:
        return self.inner.columns(x1, x2, which)

    @override
    def entries(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex) -> Entries:
        return self.inner.entries(x1, x2, rows1, rows2)

    @override
    def _prefers_tiles(self, num_examples1: int, num_examples2: int, num_columns: int) -> bool:
        return True

    @override
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        self._require(num_examples)
        held = min(self.num_bytes(num_examples, num_examples), self.num_bytes(self._strip(num_examples), num_examples))
        inner = self.inner.tile_chunks(num_examples)
        return Chunks(inner.examples, num_columns, held + inner.bytes)

    @override
    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        return self.inner.shortage_of_tiles(num_examples)

    @override
    def tile_chunks(self, num_examples: int) -> Chunks:
        return self.inner.tile_chunks(num_examples)

    @override
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        return self.inner.pull(x, V)

    @override
    def pull_with_graph(self, x: Tensor, V: Block) -> ColumnsFirst:
        return self.inner.pull_with_graph(x, V)

    @override
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        return self.inner.push(x, W)

    @override
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        if self._kept is None or not self.keeps(x.shape[0], x.shape[0]) or not x.shape[0]:
            return self.inner.half_gram(x, V)
        # K is there: a product with it costs less than half a product by layers. Values are off by rounding of the
        # entries, which averages out: about eps lambda_1 / n.
        total = times_transposed_in_float64(V.mT, self.product(x, x, V).mT).cpu()
        return (total + total.mT) / 2

    @override
    def energies(self, x: Tensor, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        return self.inner.energies(x, V)

    @override
    def rows(self, x: Tensor) -> ExampleRows:
        return self.inner.rows(x)

    @override
    def row_chunks(self, num_examples: int) -> list[slice]:
        return self.inner.row_chunks(num_examples)

    @override
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.bilinear_gradient(x1, x2, U, V, wrt=wrt)

    @override
    def rows_gradient(self, x1: Tensor, x2: Tensor, G: GramMatrix, *, wrt: set[str]) -> dict[str, Tensor]:
        return self.inner.rows_gradient(x1, x2, G, wrt=wrt)

    def _kept_kernel(self, kept: KeptKernels, x1: Tensor, x2: Tensor) -> WrittenKernel:
        key = (x1.data_ptr(), x1.shape, x1.stride(), x2.data_ptr(), x2.shape, x2.stride())
        if key not in kept:
            # One kernel at a time: what is kept for another is let go first.
            kept.clear()
            if is_same_view(x1, x2):
                kept[key] = WrittenKernel.of_symmetric(self._written(x1, x1)), x1, x2
            else:
                kept[key] = WrittenKernel.plain(self._written(x1, x2)), x1, x2
        return kept[key][0]

    def num_bytes(self, num_examples1: int, num_examples2: int) -> int:
        """Of K, written down."""
        r = self.layout.rows_per_example
        return num_examples1 * num_examples2 * r * r * self.model.dtype.itemsize

    def _strip(self, num_examples: int) -> int:
        """Examples whose rows of K fit."""
        one = self.num_bytes(1, num_examples)
        return max(1, min(num_examples, self.budget // max(one, 1)))

    def _require(self, num_examples: int) -> None:
        """Refuse what does not fit before anything is spent."""
        one = self.num_bytes(1, num_examples)
        rows = shortage(one, self.budget, "the rows of K of one example (engine='factors' does without)")
        raise_largest(rows, self.inner.shortage_of_tiles(num_examples))

    def _written(self, x1: Tensor, x2: Tensor) -> GramMatrix:
        r = self.layout.rows_per_example
        shape, dtype = (x1.shape[0] * r, x2.shape[0] * r), self.model.dtype
        if self.scratch is None or self.num_bytes(x1.shape[0], x2.shape[0]) <= self.budget:
            out = torch.empty(shape, dtype=dtype, device=self.model.device)
        else:
            out = self.scratch.empty(shape, dtype)
        self.inner.gram(x1, x2, out)
        return out
