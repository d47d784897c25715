"""What an engine promises, and what it is told about a model before it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ntk_lazy.engines.chunks import Chunks, slices
from ntk_lazy.engines.coverage import Coverage
from ntk_lazy.engines.derivatives import Derivatives
from ntk_lazy.engines.flat import FlatLayout, squared_norms
from ntk_lazy.errors import BudgetError, UnsupportedModuleError
from ntk_lazy.gemm import times_transposed
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.precision import ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix
from ntk_lazy.solves import ColumnCosts

# Names of the inputs among the names of parameters; no parameter of a module can be called so.
X1, X2 = "<x1>", "<x2>"

OtherBlock: TypeAlias = Float[Tensor, "n2 k"]
ColumnsFirst: TypeAlias = Float[Tensor, "columns features"]
GramMatrix: TypeAlias = Float[Tensor, "n1 n2"]
ExampleRows: TypeAlias = Float[Tensor, "examples rows features"]
RowIndex: TypeAlias = Int64[Tensor, " entries"]  # rows of all outputs of all examples
Entries: TypeAlias = Float[Tensor, " entries"]

_BLOCK_SHARE = 0.25  # of the budget: parameter vectors whose norms are wanted
_STRIP_SHARE = 0.0625  # of the budget: entries of K that are written down beside those that are wanted
_SECONDS_TO_FIND_OUT = 1.0  # how a model differentiates: loads parts of torch, and takes a dozen passes


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a forward pass over one example, as a share of what was timed: passes of which it is a known part.

    Attributes:
        in_batch: In products, among others.
        alone: In a gradient of this example by itself.
    """

    in_batch: float
    alone: float


@dataclass(frozen=True)
class Preflight:
    """What a check on a few examples found out about a model.

    Attributes:
        find_derivatives: Finds out what automatic differentiation can do.
        find_second_fault: Finds out why the model cannot be differentiated twice; "" where it can.
        num_outputs: C, outputs of one example with all trailing dimensions flattened.
        writes_buffers: Whether the forward pass changes a buffer, so that each call needs its own copies.
        forward_flops: Operations of a forward pass over one example, as far as they can be counted.
        times: What was timed instead; None where operations can be counted or all parameters have factors.
        activation_bytes: Saved for the backward pass of one example, parameters excluded.
        coverage: For which parameters J can be had as factors.
        draws_numbers: Whether it draws random numbers, which must not move the user's generator.
        is_widened: Whether casts to half precision inside of it are left out.
        remarks: What is worth knowing of the precision that it computes in.
    """

    find_derivatives: Callable[[], Derivatives]
    find_second_fault: Callable[[], str]
    num_outputs: int
    writes_buffers: bool
    forward_flops: float
    activation_bytes: int
    coverage: Coverage
    draws_numbers: bool = False
    times: PassTimes | None = None
    is_widened: bool = False
    remarks: tuple[str, ...] = ()

    @cached_property
    def derivatives(self) -> Derivatives:
        """What automatic differentiation can do; found out once, at the parameters of that time."""
        return self.find_derivatives()

    @cached_property
    def _second_fault(self) -> str:
        return self.find_second_fault()

    def require_second_derivatives(self) -> None:
        """Refuse the gradient of a kernel of a model whose own gradients have none; found out once.

        Raises:
            UnsupportedModuleError: The gradient would lack a part.
        """
        if self._second_fault:
            raise UnsupportedModuleError(
                "the gradient of this kernel needs second derivatives of the model, which it does not have "
                f"({self._second_fault}). Give custom operations a backward pass that is differentiable itself; or "
                "ask for no gradient of K: torch.no_grad(), or requires_grad_(False) on parameters and inputs."
            )

    @property
    def knows_derivatives(self) -> bool:
        """Whether that was found out already: by the check itself, where some parameters have no factors."""
        return bool(self.coverage.uncovered) or "derivatives" in vars(self)

    def pays_to_differentiate(self, seconds: float) -> bool:
        """Whether so many seconds, which automatic differentiation would save at its best, are worth a look at it.

        What was not worth it before counts too, so that many short products come to what a long one does.
        """
        if seconds <= 0 or self.knows_derivatives:
            return seconds > 0
        missed = vars(self).get("_missed", 0.0) + seconds
        vars(self)["_missed"] = missed  # kept as a cached property is: no part of the value
        return missed > _SECONDS_TO_FIND_OUT


