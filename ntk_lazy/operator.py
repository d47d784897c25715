"""K = J1 J2ᵀ as a linear_operator: products, indices, diagonals and gradients, and never a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod, sqrt
from typing import Any, Self, cast, final

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from typing_extensions import override

from ntk_lazy.bilinear import X1, X2, BilinearGradient
from ntk_lazy.engines.contract import Engine, Preflight
from ntk_lazy.entries import dense, entries
from ntk_lazy.errors import ArgumentError, BudgetError, ShapeError
from ntk_lazy.functions import Dense, Entries
from ntk_lazy.model import FunctionalModel, ModelCall
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.plan import EngineSettings, Plan
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block, ParameterBlock, SmallMatrix
from ntk_lazy.side import Side

_PARAM, _CONSTANT, _BUFFER = "p.", "c.", "b."
_ENGINE_NAMES = {"x1": X1, "x2": X2}


@final
class NTKLinearOperator(LinearOperator):
    """The empirical neural tangent kernel, lazily; made by ``ntk_lazy.ntk``.

    ``K = s J1 J2ᵀ`` with J the Jacobian of the model's outputs in its chosen parameters. Row ``i*C + c`` belongs
    to example i and output c. Square (``x2`` is None) or rectangular, batched over leading dimensions of the inputs.

    Every tensor is a part of the operator's representation, each parameter by its name, so that gradients reach the
    parameters and the inputs, and ``to``, ``detach`` and pickling work; the module itself is held by a wrapper that
    no conversion can reach. Nothing is cached: after an optimiser step the same operator is the new kernel.

    Cost: a product with k columns is two sweeps over the examples, see ``explain()``.
    """

    def __init__(  # noqa: PLR0913  (linear_operator builds it anew from exactly these)
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        *,
        call: ModelCall,
        layout: OutputLayout,
        preflight: Preflight,
        settings: EngineSettings,
        example_dims: int,
        rows1: Tensor | None = None,
        rows2: Tensor | None = None,
        scale: Tensor | None = None,
        **tensors: Tensor,
    ) -> None:
        shared = {"call": call, "layout": layout, "preflight": preflight, "settings": settings}
        optional = {"rows1": rows1, "rows2": rows2, "scale": scale}
        inputs = (x1,) if x2 is None else (x1, x2)
        super().__init__(*inputs, **shared, **optional, example_dims=example_dims, **tensors)
        self._call, self._layout, self._preflight, self._settings = call, layout, preflight, settings
        self._scale = scale
        self._side1 = Side(x1, rows1, example_dims, layout.rows_per_example)
        self._side2 = self._side1 if x2 is None else Side(x2, rows2, example_dims, layout.rows_per_example)
        self._is_symmetric = x2 is None
        self._model = FunctionalModel(
            call=call,
            params={n.removeprefix(_PARAM): t for n, t in tensors.items() if n.startswith(_PARAM)},
            constants={
                n[2:]: t.detach() if n.startswith(_BUFFER) else t
                for n, t in tensors.items()
                if not n.startswith(_PARAM)
            },
            buffer_names=frozenset(n.removeprefix(_BUFFER) for n in tensors if n.startswith(_BUFFER)),
        )
        self._engine: Engine = settings.build(self._model, layout, preflight)

    @classmethod
    def of(
        cls,
        model: FunctionalModel,
        side1: Side,
        side2: Side | None,
        *,
        layout: OutputLayout,
        preflight: Preflight,
        settings: EngineSettings,
    ) -> Self:
        """Build the operator from the parts that ``ntk`` has checked; ``side2=None`` makes it square."""
        tensors = {_PARAM + n: t for n, t in model.params.items()}
        tensors |= {(_BUFFER if n in model.buffer_names else _CONSTANT) + n: t for n, t in model.constants.items()}
        return cls(
            *([side1.x] if side2 is None else [side1.x, side2.x]),
            call=model.call,
            layout=layout,
            preflight=preflight,
            settings=settings,
            example_dims=side1.example_dims,
            rows1=side1.selected,
            rows2=None if side2 is None else side2.selected,
            **tensors,
        )

    # What the operator is.

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self._model.device

    @property
    def num_examples(self) -> int:
        """N on the side of the rows."""
        return self._side1.num_examples

    @property
    def num_outputs(self) -> int:
        """C, outputs of the model for one example."""
        return self._layout.num_outputs

    @property
    def num_params(self) -> int:
        """P, entries of the parameters that make up J."""
        return self._model.num_params

    @property
    def num_features(self) -> int:
        """Columns of J: P, or C*P in trace mode."""
        return self._engine.num_features

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides are the same rows by construction."""
        return self._is_symmetric

    @property
    def rows(self) -> Rows:
        """The rows of a long vector that this process holds: all of them."""
        return Rows(self._side1.num_rows)

    def explain(self, num_columns: int = 1) -> Plan:
        """Say what a product with ``num_columns`` columns will do, before it runs.

        Returns:
            The plan: engine, chunks, predicted bytes and flops; ``print`` it.

        Raises:
            BudgetError: Not even one example and one column fit the memory budget.
        """
        N = max(self._side1.num_examples, self._side2.num_examples)
        chunks = self._engine.rule.fit(N, num_columns)  # type: ignore[attr-defined]
        lifted = num_columns * self._layout.passes
        return Plan(
            shape=tuple(self.shape),
            num_examples=self.num_examples,
            num_outputs=self.num_outputs,
            num_params=self.num_params,
            dtype=self.dtype,
            device=self.device,
            engine="autodiff",
            mode=self._preflight.mode,
            num_columns=num_columns,
            chunks=chunks,
            memory_budget=self._settings.memory_budget,
            predicted_bytes=chunks.bytes,
            predicted_flops=6.0 * (self._side1.num_examples + self._side2.num_examples) * self.num_params * lifted,
            dense_bytes=prod(self.shape) * self.dtype.itemsize,
            notes=self._preflight.notes,
        )

    # Beyond a matrix: the factors of K, and K at other points.

    def jacobian_matmul(self, W: ParameterBlock) -> Block:
        """Multiply flat parameter vectors with J of the rows: first-order changes of the outputs.

        Args:
            W: Shape ``(num_features, k)``: parameters in the model's order, flattened; C of them, one below the
                other, in trace mode.

        Returns:
            ``sqrt(s) J1 W``, shape ``(n, k)``.

        Cost: half a product.

        Raises:
            ShapeError: W does not have ``num_features`` rows, or the operator is batched.
        """
        self._refuse_batch("jacobian_matmul")
        if W.ndim != 2 or W.shape[0] != self.num_features:
            raise ShapeError(f"W has shape {tuple(W.shape)}; J has {self.num_features} columns: pass (features, k).")
        pushed = self._side1.gather(self._engine.push(self._side1.x, W.mT.contiguous()))
        return pushed * self._root_scale()

    def jacobian_rmatmul(self, V: Block) -> ParameterBlock:
        """Multiply with the transpose of J of the rows: ``sqrt(s) J1ᵀ V``, shape ``(num_features, k)``.

        Cost: half a product, and all ``num_features * k`` numbers at once.

        Raises:
            ShapeError: V does not have n rows, or the operator is batched.
        """
        self._refuse_batch("jacobian_rmatmul")
        self._check_rows(V, self._side1)
        return self._engine.pull(self._side1.x, self._side1.scatter(V)).mT * self._root_scale()

    def half_gram(self, V: Block) -> SmallMatrix:
        """Return ``VᵀKV`` from the half product, ``(J1ᵀV)ᵀ(J1ᵀV)``, accumulated in float64.

        Its eigenvalues are non-negative by construction, and relatively as accurate as the square root of what a
        product gives. Cost: half a product, more by one half for each time that ``num_features * k`` exceeds the budget.
        """
        self._refuse_batch("half_gram")
        if not self._is_symmetric:
            raise ShapeError("half_gram is defined for a square kernel of one set of rows.")
        self._check_rows(V, self._side1)
        return self._engine.half_gram(self._side1.x, self._side1.scatter(V)) * self._root_scale() ** 2

    def at(self, x1: Tensor, x2: Tensor | None = None) -> NTKLinearOperator:
        """The same kernel at other points: square at ``x1``, or between ``x1`` and ``x2``."""
        first = Side(x1, None, self._side1.example_dims, self._layout.rows_per_example)
        second = None if x2 is None else Side(x2, None, self._side1.example_dims, self._layout.rows_per_example)
        for side in (first, second):
            if side is not None and (side.x.ndim <= side.example_dims or not self._fits(side.x)):
                raise ShapeError(
                    f"points of shape {tuple(side.x.shape)} do not fit a kernel whose examples have shape "
                    f"{tuple(self._side1.x.shape[self._side1.axis + 1 :])}; put the number of examples in front."
                )
        return self._rebuild(first, second)

    # The contract of linear_operator.

    @override
    def _size(self) -> torch.Size:
        batch = torch.broadcast_shapes(self._side1.batch_shape, self._side2.batch_shape)
        return torch.Size((*batch, self._side1.num_rows, self._side2.num_rows))

    @override
    def _transpose_nonbatch(self) -> LinearOperator:
        return self if self._is_symmetric else self._rebuild(self._side2, self._side1)

    @override
    def _matmul(self, rhs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (rhs.requires_grad or self.requires_grad):
            return self.matmul(rhs)  # linear_operator's Function, which comes back here without a graph
        if rhs.ndim == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            batch = torch.broadcast_shapes(self.batch_shape, rhs.shape[:-2])
            if not self.batch_shape:
                # Batches of right-hand sides are more columns: one sweep over the network for all of them.
                columns = rhs.movedim(-2, 0).flatten(1)
                return self._product(self._side1, self._side2, columns).unflatten(1, (*batch, -1)).movedim(0, -2)
            rhs = rhs.expand(*batch, *rhs.shape[-2:])
            result = rhs.new_empty(*batch, self.shape[-2], rhs.shape[-1])
            for index, side1, side2 in self._members(batch):
                result[index] = self._product(side1, side2, rhs[index])
            return result

    @override
    def _diagonal(self) -> Tensor:
        every = (torch.arange(size, device=self.device) for size in (*self.batch_shape, self.shape[-1]))
        *batch, rows = torch.meshgrid(*every, indexing="ij")
        return self._get_indices(rows, rows, *batch)

    @override
    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        index = tuple(torch.broadcast_tensors(*batch_indices, row_index, col_index))
        return cast(Tensor, Entries.apply(self.representation_tree(), index, *self.representation()))

    def read_entries(self, *index: Tensor) -> Tensor:
        """Compute entries at index tensors ``(*batch, row, column)`` of one shape, in the caller's grad mode."""
        *batch, rows, cols = (i.reshape(-1) for i in index)
        found = torch.empty(0, dtype=self.dtype, device=self.device)
        places = rows.new_empty(0)
        for member, side1, side2 in self._members(self.batch_shape):
            # Without batch dimensions there is nothing to compare, and every entry is wanted.
            wanted = torch.ones_like(rows, dtype=torch.bool)
            for position, where in zip(member, batch, strict=True):
                wanted &= where == position
            if wanted.any():
                part = entries(self._engine, side1, side2, rows[wanted], cols[wanted])
                found, places = torch.cat([found, part]), torch.cat([places, wanted.nonzero().squeeze(1)])
        return self._scaled(found[places.argsort()].reshape(index[0].shape))

    def entry_chunks(self, count: int) -> list[slice]:
        """Divide entries into chunks whose rows of J fit the budget."""
        return self._engine.row_chunks(count)

    @override
    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        side1, side2 = self._side1, self._side2
        symmetric = self._is_symmetric and _is_same_index(row_index, col_index)
        if batch_indices:
            side1, side2 = side1.expand(self.batch_shape), side2.expand(self.batch_shape)
            side1, side2 = (side.with_x(side.x[tuple(batch_indices)]) for side in (side1, side2))
        side1 = side1 if _is_everything(row_index) else side1.select(row_index)
        side2 = side2 if _is_everything(col_index) else side2.select(col_index)
        return self._rebuild(side1, None if symmetric or side1.is_same(side2) else side2)

    @override
    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._on_batches(lambda x: x.unsqueeze(dim))

    @override
    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._on_batches(lambda x: x.permute(*dims, *range(len(dims), x.ndim)))

    @override
    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        scale = torch.as_tensor(other, dtype=self.dtype, device=self.device)
        if scale.ndim:
            return super()._mul_constant(other)
        return self._rebuild(
            self._side1,
            None if self._is_symmetric else self._side2,
            scale=scale * (1 if self._scale is None else self._scale),
        )

    @override
    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        names = [*("x1", "x2")[: len(self._args)], *self._differentiable_kwargs]
        asked = {n for n, t in zip(names, self.representation(), strict=True) if t.requires_grad and n[:2] != _BUFFER}
        if not asked:
            return (None,) * len(names)
        if left_vecs.ndim == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        batch = torch.broadcast_shapes(self.batch_shape, left_vecs.shape[:-2], right_vecs.shape[:-2])
        left_vecs, right_vecs = (v.expand(*batch, *v.shape[-2:]) for v in (left_vecs, right_vecs))
        if not self.batch_shape:
            left_vecs, right_vecs = (v.movedim(-2, 0).flatten(1) for v in (left_vecs, right_vecs))
            batch = torch.Size()
        own = batch[len(batch) - len(self.batch_shape) :]
        sides = (self._side1.expand(own), self._side2.expand(own))
        wrt = {_ENGINE_NAMES.get(n, n[2:]) for n in asked - {"scale"}} | (
            {X2} if self._is_symmetric and "x1" in asked else set()
        )
        total = BilinearGradient(sides)
        for index, side1, side2 in self._members(batch):
            U, V = side1.scatter(left_vecs[index]), side2.scatter(right_vecs[index])
            total.add(index[len(batch) - len(own) :], *self._engine.bilinear_gradient(side1.x, side2.x, U, V, wrt=wrt))
        by_name: dict[str, Tensor | None] = {n: total.by_name.get(_ENGINE_NAMES.get(n, n[2:])) for n in asked}
        for name, side in (("x1", self._side1), ("x2", self._side2)):
            if by_name.get(name) is not None:
                by_name[name] = cast(Tensor, by_name[name]).sum_to_size(side.x.shape)
        if self._is_symmetric and "x1" in asked and X2 in total.by_name:
            other = total.by_name[X2].sum_to_size(self._side1.x.shape)
            by_name["x1"] = other if by_name["x1"] is None else by_name["x1"] + other
        scaled = {n: None if g is None else self._scaled(g).detach() for n, g in by_name.items()}
        return tuple((total.value if n == "scale" else scaled[n]) if n in asked else None for n in names)

    @override
    def to_dense(self, *, max_dense_bytes: int | None = None) -> Tensor:  # type: ignore[override]
        """Write K down, from tiles of rows of J.

        Args:
            max_dense_bytes: Refuse a larger K; None means what was given to ``ntk``, by default its memory budget.

        Returns:
            Shape ``(*batch, n1, n2)``, differentiable; nothing is kept for the backward pass.

        Cost: ``2 n1 n2 P`` flops, half of that for a symmetric K, and the rows of J once for each tile.

        Raises:
            BudgetError: K would be larger than allowed.
        """
        limit = self._settings.max_dense_bytes if max_dense_bytes is None else max_dense_bytes
        size = prod(self.shape) * self.dtype.itemsize
        if size > limit:
            raise BudgetError(
                f"K is {' x '.join(map(str, self.shape))} and would take {size:,} bytes written down; {limit:,} are allowed. "
                "Use products (K @ V), eigsh or K[rows, cols]; or raise max_dense_bytes if you must have it.",
                requested_bytes=size,
                available_bytes=limit,
            )
        return cast(Tensor, Dense.apply(self.representation_tree(), *self.representation()))

    def write_down(self) -> Tensor:
        """Compute all of K, in the caller's grad mode and without asking for its size."""
        members = [
            dense(self._engine, side1, side2, is_symmetric=self._is_symmetric)
            for _, side1, side2 in self._members(self.batch_shape)
        ]
        return self._scaled(torch.stack(members).reshape(self.shape))

    @override
    def type(self, dtype: torch.dtype) -> LinearOperator:
        return self._map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)

    @override
    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        example = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._map_tensors(
            lambda t: t.to(example.device, example.dtype) if t.is_floating_point() else t.to(example.device)
        )

    # Inside.

    def _members(self, batch: torch.Size) -> Iterator[tuple[tuple[int, ...], Side, Side]]:
        """Go through the kernels of a batch: the index of each, and its two sides."""
        own = batch[len(batch) - len(self.batch_shape) :]
        side1, side2 = self._side1.expand(own), self._side2.expand(own)
        for index in product(*(range(size) for size in batch)):
            inner = index[len(batch) - len(own) :]
            first = side1.with_x(side1.x[inner])
            yield index, first, first if self._is_symmetric else side2.with_x(side2.x[inner])

    def _product(self, side1: Side, side2: Side, V: Block) -> Block:
        self._check_rows(V, side2)
        return self._scaled(side1.gather(self._engine.product(side1.x, side2.x, side2.scatter(V))))

    def _rebuild(self, side1: Side, side2: Side | None, *, scale: Tensor | None = None) -> NTKLinearOperator:
        kwargs = dict(self._kwargs)
        kwargs |= {"rows1": side1.selected, "rows2": None if side2 is None else side2.selected}
        kwargs["scale"] = self._scale if scale is None else scale
        return self.__class__(*([side1.x] if side2 is None else [side1.x, side2.x]), **kwargs)

    def _on_batches(self, change: Callable[[Tensor], Tensor]) -> NTKLinearOperator:
        sides = [side.with_x(change(side.expand(self.batch_shape).x)) for side in (self._side1, self._side2)]
        return self._rebuild(sides[0], None if self._is_symmetric else sides[1])

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> NTKLinearOperator:
        kwargs = {n: change(v) if isinstance(v, Tensor) else v for n, v in self._kwargs.items()}
        return self.__class__(*(change(x) for x in self._args), **kwargs)

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self._scale is None else values * self._scale

    def _root_scale(self) -> float:
        scale = 1.0 if self._scale is None else float(self._scale)
        if scale < 0:
            raise ArgumentError(f"K is scaled by {scale}, so that it is not J Jᵀ of any real J.")
        return sqrt(scale)

    def _fits(self, x: Tensor) -> bool:
        return x.shape[x.ndim - self._side1.example_dims :] == self._side1.x.shape[self._side1.axis + 1 :]

    def _refuse_batch(self, what: str) -> None:
        if self.batch_shape:
            raise ShapeError(f"{what} serves one kernel; this is a batch of shape {tuple(self.batch_shape)}: index it.")

    def _check_rows(self, V: Tensor, side: Side) -> None:
        if V.ndim != 2 or V.shape[0] != side.num_rows:
            raise ShapeError(
                f"a block of shape {tuple(V.shape)} meets {side.num_rows} rows; pass ({side.num_rows}, k)."
            )
        if V.dtype != self.dtype or V.device != self.device:
            raise ShapeError(
                f"a {V.dtype} block on {V.device} meets a {self.dtype} kernel on {self.device}; convert it."
            )


def _is_everything(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _is_same_index(left: Any, right: Any) -> bool:
    if isinstance(left, slice) or isinstance(right, slice):
        return isinstance(left, slice) and isinstance(right, slice) and left == right
    return left is right or (left.shape == right.shape and bool((left == right).all()))
