"""The engine of engines: for each job the cheapest that fits; automatic differentiation where factors fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from jaxtyping import Float64
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import Chunks, Share, is_same_view, slices
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
from ntk_lazy.engines.coverage import FactorMismatchError
from ntk_lazy.engines.factors import FactorEngine
from ntk_lazy.engines.gram import GramEngine
from ntk_lazy.engines.rates import machine_rates
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.errors import BudgetError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.shapes import Block, SmallMatrix
from ntk_lazy.solves import ColumnCosts

Result = TypeVar("Result")


@final
@dataclass(frozen=True)
class Alternative:
    """One way of doing a job.

    Attributes:
        engine: Its name.
        seconds: Predicted.
        num_bytes: Held beside operands and result; None where it does not fit the budget.
        how: In a few words.
    """

    engine: str
    seconds: float
    num_bytes: int | None
    how: str


@final
class PlannedEngine(Engine):
    """Choose among the three engines by predicted time, under the budget.

    A model that routes its examples by their values may have factors on the first examples and none later: the first
    chunk that shows it sends the rest of the work, and that chunk again, to automatic differentiation.
    """

    def __init__(
        self,
        model: FunctionalModel,
        layout: OutputLayout,
        *,
        preflight: Preflight,
        budget: int,
        max_dense_bytes: int,
        chunk_size: int | None,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(model, layout, budget)
        self.preflight = preflight
        self.autodiff = AutodiffEngine(model, layout, preflight=preflight, budget=budget, chunk_size=chunk_size)
        self.factors: FactorEngine | None = None
        tiles: Engine = self.autodiff
        self.coverage = preflight.coverage
        if preflight.coverage.costs or preflight.derivatives.vectorises:
            self.factors = FactorEngine(
                model, layout, preflight=preflight, budget=budget, chunk_size=chunk_size, scratch=scratch
            )
            self.coverage = self.factors.coverage
            # One half of the budget for K, less than the other for what it is made of: allocators want their share.
            tiles = FactorEngine(
                model,
                layout,
                preflight=preflight,
                budget=Share.of(budget, 3, 8),
                chunk_size=chunk_size,
                scratch=scratch,
            )
        self.gram_engine = GramEngine(
            tiles, budget=Share.of(budget, 1, 2), max_dense_bytes=max_dense_bytes, scratch=scratch
        )
        self.scratch = scratch
        self._series: Engine | None = None
        self._context = ExitStack()  # of a series of products: what its engine keeps
        self._expected: int | None = None

    def choice(self, name: str) -> Engine:
        """The engine of an alternative."""
        engines: dict[str, Engine | None] = {"factors": self.factors, "gram": self.gram_engine}
        return engines.get(name) or self.autodiff

    def alternatives(
        self, num_examples: tuple[int, int], *, is_symmetric: bool, columns: int, calls: int
    ) -> tuple[Alternative, ...]:
        """Predict what each engine would take for some products in a row, cheapest first among those that fit."""
        cost = self._cost(num_examples, is_symmetric)
        seconds, held = cost.autodiff(columns, calls), self._held(self.autodiff, max(num_examples), columns)
        autodiff = Alternative("autodiff", seconds, held, self.preflight.derivatives.mode)
        return ranked([autodiff, *self._by_layers(cost, columns, calls)])

    def _by_layers(self, cost: CostModel, columns: int, calls: int) -> list[Alternative]:
        """Predict what the engines would take that go by layers."""
        n, found = max(cost.num_examples), []
        if self.factors is not None:
            together = n if cost.is_symmetric else sum(cost.num_examples)
            store = self.factors.store
            is_kept, as_rows = store.keeps(together), store.row_parameters(together)
            how = "factors of layers, kept" if is_kept else "factors of layers, made anew for each product"
            how += f", {len(as_rows)} parameters as rows of J" if as_rows else ""
            seconds = cost.factors(columns, calls, is_kept=is_kept, as_rows=as_rows)
            if self.scratch is not None and not store.fits(together):
                # Each half of a product reads one side.
                halves = sum(cost.num_examples) * store.bytes_per_example
                seconds += calls * halves / self.scratch.bytes_per_second()
                how += ", in scratch files"
            found.append(Alternative("factors", seconds, self._held(self.factors, n, columns), how))
        gram = self.gram_engine
        if gram.keeps(*cost.num_examples):
            seconds, how = cost.gram() + cost.kept_products(columns, calls), "K written down once and kept"
            if self.scratch is not None and not gram.fits(*cost.num_examples):
                seconds += calls * gram.num_bytes(*cost.num_examples) / self.scratch.bytes_per_second()
                how += " in a scratch file"
            found.append(Alternative("gram", seconds, self._held(gram, n, columns), how))
        return found

    def _cost(self, num_examples: tuple[int, int], is_symmetric: bool) -> CostModel:
        rates = machine_rates(self.model.device, self.model.dtype)
        return CostModel(
            self.preflight,
            self.coverage,
            self.layout,
            self.model.num_params,
            num_examples,
            is_symmetric,
            self.model.dtype.itemsize,
            rates,
        )

    @override
    @contextmanager
    def linearised(self, num_columns: int = 1) -> Iterator[None]:
        """Plan for so many columns; the choice is made at the first product, when the examples are known."""
        if self._expected is not None:
            yield
            return
        self._expected, self._series = max(1, num_columns), None
        try:
            with self._context:
                yield
        finally:
            self._expected, self._series = None, None

    @override
    @contextmanager
    def aside(self, num_columns: int) -> Iterator[None]:
        outer, context, is_waiting = self._expected, self._context, self._expected is not None and self._series is None
        if is_waiting:
            self._expected, self._context = None, ExitStack()
        try:
            with self.linearised(num_columns):
                yield
        finally:
            if is_waiting:
                self._expected, self._context = outer, context

    @override
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        return self._try(self._engine(x1, x2, V.shape[1]), lambda engine: engine.product(x1, x2, V))

    @override
    def product_afresh(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        return self._try(self._engine(x1, x2, V.shape[1]), lambda engine: engine.product_afresh(x1, x2, V))

    @override
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        return self._try(self._layers, lambda engine: engine.pull(x, V))

    @override
    def pull_with_graph(self, x: Tensor, V: Block) -> ColumnsFirst:
        return self.autodiff.pull_with_graph(x, V)

    @override
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        return self._try(self._layers, lambda engine: engine.push(x, W))

    @override
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        return self._try(self._series or self._layers, lambda engine: engine.half_gram(x, V))

    @override
    def energies(self, x: Tensor, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        return self._try(self._layers, lambda engine: engine.energies(x, V))

    @override
    def rows(self, x: Tensor) -> ExampleRows:
        return self._try(self._layers, lambda engine: engine.rows(x))

    @override
    def gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        self._try(self._series or self._layers, lambda engine: engine.gram(x1, x2, out))

    @override
    def columns(self, x1: Tensor, x2: Tensor, which: RowIndex) -> GramMatrix:
        chosen = self._series or self._for_columns(x1.shape[0], x2.shape[0], which.shape[0])
        return self._try(self._begun(chosen), lambda engine: engine.columns(x1, x2, which))

    @override
    def column_costs(self, num_examples: int, *, written: int, multiplied: int, calls: int) -> ColumnCosts:
        if self.factors is None or isinstance(self._series, AutodiffEngine):
            return ColumnCosts()
        if not self.factors.store.fits_beside(num_examples, written):
            return ColumnCosts()  # all factors would be made anew for a few columns at a time
        cost = self._cost((num_examples, num_examples), True)
        ways = [way.seconds for way in self._by_layers(cost, multiplied, calls) if way.num_bytes is not None]
        # At its best; how the model differentiates is not found out for this.
        ways.append(cost.autodiff(multiplied, calls, mode="forward-over-reverse"))
        return cost.columns(min(ways) / (multiplied * calls), written=written)

    @override
    def entries(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex) -> Entries:
        chosen = self._series or self._layers
        return self._try(self._begun(chosen), lambda engine: engine.entries(x1, x2, rows1, rows2))

    @override
    def _prefers_tiles(self, num_examples1: int, num_examples2: int, num_columns: int) -> bool:
        return self._layers._prefers_tiles(num_examples1, num_examples2, num_columns)

    @override
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        return self._layers.chunks(num_examples, num_columns)

    @override
    def row_chunks(self, num_examples: int) -> list[slice]:
        return self._layers.row_chunks(num_examples)

    @override
    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        return self._layers.shortage_of_tiles(num_examples)

    @override
    def tile_chunks(self, num_examples: int) -> Chunks:
        return self._layers.tile_chunks(num_examples)

    @override
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if wrt or not is_same_view(x1, x2):
            return self.autodiff.bilinear_gradient(x1, x2, U, V, wrt=wrt)
        # A gradient in the scale alone asks for q itself. From half products of layers: a K written down in float32
        # would lose it, of vectors that solves made and that have next to nothing of the largest eigenvectors.
        return self._try(self._layers, lambda engine: _bilinear(engine, x1, U, V)).to(U), {}

    @override
    def rows_gradient(self, x1: Tensor, x2: Tensor, G: GramMatrix, *, wrt: set[str]) -> dict[str, Tensor]:
        return self.autodiff.rows_gradient(x1, x2, G, wrt=wrt)

    @property
    def _layers(self) -> Engine:
        """The engine for whatever is not a product with K."""
        return self.factors or self.autodiff

    def _engine(self, x1: Tensor, x2: Tensor, columns: int) -> Engine:
        if self._series is not None:
            return self._series
        calls = self._calls(columns)
        return self._begun(self._cheapest((x1.shape[0], x2.shape[0]), is_same_view(x1, x2), columns, calls))

    def _calls(self, columns: int) -> int:
        """Calls that are expected, with so many columns each."""
        return 1 if self._expected is None else max(1, round(self._expected / max(columns, 1)))

    def _begun(self, engine: Engine) -> Engine:
        """Stay with an engine for the rest of the series, if this is one."""
        if self._expected is not None and self._series is None:
            self._context.enter_context(engine.linearised(self._expected))
            self._series = engine
        return engine

    def _for_columns(self, num_examples1: int, num_examples2: int, columns: int) -> Engine:
        """Choose who writes columns of K down: layers, or automatic differentiation of unit vectors."""
        if self.factors is None:
            return self.autodiff
        cost, calls = self._cost((num_examples1, num_examples2), False), self._calls(columns)
        is_kept = calls > 1 and self.factors.store.keeps(num_examples1 + num_examples2)
        # The side of the rows is the same in all calls.
        layers = calls * min(cost.tiles(), cost.products(columns)) + cost.capture() * (1 if is_kept else calls)
        least = cost.autodiff(columns, calls, mode="forward-over-reverse")
        if not self.preflight.pays_to_differentiate(layers - least):
            return self.factors
        return self.factors if layers <= cost.autodiff(columns, calls) else self.autodiff

    def _cheapest(self, num_examples: tuple[int, int], is_symmetric: bool, columns: int, calls: int) -> Engine:
        """Choose as ``alternatives`` ranks; how the model differentiates is found out only where it could matter."""
        cost = self._cost(num_examples, is_symmetric)
        best = next(iter(ranked(self._by_layers(cost, columns, calls))), None)
        least, pays = cost.autodiff(columns, calls, mode="forward-over-reverse"), self.preflight.pays_to_differentiate
        if best is not None and best.num_bytes is not None and not pays(best.seconds - least):
            return self.choice(best.engine)
        ways = self.alternatives(num_examples, is_symmetric=is_symmetric, columns=columns, calls=calls)
        if ways[0].num_bytes is None:
            raise self._least_shortage(max(num_examples), columns)
        return self.choice(ways[0].engine)

    def _try(self, engine: Engine, run: Callable[[Engine], Result]) -> Result:
        try:
            return run(engine)
        except FactorMismatchError:
            self.factors, self._series = None, None
            self.gram_engine.inner = self.autodiff
            return run(self.autodiff)

    def _least_shortage(self, num_examples: int, columns: int) -> BudgetError:
        """Of what keeps each engine from a product, that which asks for least."""
        found = []
        for name in ("autodiff", "factors", "gram"):
            try:
                self.choice(name).chunks(num_examples, columns)
            except BudgetError as error:
                found.append(error)
        return min(found, key=lambda error: error.requested_bytes)

    @staticmethod
    def _held(engine: Engine, num_examples: int, columns: int) -> int | None:
        try:
            return engine.chunks(num_examples, columns).bytes
        except BudgetError:
            return None


def _bilinear(engine: Engine, x: Tensor, U: Block, V: Block) -> Tensor:
    """Return ``sum_d u_dᵀ J Jᵀ v_d``, from both half products at once."""
    d, value = U.shape[1], torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for columns in slices(d, max(1, engine.chunks(x.shape[0], max(1, 2 * d)).columns // 2)):
            halves = engine.half_gram(x, torch.cat([U[:, columns], V[:, columns]], 1).detach())
            value += halves.chunk(2, 1)[1].diagonal().sum()
    return value


def ranked(alternatives: list[Alternative]) -> tuple[Alternative, ...]:
    """Cheapest first, of those that fit the budget; then the others."""
    return tuple(sorted(alternatives, key=lambda a: (a.num_bytes is None, a.seconds)))
