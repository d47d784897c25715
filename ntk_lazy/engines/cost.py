"""What each engine would take: operations and bytes, turned into seconds by two rates of the machine.

The formulas count what dominates; each divides by the share of the rate of large matrix products that its kind of work
reaches on CPUs. They rank engines and predict within a factor of two; they promise nothing finer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import final

from ntk_lazy.engines.contract import Preflight
from ntk_lazy.engines.coverage import Coverage, LayerCost
from ntk_lazy.engines.linearisation import LinearisationMode
from ntk_lazy.engines.rates import Rates
from ntk_lazy.engines.uses import contraction_cost, rows_cost
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.solves import ColumnCosts

_SHARE_OF_RATE = {
    "autodiff": 0.7,
    "autodiff over positions": 0.3,
    "factors": 0.8,
    "gram": 0.6,
    "passes": 0.4,
    "single examples": 0.15,
}
_TOUCHES = 25.0  # of each saved byte, in a pass that captures factors
_FLOPS_PER_BYTE = 20.0  # saved: least of a forward pass


@final
@dataclass(frozen=True)
class CostModel:
    """Predicts seconds for one kernel between ``n1`` and ``n2`` examples.

    Attributes:
        preflight: What is known of the model.
        coverage: Where factors come from.
        layout: Rows of J for an example.
        num_params: P.
        num_examples: n1 and n2; the same kernel on both sides counts once where that saves work.
        is_symmetric: Whether the two sides are the same.
        itemsize: Bytes of a number.
        rates: Of the machine.
    """

    preflight: Preflight
    coverage: Coverage
    layout: OutputLayout
    num_params: int
    num_examples: tuple[int, int]
    is_symmetric: bool
    itemsize: int
    rates: Rates

    def autodiff(self, columns: int, calls: int = 1, *, mode: LinearisationMode | None = None) -> float:
        """Products by automatic differentiation: a forward and a backward pass, a forward and a tangent pass.

        Args:
            columns: Of each product.
            calls: Products.
            mode: As if the model could be differentiated so; None for what it can.
        """
        positions = max((c.num_positions for c in self.coverage.costs.values()), default=1)
        is_plain = positions == 1 or self.preflight.times is not None
        share = _SHARE_OF_RATE["autodiff" if is_plain else "autodiff over positions"]
        flops = self._forward * (1 + 2.0 * columns * self.layout.passes) * sum(self.num_examples)
        mode = mode or self.preflight.derivatives.mode
        seconds = calls * flops * (2 if mode == "double-reverse" else 1) / (share * self.rates.flops)
        if mode == "reverse by rows":
            # In the second half of a product each row of J is a backward pass of its own.
            seconds += calls * self.num_examples[0] * (1 + 2.0 * self.layout.num_outputs) * self._seconds_alone
        return seconds

    def capture(self) -> float:
        """A forward pass and ``q + 1`` backward passes over the activations."""
        q = self.layout.rows_per_example * self.layout.passes
        examples = self.num_examples[0] if self.is_symmetric else sum(self.num_examples)
        passes = (2 + q) / _SHARE_OF_RATE["passes"]
        if self.coverage.by_rows:
            passes += (1 + 2 * q) / _SHARE_OF_RATE["single examples"]
        # Norms, activations and the check of each gradient read and write what the pass saves, over and over.
        moved = _TOUCHES * (2 + q) * self.preflight.activation_bytes
        return examples * (self._forward * passes / self.rates.flops + moved / self.rates.bytes)

    def rows(self) -> float:
        """All rows of J of the first side, once."""
        q, n = self.layout.rows_per_example, self.num_examples[0]
        seconds = n * 3.0 * q * self.layout.passes * self.num_params * self.itemsize / self.rates.bytes
        seconds += self.capture() if self._covered else 0.0
        if self.coverage.uncovered.keys() - self.coverage.by_rows:
            seconds += n * (1 + 2 * q * self.layout.passes) * self._seconds_alone
        return seconds

    def products(self, columns: int) -> float:
        """One product from factors that are there."""
        return self.factors(columns, is_kept=True) - self.capture()

    def factors(self, columns: int, calls: int = 1, *, is_kept: bool, as_rows: Collection[str] = ()) -> float:
        """Products from factors, which are captured once if they are kept, of some parameters as rows of J."""
        q = self.layout.rows_per_example
        one = sum(
            rows_cost(c.num_params, self.itemsize, q=q, k=columns)
            if name in as_rows
            else contraction_cost(*_sizes(c, self.itemsize), q=q, k=columns)
            for name, c in self.coverage.costs.items()
        )
        one += sum(self._positions_once(self.coverage.costs[name]) for name in as_rows) / max(calls, 1)
        # Each formula is for both halves of a product: one over the examples of each side.
        work = self.layout.passes * one * sum(self.num_examples) / 2
        seconds = calls * work / (_SHARE_OF_RATE["factors"] * self.rates.flops) + self._rest(columns, calls)
        return seconds + self.capture() * (1 if is_kept else 2 * calls)

    def gram(self) -> float:
        """Writing K down, from factors that are captured for it."""
        return self.tiles() + self.capture()

    def tiles(self) -> float:
        """Writing K down, from factors that are there."""
        q, (n1, n2) = self.layout.rows_per_example, self.num_examples
        half = 0.5 if self.is_symmetric else 1.0
        flops = moved = 0.0
        for c in self._covered:
            S, o, i = _sizes(c, self.itemsize)[:3]
            if S == 1 and i > 1:
                flops += half * 2.0 * n1 * n2 * (i + q * q * o)
                moved += half * 3.0 * n1 * n2 * q * q * self.itemsize
            else:
                flops += 2.0 * (n1 + n2) * S * q * min(o * i, c.num_matched)
                flops += half * 2.0 * n1 * n2 * q * q * c.num_matched
        uncovered = self.num_params - sum(c.num_params for c in self._covered)
        flops += half * 2.0 * n1 * n2 * q * q * uncovered
        seconds = flops / (_SHARE_OF_RATE["gram"] * self.rates.flops) + moved / self.rates.bytes
        if self.coverage.uncovered.keys() - self.coverage.by_rows:
            examples = n1 if self.is_symmetric else n1 + n2
            seconds += examples * (1 + 2 * q) * self._seconds_alone
        return self.layout.passes * seconds

    def columns(self, product: float, *, written: int) -> ColumnCosts:
        """What columns of K take that are written down, some at a time and each of another example.

        Args:
            product: Seconds of a column in a product.
            written: How many at a time. The factors of all rows are taken to be there.
        """
        n = self.num_examples[0]
        rows_and_columns = replace(self, num_examples=(n, written), is_symmetric=False)
        own = replace(self, num_examples=(written, written), is_symmetric=True)
        seconds = min(rows_and_columns.tiles(), rows_and_columns.products(written)) + own.capture()
        return ColumnCosts(
            seconds / written / product, 1 / (self.rates.flops * product), n * self.layout.rows_per_example
        )

    def kept_products(self, columns: int, calls: int = 1) -> float:
        """Products with a K that is there: by its operations or by reading it, whichever takes longer."""
        n1, n2 = (n * self.layout.rows_per_example for n in self.num_examples)
        return calls * max(2.0 * n1 * n2 * columns / self.rates.flops, n1 * n2 * self.itemsize / self.rates.bytes)

    def _positions_once(self, cost: LayerCost) -> float:
        """Operations that turn the factors of one example into rows."""
        return 2.0 * cost.num_positions * self.layout.rows_per_example * cost.num_params

    @property
    def _covered(self) -> list[LayerCost]:
        return list(self.coverage.costs.values())

    @property
    def _forward(self) -> float:
        """Operations of a forward pass over one example, or as many as its time or what it saves is worth."""
        counted, times = self.preflight.forward_flops, self.preflight.times
        if times is not None:
            return max(counted, times.in_batch * _SHARE_OF_RATE["autodiff"] * self.rates.flops)
        return max(counted, 2.0 * self.num_params, _FLOPS_PER_BYTE * self.preflight.activation_bytes)

    @property
    def _seconds_alone(self) -> float:
        """A forward pass over one example by itself."""
        times = self.preflight.times
        counted = self._forward / (_SHARE_OF_RATE["single examples"] * self.rates.flops)
        return counted if times is None else times.alone

    def _rest(self, columns: int, calls: int) -> float:
        """Automatic differentiation for the parameters without factors: its passes go through all layers."""
        return self.autodiff(columns, calls) if self.coverage.uncovered.keys() - self.coverage.by_rows else 0.0


def passes_of_product(layout: OutputLayout, num_examples: int, num_columns: int) -> float:
    """Time of a product by automatic differentiation, in forward passes over one example."""
    return (1 + 2.0 * num_columns * layout.passes) * num_examples / _SHARE_OF_RATE["autodiff"]


def tiles_of_rows(layout: OutputLayout, num_examples1: int, num_examples2: int, *, repeats: int) -> float:
    """The same of K from rows of J, those of the second examples made so many times.

    A forward pass takes two operations for each parameter, and so does an entry of K.
    """
    q = layout.rows_per_example
    rows = (1 + 2.0 * q * layout.passes) * (num_examples1 + repeats * num_examples2) / _SHARE_OF_RATE["single examples"]
    return rows + layout.passes * num_examples1 * num_examples2 * q * q / _SHARE_OF_RATE["gram"]


def _sizes(cost: LayerCost, itemsize: int) -> tuple[int, int, int, int]:
    """``S, o, i`` and the size of a number."""
    return cost.num_positions, cost.num_outputs, max(1, cost.num_params // cost.num_outputs), itemsize