class Engine(ABC):
    """Multiply with J and Jᵀ of one model on examples, all outputs of all examples, in the rows of a layout.

    Features are the columns of J: ``passes * P`` of them. Blocks of features have the columns first, so that
    each is one contiguous flat parameter vector (``passes`` of them in trace mode). Nothing here builds a graph
    except ``pull_with_graph``, ``rows`` and ``entries``.

    Attributes:
        model: The model.
        layout: Its rows of J.
        budget: Bytes that may be held beside operands and result.
    """

    def __init__(self, model: FunctionalModel, layout: OutputLayout, budget: int) -> None:
        self.model = model
        self.layout = layout
        self.budget = budget

    @property
    def num_features(self) -> int:
        """Columns of J."""
        return self.layout.passes * self.model.num_params

    @abstractmethod
    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Keep, within the context, what products have in common; parameters and inputs must not change in it.

        Args:
            num_columns: Columns that are expected, in all products together.
        """

    def aside(self, num_columns: int) -> AbstractContextManager[None]:
        """The same for work of another kind, which does not decide how a series goes on that has not begun."""
        return self.linearised(num_columns)

    @abstractmethod
    def pull(self, x: Tensor, V: Block) -> ColumnsFirst:
        """Return ``(Jᵀ V)ᵀ``, shape ``(k, features)``."""

    @abstractmethod
    def pull_with_graph(self, x: Tensor, V: Block) -> ColumnsFirst:
        """Return ``(Jᵀ V)ᵀ`` as a differentiable function of parameters, examples and V.

        Cost: the graph of all examples and columns at once, whatever the budget.
        """

    @abstractmethod
    def push(self, x: Tensor, W: ColumnsFirst) -> Block:
        """Return ``J Wᵀ``, shape ``(rows, k)``."""

    @abstractmethod
    def product(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        """Return ``J1 J2ᵀ V`` without holding features for more columns than the budget allows."""

    def product_afresh(self, x1: Tensor, x2: Tensor, V: OtherBlock) -> Block:
        """The same from J alone, also where K is kept: what a product with rounded entries is checked with."""
        return self.product(x1, x2, V)

    @abstractmethod
    def half_gram(self, x: Tensor, V: Block) -> SmallMatrix:
        """Return ``(Jᵀ V)ᵀ (Jᵀ V)`` in float64 on the CPU."""

    def energies(self, x: Tensor, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        """Return ``‖J_pᵀ v‖²`` for each parameter p and column v, on the CPU.

        Cost: half a product; a quarter of the budget holds parameter vectors, one at least.
        """
        k, flat = V.shape[1], FlatLayout.of(self.model.params)
        found = {name: torch.zeros(k, dtype=torch.float64) for name in flat.shapes}
        # Twice: while it is made, a block is added up from those of chunks.
        one = 2 * self.num_features * self.model.dtype.itemsize
        for columns in slices(k, max(1, int(_BLOCK_SHARE * self.budget) // max(1, one))):
            W = self.pull(x, V[:, columns]).unflatten(1, (self.layout.passes, -1))
            for name, place in flat.slices().items():
                found[name][columns] = squared_norms(W[..., place])
            del W
        return found

    @abstractmethod
    def rows(self, x: Tensor) -> ExampleRows:
        """Return the rows of J of these examples, all at once; follows the caller's grad mode."""

    def gram(self, x1: Tensor, x2: Tensor, out: GramMatrix) -> None:
        """Write ``J1 J2ᵀ`` into ``out``, tile by tile; of a symmetric one half is computed. Builds no graph.

        Args:
            x1: Examples of the rows.
            x2: Examples of the columns; ``x1`` itself makes it symmetric.
            out: Shape ``(rows of x1, rows of x2)``; overwritten.

        Cost: ``2 n1 n2 P`` flops, half of that for a symmetric K, and the rows of J once for each tile.
        """
        r = self.layout.rows_per_example
        with torch.no_grad(), ieee_precision():
            for i in self.row_chunks(x1.shape[0]):
                left = self.rows(x1[i]).reshape(-1, self.num_features)
                tall = slice(i.start * r, i.stop * r)
                for j in self.row_chunks(x2.shape[0]):
                    wide = slice(j.start * r, j.stop * r)
                    if x1 is x2 and j.start < i.start:
                        out[tall, wide] = out[wide, tall].mT
                        continue
                    right = left if x1 is x2 and i == j else self.rows(x2[j]).reshape(-1, self.num_features)
                    out[tall, wide] = times_transposed(left, right)

    def columns(self, x1: Tensor, x2: Tensor, which: RowIndex) -> GramMatrix:
        """Write down some columns of ``J1 J2ᵀ``, shape ``(rows of x1, columns)``. Builds no graph.

        Args:
            x1: Examples of the rows.
            x2: Examples of the columns: those that the wanted ones belong to.
            which: Rows of ``x2`` that are the columns, among all its outputs.

        Cost: that of ``gram`` on these examples, or of a product with unit vectors, whichever is less.
        """
        r, num_rows = self.layout.rows_per_example, x1.shape[0] * self.layout.rows_per_example
        out = torch.empty(num_rows, which.shape[0], dtype=self.model.dtype, device=self.model.device)
        strip_bytes = int(_STRIP_SHARE * self.budget) // out.itemsize
        if self._prefers_tiles(x1.shape[0], x2.shape[0], which.shape[0]):
            for strip in slices(x1.shape[0], max(1, strip_bytes // max(1, r * r * x2.shape[0]))):
                tile = out.new_empty((strip.stop - strip.start) * r, x2.shape[0] * r)
                self.gram(x1 if tile.shape[0] == num_rows else x1[strip], x2, tile)
                out[strip.start * r : strip.stop * r] = tile[:, which]
            return out
        for columns in slices(which.shape[0], max(1, strip_bytes // max(1, num_rows + r * x2.shape[0]))):
            units = out.new_zeros(x2.shape[0] * r, columns.stop - columns.start)
            units[which[columns], torch.arange(units.shape[1], device=units.device)] = 1
            if units.shape[1] == which.shape[0]:
                return self.product(x1, x2, units)
            out[:, columns] = self.product(x1, x2, units)
        return out

    def column_costs(self, num_examples: int, *, written: int, multiplied: int, calls: int) -> ColumnCosts:
        """Predict what columns of a square K take, and operations with them, beside products.

        Args:
            num_examples: N.
            written: Columns that are written down at a time, each of another example.
            multiplied: Columns of a product.
            calls: Products in a series.
        """
        return ColumnCosts()

    def entries(self, x1: Tensor, x2: Tensor, rows1: RowIndex, rows2: RowIndex) -> Entries:
        """Read ``(J1 J2ᵀ)[rows1, rows2]`` pair by pair; follows the caller's grad mode.

        Cost: the rows of J of both examples of each pair, in chunks; those of one example only where both are the same.
        """
        r = self.layout.rows_per_example
        examples1, examples2 = rows1 // r, rows2 // r
        is_same = x1 is x2 and torch.equal(examples1, examples2)
        # Pairs that share both examples share the rows of J: sorted, they fall into one chunk.
        pairs, place = torch.stack([examples1, examples2]).unique(dim=1, return_inverse=True)
        found = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        places = rows1.new_empty(0)
        for chunk in self.row_chunks(pairs.shape[1]):
            left = self.rows(x1[pairs[0, chunk]])
            right = left if is_same else self.rows(x2[pairs[1, chunk]])
            wanted = ((place >= chunk.start) & (place < chunk.stop)).nonzero().squeeze(1)
            local = place[wanted] - chunk.start
            if is_same and r == 1:
                part = left.square().sum((1, 2))[local]
            else:
                part = _inner(left, right, local, rows1[wanted] % r, rows2[wanted] % r)
            found, places = torch.cat([found, part]), torch.cat([places, wanted])
        return found[places.argsort()]

    @abstractmethod
    def _prefers_tiles(self, num_examples1: int, num_examples2: int, num_columns: int) -> bool:
        """Whether ``gram`` is cheaper than a product with so many columns."""

    @abstractmethod
    def chunks(self, num_examples: int, num_columns: int) -> Chunks:
        """Say in which chunks a product would go through examples and columns.

        Raises:
            BudgetError: Not even one example and one column fit the budget.
        """

    @abstractmethod
    def row_chunks(self, num_examples: int) -> list[slice]:
        """Divide examples into chunks whose rows of J fit the budget."""

    @abstractmethod
    def shortage_of_tiles(self, num_examples: int) -> BudgetError | None:
        """Tell what is missing for ``gram``, with a number that is enough, if anything is."""

    @abstractmethod
    def tile_chunks(self, num_examples: int) -> Chunks:
        """Say how many examples ``gram`` sends through the model at once, and what it holds beside K."""

    @abstractmethod
    def bilinear_gradient(
        self, x1: Tensor, x2: Tensor, U: Block, V: OtherBlock, *, wrt: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate ``q = sum_d u_dᵀ J1 J2ᵀ v_d``.

        Args:
            x1: Examples of the rows.
            x2: Examples of the columns.
            U: Shape ``(rows of x1, d)``.
            V: Shape ``(rows of x2, d)``.
            wrt: Names of parameters and constants, and ``X1`` and ``X2`` for the inputs.

        Returns:
            q itself, and the gradient for each name (absent where q does not depend on it).
        """

    @abstractmethod
    def rows_gradient(self, x1: Tensor, x2: Tensor, G: GramMatrix, *, wrt: set[str]) -> dict[str, Tensor]:
        """Differentiate ``⟨J1, G J2⟩`` with J2 held fixed: half of the gradient of ``⟨G, J1 J2ᵀ⟩``.

        Args:
            x1: Examples of the rows.
            x2: Examples of the columns.
            G: Shape ``(rows of x1, rows of x2)``.
            wrt: Names of parameters and constants, and ``X1`` for the inputs.

        Returns:
            The gradient for each name (absent where there is none).

        Cost: ``2 n1 n2 P`` flops, the rows of J2 once for each chunk of J1, and a second derivative of each row of J1,
            where ``bilinear_gradient`` with the columns of G takes second derivatives of n2 columns.
        """


def _inner(left: ExampleRows, right: ExampleRows, example: Tensor, output1: Tensor, output2: Tensor) -> Entries:
    """Take inner products of chosen rows, all outputs against all where that is not more work."""
    if example.numel() >= left.shape[0] * left.shape[1]:
        return torch.einsum("erf,esf->ers", left, right)[example, output1, output2]
    return (left[example, output1] * right[example, output2]).sum(-1)
