"""The engine for any module: reverse mode for Jᵀ, forward mode (or reverse mode twice) for J."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import ROWS_OF_ONE, ChunkRule, Chunks, shortage, slices
from ntk_lazy.engines.contract import X1, X2, ColumnsFirst, Engine, ExampleRows, GramMatrix, OtherBlock, Preflight
from ntk_lazy.engines.cost import passes_of_product, tiles_of_rows
from ntk_lazy.engines.flat import FlatLayout
from ntk_lazy.engines.footprint import Footprint
from ntk_lazy.engines.kept import KeptLinearisations
from ntk_lazy.engines.linearisation import DoubleReverse, Linearisation, Tangents, example_gradients, linearisation
from ntk_lazy.errors import BudgetError
from ntk_lazy.gemm import times_transposed_in_float64
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix

# Linearisations are kept only where half of the budget is still ample for a block of so many columns: to split it
# would cost more than the forward passes that keeping saves.
_WIDE = 16
_LEAST_TOGETHER = 4  # examples that are differentiated at once, after a trial on one of them


@final
class AutodiffEngine(Engine):
    """Products by automatic differentiation, chunked over examples and over columns.

    Cost of a product with k columns: about ``12 N P k`` flops for dense layers, ``passes`` times that in trace
    mode. Memory: that of ``ChunkRule``.
    """

    def __init__(
        self, model: FunctionalModel, layout: OutputLayout, *, preflight: Preflight, budget: int, chunk_size: int | None
    ) -> None:
        model = replace(model, has_private_buffers=preflight.writes_buffers, keeps_generators=preflight.draws_numbers)
        super().__init__(model, layout, budget)
        self.preflight = preflight
        self.flat = FlatLayout.of(model.params)
        self.chunk_size = chunk_size
        self._kept: KeptLinearisations | None = None

    @cached_property
    def rule(self) -> ChunkRule:
        """How chunks are chosen; it rests on products that are watched, which models with factors do without."""
        model = self.model
        return ChunkRule(
            footprint=self.preflight.derivatives.footprint,
            activation_bytes=max(self.preflight.activation_bytes, 1),
            parameter_bytes=model.num_params * model.dtype.itemsize,
            passes=self.layout.passes,
            budget=self.budget,
            device_type=model.device.type,
            chunk_size=self.chunk_size,
        )

    def _gradient_rule(self) -> ChunkRule:
        """How chunks are chosen for gradients, which go through reverse mode twice whatever the model can do."""
        rule = self.rule
        footprint = Footprint.of_gradients(activation_bytes=rule.activation_bytes, parameter_bytes=rule.parameter_bytes)
        return replace(rule, footprint=footprint)

    @override
    @contextmanager
    def linearised(self, num_columns: int = 1) -> Iterator[None]:
        whole = self.rule
        if self._kept is not None or whole.held(whole.chunk_size or 1, _WIDE) > whole.budget // 4:
            yield
            return
        self.rule = replace(whole, budget=whole.budget // 2)
        self._kept = KeptLinearisations(whole.budget // 2)
        try:
            yield
        finally:
            self.rule, self._kept = whole, None

    @override
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            return self._pull(x, V, self.rule.fit(x.shape[0], V.shape[1]))

    @override
    def pull_with_graph(self, x: Tensor, V: Block) -> ColumnsFirst:
        self.preflight.require_second_derivatives()
        with torch.enable_grad(), ieee_precision(), differentiable_attention():
            # Plain autograd, see _sweep.
            pulled = DoubleReverse(self.model, x).pull(self.layout.lift(V))
            flat = torch.cat([g.flatten(1) for g in pulled.values()], 1).to(self.model.dtype)
        return flat.reshape(V.shape[1], self.num_features)

    @override
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            return self._push(x, W, self.rule.fit(x.shape[0], W.shape[0]))

    @override
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        chunks = self.rule.fit(max(x1.shape[0], x2.shape[0]), V.shape[1])
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            parts = [
                self._push(x1, self._pull(x2, V[:, columns], chunks), chunks)
                for columns in slices(V.shape[1], chunks.columns)
            ]
        return torch.cat(parts, 1) if parts else V.new_zeros(x1.shape[0] * self.layout.rows_per_example, 0)

    @override
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        k = V.shape[1]
        gram = torch.zeros(k, k, dtype=torch.float64, device=V.device)
        chunks = self.rule.fit(x.shape[0], k)
        pieces = list(slices(k, chunks.columns))
        with torch.no_grad(), ieee_precision(), differentiable_attention():
            for i, left in enumerate(pieces):
                W = self._pull(x, V[:, left], chunks)
                for right in pieces[i:]:
                    # Columns that do not fit beside each other are pulled again: half of the blocks for each block.
                    other = W if right is left else self._pull(x, V[:, right], chunks)
                    part = times_transposed_in_float64(W, other)
                    gram[left, right], gram[right, left] = part, part.mT
        return gram.cpu()

    @override
    def rows(self, x: Tensor) -> ExampleRows:
        cotangents = self.layout.cotangents(dtype=self.model.dtype, device=x.device)
        if torch.is_grad_enabled():
            self.preflight.require_second_derivatives()
        with ieee_precision(), differentiable_attention():
            if self.preflight.derivatives.vectorises and not torch.is_grad_enabled():
                pulled = example_gradients(self.model, x, cotangents)
                flat = torch.cat([g.reshape(*g.shape[:2], -1) for g in pulled.values()], 2)
            else:
                flat = torch.stack([self._rows_of_one(x[i : i + 1], cotangents) for i in range(x.shape[0])])
        return flat.reshape(x.shape[0], self.layout.rows_per_example, self.num_features)

    @override
    def _prefers_tiles(self, num_examples1: int, num_examples2: int, num_columns: int) -> bool:
        return tiles_of_rows(
            self.layout, num_examples1, num_examples2, repeats=len(self.row_chunks(num_examples1))
        ) <= passes_of_product(self.layout, num_examples1 + num_examples2, num_columns)

    @override
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        return self.rule.fit(num_examples, num_columns)

    @override
    def row_chunks(self, num_examples: int) -> list[slice]:
        return list(slices(num_examples, self.rule.fit_rows(self.layout.rows_per_example * self.layout.passes)))

    @override
    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        needed = self.rule.rows_of_one(self.layout.rows_per_example * self.layout.passes)
        return shortage(needed, self.budget, ROWS_OF_ONE)

    @override
    def tile_chunks(self, num_examples: int) -> Chunks:
        rows = self.layout.rows_per_example * self.layout.passes
        examples = min(num_examples, self.rule.fit_rows(rows))
        return Chunks(examples, 1, examples * self.rule.rows_of_one(rows))

    @override
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if wrt:
            self.preflight.require_second_derivatives()
        chunks = self._gradient_rule().fit(max(x1.shape[0], x2.shape[0]), U.shape[1])
        value = U.new_zeros(())
        gradient: dict[str, Tensor] = {}
        with ieee_precision(), differentiable_attention():
            for columns in slices(U.shape[1], chunks.columns):
                u, v = U[:, columns].detach(), V[:, columns].detach()
                with torch.no_grad():
                    a, b = self._pull(x1, u, chunks), self._pull(x2, v, chunks)
                value = value + (a * b).sum()
                for name, x, rows, features in ((X1, x1, u, b), (X2, x2, v, a)):

                    def cotangents(examples: slice, rows: Block = rows) -> Tensor:
                        return self.layout.lift(rows[self._rows_of(examples)])

                    def fixed(_: slice, features: ColumnsFirst = features) -> dict[str, Tensor]:
                        return self._views(features)

                    self._sweep(name, x, slices(x.shape[0], chunks.examples), (cotangents, fixed), wrt, gradient)
        return value, gradient

    @override
    def rows_gradient(self, x1: Tensor, x2: Tensor, G: GramMatrix, *, wrt: set[str]) -> dict[str, Tensor]:
        if wrt:
            self.preflight.require_second_derivatives()
        units = self.layout.cotangents(dtype=self.model.dtype, device=x1.device).unsqueeze(1)
        gradient: dict[str, Tensor] = {}
        for chunk in self.row_chunks(x1.shape[0]):
            mine = self._rows_of(chunk)
            weights = G.new_zeros(mine.stop - mine.start, self.num_features)
            with torch.no_grad(), ieee_precision():
                for others in self.row_chunks(x2.shape[0]):
                    rows = self.rows(x2[others]).reshape(-1, self.num_features)
                    weights.addmm_(G[mine, self._rows_of(others)], rows)

            def fixed(example: slice, weights: Tensor = weights, start: int = mine.start) -> dict[str, Tensor]:
                one = self._rows_of(example)
                return self._views(weights[one.start - start : one.stop - start])

            factors = (lambda _: units, fixed)
            with ieee_precision(), differentiable_attention():
                ones = [slice(i, i + 1) for i in range(chunk.start, chunk.stop)]
                if self._vectorises_gradients(x1, ones, factors, wrt):
                    self._sweep(X1, x1, [chunk], factors, wrt, gradient, pull=self._pull_examples)
                else:
                    self._sweep(X1, x1, ones, factors, wrt, gradient)
        return gradient

    def _pull_examples(self, model: FunctionalModel, x: Tensor, units: Tensor) -> Tangents:
        """The rows of J of all examples at once, in their order."""
        return {name: g.flatten(0, 1) for name, g in example_gradients(model, x, units.squeeze(1)).items()}

    def _vectorises_gradients(
        self, x: Tensor, ones: list[slice], factors: tuple[Callable[[slice], Tensor], Any], wrt: set[str]
    ) -> bool:
        """Whether rows of J of many examples can be differentiated at once: tried on one of them, see ``_sweep``."""
        if not wrt or len(ones) <= _LEAST_TOGETHER or not self.preflight.derivatives.vectorises:
            return False
        alone: dict[str, Tensor] = {}
        together: dict[str, Tensor] = {}
        first = ones[len(ones) // 2 :][:1]
        self._sweep(X1, x, first, factors, wrt, alone)
        try:
            self._sweep(X1, x, first, factors, wrt, together, pull=self._pull_examples)
        except (RuntimeError, NotImplementedError):
            return False  # no rule for a derivative of a vectorised derivative
        tolerance = torch.finfo(self.model.dtype).eps ** 0.5
        return alone.keys() == together.keys() and all(
            bool((together[name] - g).norm() <= tolerance * g.norm()) for name, g in alone.items()
        )

    def _sweep(
        self,
        side: str,
        x: Tensor,
        pieces: Iterable[slice],
        factors: tuple[Callable[[slice], Tensor], Callable[[slice], dict[str, Tensor]]],
        wrt: set[str],
        gradient: dict[str, Tensor],
        *,
        pull: Callable[[FunctionalModel, Tensor, Tensor], Tangents] = lambda model, x, V: DoubleReverse(model, x).pull(
            V
        ),
    ) -> None:
        """Add to ``gradient`` that of a sum over pieces of ``⟨Jᵀ cotangents, fixed⟩``, both of them given by piece."""
        cotangents, fixed = factors
        model = self.model
        leaves = {
            n: t.detach().requires_grad_(n in wrt) for n, t in (model.params | model.constants).items() if n in wrt
        }
        model = replace(
            model,
            params={n: leaves.get(n, t.detach()) for n, t in model.params.items()},
            constants={n: leaves.get(n, t.detach()) for n, t in model.constants.items()},
        )
        for examples in pieces:
            piece = x[examples].detach()
            inputs = dict(leaves)
            if side in wrt:
                inputs[side] = piece.requires_grad_()
            if not inputs:
                return
            with torch.enable_grad():
                # Plain autograd: torch 2.13 differentiates forward mode, and vectorised reverse mode, wrongly through
                # layer norm (it takes the saved mean and scale for constants), and says nothing.
                pulled = pull(model, piece, cotangents(examples))
                views = fixed(examples)
                q = torch.stack([(g * views[name]).sum().to(self.model.dtype) for name, g in pulled.items()]).sum()
            if not q.requires_grad:
                continue
            grads = torch.autograd.grad(q, list(inputs.values()), allow_unused=True)
            for name, g in zip(inputs, grads, strict=True):
                if g is None:
                    continue
                if name == side:
                    gradient.setdefault(side, torch.zeros_like(x, requires_grad=False))[examples] += g
                else:
                    gradient[name] = gradient[name] + g if name in gradient else g

    def _linearise(self, x: Tensor, model: FunctionalModel | None = None) -> Linearisation:
        kind = linearisation(self.preflight.derivatives.mode)
        if model is None and self._kept is not None and not torch.is_grad_enabled():
            return self._kept.get(x, lambda: kind(self.model, x), self.rule.kept(x.shape[0]))
        return kind(model or self.model, x)

    def _rows_of(self, examples: slice) -> slice:
        r = self.layout.rows_per_example
        return slice(examples.start * r, examples.stop * r)

    def _views(self, W: ColumnsFirst) -> dict[str, Tensor]:
        return self.flat.views(W.reshape(-1, self.model.num_params))

    def _pull(self, x: Tensor, V: Block, chunks: Chunks) -> ColumnsFirst:
        W = V.new_zeros(V.shape[1] * self.layout.passes, self.model.num_params, dtype=self.model.dtype)
        for columns in slices(V.shape[1], chunks.columns):
            here = W[columns.start * self.layout.passes : columns.stop * self.layout.passes]
            for examples in slices(x.shape[0], chunks.examples):
                cotangents = self.layout.lift(V[self._rows_of(examples), columns])
                self.flat.add(here, self._linearise(x[examples]).pull(cotangents))
        return W.reshape(V.shape[1], self.num_features)

    def _push(self, x: Tensor, W: ColumnsFirst, chunks: Chunks) -> Block:
        Y = W.new_empty(x.shape[0] * self.layout.rows_per_example, W.shape[0])
        for columns in slices(W.shape[0], chunks.columns):
            tangents = self._views(W[columns])
            for examples in slices(x.shape[0], chunks.examples):
                Y[self._rows_of(examples), columns] = self.layout.lower(self._linearise(x[examples]).push(tangents))
        return Y

    def _rows_of_one(self, x: Tensor, cotangents: Tensor) -> Tensor:
        # With a graph behind it only plain autograd is right, see _sweep.
        way = DoubleReverse(self.model, x) if torch.is_grad_enabled() else self._linearise(x)
        pulled = way.pull(cotangents.unsqueeze(1))
        return torch.cat([g.reshape(g.shape[0], -1) for g in pulled.values()], 1)
