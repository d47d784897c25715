"""Which engine multiplies, in which chunks, and what that will hold in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, Self, TypeAlias, get_args

import torch

from ntk_lazy.engines.autodiff import AutodiffEngine
from ntk_lazy.engines.chunks import Chunks, Share
from ntk_lazy.engines.contract import Engine, Preflight
from ntk_lazy.engines.factors import FactorEngine
from ntk_lazy.engines.gram import GramEngine
from ntk_lazy.engines.kept_value import KeptValue
from ntk_lazy.engines.planned import Alternative, PlannedEngine, ranked
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.engines.weight_gram import WEIGHTS, weight_alternative
from ntk_lazy.errors import ArgumentError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.solves import PredictedSolve
from ntk_lazy.threads import exclusive

EngineName: TypeAlias = Literal["auto", "autodiff", "factors", "gram"]

_INDENT = " " * 11
_SHOWN = 5  # parameters without factors that an explanation names


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the user asked of the engine.

    Attributes:
        engine: ``"auto"`` or the name of one.
        memory_budget: Bytes that a product may hold beside its operands and its result.
        max_dense_bytes: The largest K that may be written down.
        chunk_size: Examples in a chunk, or None to derive it from the budget.
        scratch: Where what is kept goes that does not fit the budget, or None.
        root: That of the last preconditioner; here, because operators come and go and settings stay.
        pairs: That of the preconditioner from eigenpairs that the user gave.
        gram: The last Gram matrix of the columns of J.
        spectrum: The last one that was sampled for a plan.
    """

    engine: EngineName
    memory_budget: int
    max_dense_bytes: int
    chunk_size: int | None
    scratch: Scratch | None = None
    root: KeptValue = field(default_factory=KeptValue, compare=False, repr=False)
    pairs: KeptValue = field(default_factory=KeptValue, compare=False, repr=False)
    gram: KeptValue = field(default_factory=KeptValue, compare=False, repr=False)
    spectrum: KeptValue = field(default_factory=KeptValue, compare=False, repr=False)
    _running: list[Engine] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineName):
            raise ArgumentError(
                f"engine must be one of {', '.join(map(repr, get_args(EngineName)))}, not {self.engine!r}."
            )
        if self.max_dense_bytes < 0:
            raise ArgumentError(f"max_dense_bytes must not be negative, as {self.max_dense_bytes} is.")
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ArgumentError(f"chunk_size must be an int of at least 1, not {self.chunk_size!r}.")

    def build(self, model: FunctionalModel, layout: OutputLayout, preflight: Preflight) -> Engine:
        """Build the engine for a model that has passed its preflight, or find the one that is running for it."""
        for engine in tuple(self._running):
            if engine.layout == layout and engine.model.has_tensors_of(model):
                return engine
        budget, limit, size = self.memory_budget, self.max_dense_bytes, self.chunk_size
        if self.engine == "auto":
            return PlannedEngine(
                model,
                layout,
                preflight=preflight,
                budget=budget,
                max_dense_bytes=limit,
                chunk_size=size,
                scratch=self.scratch,
            )
        if self.engine == "autodiff":
            return AutodiffEngine(model, layout, preflight=preflight, budget=budget, chunk_size=size)
        if self.engine == "factors":
            return FactorEngine(
                model, layout, preflight=preflight, budget=budget, chunk_size=size, scratch=self.scratch
            )
        # One half of the budget for K, less than the other for what it is made of: allocators want their share.
        tiles = FactorEngine(
            model, layout, preflight=preflight, budget=Share.of(budget, 3, 8), chunk_size=size, scratch=self.scratch
        )
        return GramEngine(tiles, budget=Share.of(budget, 1, 2), max_dense_bytes=limit, scratch=self.scratch)

    @contextmanager
    def running(self, engine: Engine, num_columns: int) -> Iterator[None]:
        """Keep what products have in common, for every operator that is built on the same tensors meanwhile.

        linear_operator takes an operator apart and builds it anew for each product that autograd may ask about.
        """
        with ExitStack() as series:
            with exclusive():  # no product of another thread is under way
                series.enter_context(engine.linearised(num_columns))
                self._running.append(engine)
            try:
                yield
            finally:
                with exclusive():
                    self._running.remove(engine)
                    series.close()


