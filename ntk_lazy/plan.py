"""Which engine multiplies, in which chunks, and what that will hold in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import Chunks
from ntk_lazy.engines.contract import Preflight
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

    def build(self, model: FunctionalModel, layout: OutputLayout, preflight: Preflight) -> AutodiffEngine:
        """Build the engine for a model that has passed its preflight."""
        return AutodiffEngine(model, layout, preflight=preflight, budget=self.memory_budget, chunk_size=self.chunk_size)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a product with ``num_columns`` columns will do; printing it explains it.

    Attributes:
        shape: Shape of K.
        num_examples: N on the side of the rows.
        num_outputs: C.
        num_params: P.
        dtype: Of K.
        device: Of K.
        engine: The engine that multiplies.
        mode: How it multiplies with J.
        num_columns: Columns that the plan is for.
        chunks: Examples and columns at once, and the bytes that they hold.
        memory_budget: Bytes allowed.
        predicted_bytes: Held beside operands and result.
        predicted_flops: About ``12 N P k`` for dense layers; a lower bound where parameters are shared.
        dense_bytes: What K would take if it were written down.
        notes: What the preflight found.
    """

    shape: tuple[int, ...]
    num_examples: int
    num_outputs: int
    num_params: int
    dtype: torch.dtype
    device: torch.device
    engine: str
    mode: str
    num_columns: int
    chunks: Chunks
    memory_budget: int
    predicted_bytes: int
    predicted_flops: float
    dense_bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        shape = " x ".join(f"{size:,}" for size in self.shape)
        lines = [
            f"NTK {shape}, {self.dtype}, on {self.device}",
            f"  examples N = {self.num_examples:,}, outputs C = {self.num_outputs}, parameters P = {self.num_params:,}",
            f"  engine     {self.engine} ({self.mode})",
            f"  chunks     {self.chunks.examples:,} examples x {self.chunks.columns:,} of {self.num_columns:,} columns",
            f"  memory     {_size(self.predicted_bytes)} predicted, {_size(self.memory_budget)} allowed; "
            f"K written down would take {_size(self.dense_bytes)}",
            f"  work       about {self.predicted_flops:.2g} flop for {self.num_columns:,} columns",
        ]
        return "\n".join([*lines, *(f"  note       {note}" for note in self.notes)])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
