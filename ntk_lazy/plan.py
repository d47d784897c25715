"""Which engine multiplies, in which chunks, and what that will hold in memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import Chunks
from ntk_lazy.engines.contract import Engine, Preflight
from ntk_lazy.errors import ArgumentError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout

EngineName: TypeAlias = Literal["auto", "autodiff"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the user asked of the engine.

    Attributes:
        engine: ``"auto"`` or the name of one.
        memory_budget: Bytes that a product may hold beside its operands and its result.
        max_dense_bytes: The largest K that may be written down.
        chunk_size: Examples in a chunk, or None to derive it from the budget.
    """

    engine: EngineName
    memory_budget: int
    max_dense_bytes: int
    chunk_size: int | None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "autodiff"):
            raise ArgumentError(f"engine must be 'auto' or 'autodiff', not {self.engine!r}.")
        if self.max_dense_bytes < 0:
            raise ArgumentError(f"max_dense_bytes must not be negative, as {self.max_dense_bytes} is.")

    def build(self, model: FunctionalModel, layout: OutputLayout, preflight: Preflight) -> Engine:
        """Build the engine for a model that has passed its preflight."""
        return AutodiffEngine(model, layout, preflight=preflight, budget=self.memory_budget, chunk_size=self.chunk_size)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a product with ``num_columns`` columns will do; printing it explains it.

    Attributes:
        shape: Shape of K.
        num_examples: N on the side of the rows and on that of the columns.
        layout: Which rows of K the outputs make.
        num_params: P.
        dtype: Of K.
        device: Of K.
        preflight: What the check of the model found.
        num_columns: Columns that the plan is for.
        chunks: Examples and columns at once, and the bytes that they hold.
        memory_budget: Bytes allowed.
    """

    shape: tuple[int, ...]
    num_examples: tuple[int, int]
    layout: OutputLayout
    num_params: int
    dtype: torch.dtype
    device: torch.device
    preflight: Preflight
    num_columns: int
    chunks: Chunks
    memory_budget: int

    @property
    def engine(self) -> str:
        """The engine that multiplies."""
        return "autodiff"

    @property
    def predicted_bytes(self) -> int:
        """Bytes held beside operands and result while a product runs."""
        return self.chunks.bytes

    @property
    def predicted_flops(self) -> float:
        """``12 N P`` for each column and pass: exact for dense layers, a lower bound where parameters are shared."""
        return 6.0 * sum(self.num_examples) * self.num_params * self.num_columns * self.layout.passes

    @property
    def dense_bytes(self) -> int:
        """What K would take if it were written down."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        shape = " x ".join(f"{size:,}" for size in self.shape)
        examples = " and ".join(f"{n:,}" for n in dict.fromkeys(self.num_examples))
        lines = [
            f"NTK {shape}, {self.dtype}, on {self.device}",
            f"  rows     N = {examples} examples, C = {self.layout.num_outputs} outputs ({self.layout.mode!r}), "
            f"P = {self.num_params:,} parameters",
            f"  engine   {self.engine}, {self.preflight.mode}",
            f"  chunks   {self.chunks.examples:,} examples x {self.chunks.columns:,} of {self.num_columns:,} columns",
            f"  memory   {_size(self.predicted_bytes)} predicted, {_size(self.memory_budget)} allowed; "
            f"K written down would take {_size(self.dense_bytes)}",
            f"  work     about {self.predicted_flops:.2g} flop for {self.num_columns:,} columns",
        ]
        return "\n".join([*lines, *(f"  note     {note}" for note in self.preflight.notes)])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