@dataclass(frozen=True)
class Job:
    """What is planned for: products in a row, during which parameters stay as they are.

    Attributes:
        num_columns: Columns of each product.
        num_products: How many.
        eigenpairs: Pairs of the search that asks for them, or None.
        solve: The solve that asks for them, or None.
    """

    num_columns: int
    num_products: int
    eigenpairs: int | None = None
    solve: PredictedSolve | None = None

    @property
    def total_columns(self) -> int:
        """Columns of all products."""
        return self.num_columns * self.num_products

    def __str__(self) -> str:
        each = f"{_counted(self.num_columns, 'column')}{' each' if self.num_products > 1 else ''}"
        products = f"{_counted(self.num_products, 'product')} of {each}"
        if self.solve is not None:
            return self._solve_text(f"about {products}")
        if self.eigenpairs is not None:
            return f"eigsh(K, {self.eigenpairs}): about {products}"
        # What eigsh does by itself.
        within = f"within K.linearised({self.total_columns})"
        return f"{products}, {within}" if self.num_products > 1 else products

    def _solve_text(self, products: str) -> str:
        assert self.solve is not None
        asked = self.solve.job
        right = _counted(asked.right_hand_sides, "right-hand side")
        many = f", {asked.num_solves:,} times" if asked.num_solves > 1 else ""
        source = "columns of K" if self.solve.costs.is_written else "a product with random columns"
        made = f" and a preconditioner of rank {asked.rank:,} from {source}" if asked.rank else ""
        steps = f"{_counted(self.solve.iterations, 'iteration')} of conjugate gradients"
        return (
            f"(K + {asked.noise:g} I) X = B, {right}, rtol = {asked.rtol:g}{many}: {products}, "
            f"within K.linearised({self.total_columns})\n"
            f"{_INDENT}{steps}{made}; condition number about {_rounded(self.solve.condition)}, from a sample of rows"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will do and take; printing it explains it.

    Attributes:
        job: The products that the plan is for.
        shape: Shape of K.
        num_examples: N on the side of the rows and on that of the columns.
        layout: Which rows of K the outputs make.
        num_params: P.
        dtype: Of K.
        device: Of K.
        preflight: What the check of the model found.
        engine: The engine that multiplies.
        why: Why this one, in a line.
        alternatives: What each engine would take, the chosen one first; none where the user chose. For a solve also
            what ``"weights"`` would take: no products, but the Gram matrix of the columns of J.
        chunks: Examples and columns at once, and the bytes that they hold.
        memory_budget: Bytes allowed.
    """

    job: Job
    shape: tuple[int, ...]
    num_examples: tuple[int, int]
    layout: OutputLayout
    num_params: int
    dtype: torch.dtype
    device: torch.device
    preflight: Preflight
    engine: str
    why: str
    alternatives: tuple[Alternative, ...]
    chunks: Chunks
    memory_budget: int

    @classmethod
    def of(
        cls,
        engine: Engine,
        settings: EngineSettings,
        job: Job,
        *,
        shape: tuple[int, ...],
        num_examples: tuple[int, int],
        is_symmetric: bool,
        preflight: Preflight,
    ) -> Self:
        """Plan a job for an engine that was built."""
        name: str = settings.engine
        alternatives: tuple[Alternative, ...] = ()
        why = "chosen by you; engine='auto' ranks all of them"
        model = engine.model
        if isinstance(engine, PlannedEngine):
            alternatives = engine.alternatives(
                num_examples, is_symmetric=is_symmetric, columns=job.num_columns, calls=job.num_products
            )
            if job.solve is not None:
                column = alternatives[0].seconds / job.total_columns
                others = column * job.solve.other_columns
                alternatives = tuple(replace(way, seconds=way.seconds + others) for way in alternatives)
                by_weights = weight_alternative(engine, num_examples[0], shape[-1], job.solve)
                alternatives = ranked([*alternatives, *([] if by_weights is None else [by_weights])])
            why = _reason(alternatives, job, prod(shape[-2:]) * model.dtype.itemsize)
            name, engine = alternatives[0].engine, engine.choice(alternatives[0].engine)
        return cls(
            job=job,
            shape=shape,
            num_examples=num_examples,
            layout=engine.layout,
            num_params=model.num_params,
            dtype=model.dtype,
            device=model.device,
            preflight=preflight,
            engine=name,
            why=why,
            alternatives=alternatives,
            chunks=engine.chunks(max(num_examples), job.num_columns),
            memory_budget=settings.memory_budget,
        )

    @property
    def num_columns(self) -> int:
        """Columns of a product."""
        return self.job.num_columns

    @property
    def num_products(self) -> int:
        """Products in a row, of the same kernel."""
        return self.job.num_products

    @property
    def predicted_seconds(self) -> float | None:
        """Of the whole job; None where the user chose the engine."""
        return self.alternatives[0].seconds if self.alternatives else None

    @property
    def predicted_bytes(self) -> int:
        """Bytes held beside operands and result while a product runs, or a solve without products."""
        chosen = self.alternatives[0] if self.engine == WEIGHTS else None
        return self.chunks.bytes if chosen is None or chosen.num_bytes is None else chosen.num_bytes

    @property
    def predicted_flops(self) -> float:
        """Of one product: ``12 N P`` for each column and pass by automatic differentiation, ``4 N P`` by factors.

        Exact for dense layers, a lower bound where parameters are shared. With K kept, ``2 n1 n2``. Of solves by
        weights, all of them: ``n F² + F³ / 3`` with F columns of J.
        """
        if self.engine == WEIGHTS and self.job.solve is not None:
            F = float(self.num_params * self.layout.passes)
            return self.shape[-1] * F**2 + self.job.solve.job.num_solves * F**3 / 3
        if self.engine == "gram":
            return 2.0 * prod(self.shape) * self.num_columns
        return (
            (6.0 if self.engine == "autodiff" else 2.0)
            * sum(self.num_examples)
            * self.num_params
            * self.num_columns
            * self.layout.passes
        )

    @property
    def dense_bytes(self) -> int:
        """What K would take if it were written down."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        shape = " x ".join(f"{size:,}" for size in self.shape)
        examples = " and ".join(f"{n:,}" for n in dict.fromkeys(self.num_examples))
        columns = "1 column" if self.num_columns == 1 else f"{self.chunks.columns:,} of {self.num_columns:,} columns"
        lines = [
            f"NTK {shape}, {self.dtype}, on {self.device}",
            f"  rows     N = {examples} examples, C = {self.layout.num_outputs} outputs ({self.layout.mode!r}), "
            f"P = {self.num_params:,} parameters",
            f"  job      {self.job}",
            f"  engine   {self.engine}: {self.why}",
            *self._table(),
            f"  chunks   {self.chunks.examples:,} examples x {columns} at a time",
            f"  memory   {_size(self.predicted_bytes)} predicted, {_size(self.memory_budget)} allowed; "
            f"K written down would take {_size(self.dense_bytes)}",
            f"  work     about {self.predicted_flops:.2g} flop for "
            f"{'all of it' if self.engine == WEIGHTS else 'each product'}",
            *self._coverage_lines(),
        ]
        notes = (self.preflight.derivatives.note, *self.preflight.remarks)
        return "\n".join([*lines, *(f"  note     {note}" for note in notes if note)])

    def _table(self) -> list[str]:
        if not self.alternatives:
            return []
        lines = [f"  predict  {'engine':<8}  {'seconds':>9}  {'memory':>15}"]
        for way in self.alternatives:
            held = "over the budget" if way.num_bytes is None else _size(way.num_bytes)
            lines.append(f"{_INDENT}{way.engine:<8}  {_rounded(way.seconds):>9}  {held:>15}  {way.how}")
        return lines

    def _coverage_lines(self) -> list[str]:
        uncovered = list(self.preflight.coverage.uncovered.items())
        covered = sum(cost.num_params for cost in self.preflight.coverage.costs.values())
        lines = [
            f"  factors  for {covered:,} of {self.num_params:,} parameters; automatic differentiation is "
            f"{self.preflight.derivatives.mode}"
        ]
        lines += [f"{_INDENT}{name}: {reason}" for name, reason in uncovered[:_SHOWN]]
        if len(uncovered) > _SHOWN:
            lines.append(f"{_INDENT}and {len(uncovered) - _SHOWN} more parameters without factors")
        return lines


def _reason(alternatives: tuple[Alternative, ...], job: Job, dense_bytes: int) -> str:
    """Say why the first alternative was chosen: what it saves, and whether K is worth writing down."""
    best, *others = alternatives
    rivals = [way for way in others if way.num_bytes is not None]
    if rivals:
        lead = f"{rivals[0].seconds / best.seconds:.2g} times as fast as {rivals[0].engine}"
    else:
        lead = "the only one that fits the budget" if others else "the only one for this model"
    if best.engine == WEIGHTS:
        return f"{lead}, with no product but for checks; J has fewer columns than rows"
    columns, many = _counted(job.total_columns, "column"), job.total_columns > 1
    if best.engine == "gram":
        return f"{lead}; K fits ({_size(dense_bytes)}), and {columns} pay{'' if many else 's'} for writing it down"
    if not any(way.engine == "gram" for way in rivals):
        return f"{lead}; K ({_size(dense_bytes)}) is more than may be kept"
    return f"{lead}; {columns} {'do' if many else 'does'} not pay for writing K down ({_size(dense_bytes)})"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
