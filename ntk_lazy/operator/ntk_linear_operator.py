"""K = J1 J2ᵀ as a linear_operator: products, indices, diagonals and gradients, and never a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Self, cast, final

import numpy as np
import torch
from jaxtyping import Float64
from linear_operator.operators import DiagLinearOperator, LinearOperator, RootLinearOperator, SumLinearOperator
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.contract import X1, X2, Preflight
from ntk_lazy.errors import ArgumentError, BudgetError, ShapeError
from ntk_lazy.linalg.nystrom import nystrom_root
from ntk_lazy.model import FunctionalModel, ModelCall, as_ieee
from ntk_lazy.operator.added_diagonal import AddedDiagonal
from ntk_lazy.operator.bilinear import BilinearGradient
from ntk_lazy.operator.deflation import deflation_root
from ntk_lazy.operator.gramian import Gramian
from ntk_lazy.operator.indices import backward_slices, is_everything, is_same_index, plain_indices
from ntk_lazy.operator.job import job_of
from ntk_lazy.operator.readout import read_entries, write_down
from ntk_lazy.operator.side import Side
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.plan import EngineSettings, Plan
from ntk_lazy.probes import Probes
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block, ParameterBlock, SmallMatrix
from ntk_lazy.solves import Solve

_PARAM, _CONSTANT, _BUFFER = "p.", "c.", "b."


@final
class NTKLinearOperator(LinearOperator):  # type: ignore[misc]  # linear_operator has no types
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
        order: tuple[str, ...],
        rows1: Tensor | None = None,
        rows2: Tensor | None = None,
        scale: Tensor | None = None,
        **tensors: Tensor,
    ) -> None:
        shared = {"call": call, "layout": layout, "preflight": preflight, "settings": settings}
        optional = {"rows1": rows1, "rows2": rows2, "scale": scale}
        inputs = (x1,) if x2 is None else (x1, x2)
        super().__init__(*inputs, **shared, **optional, example_dims=example_dims, order=order, **tensors)
        self._layout, self._preflight, self._settings = layout, preflight, settings
        self._model = model = FunctionalModel(
            call=call,
            # linear_operator hands the tensors back sorted by name, and a flat vector follows the module's order.
            params={n: tensors[_PARAM + n] for n in order},
            constants={
                n[2:]: t.detach() if n.startswith(_BUFFER) else t
                for n, t in tensors.items()
                if not n.startswith(_PARAM)
            },
            buffer_names=frozenset(n.removeprefix(_BUFFER) for n in tensors if n.startswith(_BUFFER)),
        )
        self._gramian = Gramian(
            settings.build(model, layout, preflight),
            Side(x1, rows1, example_dims, layout.rows_per_example),
            None if x2 is None else Side(x2, rows2, example_dims, layout.rows_per_example),
            scale,
        )

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
        return cls(
            *([side1.x] if side2 is None else [side1.x, side2.x]),
            call=model.call,
            layout=layout,
            preflight=preflight,
            settings=settings,
            example_dims=side1.example_dims,
            order=tuple(model.params),
            rows1=side1.selected,
            rows2=None if side2 is None else side2.selected,
            **_tensors(model),
        )

    # What the operator is.

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._gramian.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self._gramian.device

    @property
    def num_examples(self) -> int:
        """N on the side of the rows."""
        return self._gramian.side1.num_examples

    @property
    def num_outputs(self) -> int:
        """C, outputs of the model for one example."""
        return self._layout.num_outputs

    @property
    def num_params(self) -> int:
        """P, entries of the parameters that make up J."""
        return self._gramian.engine.model.num_params

    @property
    def num_features(self) -> int:
        """Columns of J: P, or C*P in trace mode."""
        return self._gramian.engine.num_features

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides are known to be the same rows."""
        return self._gramian.side2 is None

    @property
    def is_gram_matrix(self) -> bool:
        """Whether K is ``J Jᵀ`` of a real J: one set of rows, one kernel, and no negative scale."""
        scale = self._gramian.scale
        return self.is_symmetric and not self.batch_shape and (scale is None or bool(scale.detach() >= 0))

    @property
    def rows(self) -> Rows:
        """The rows of a long vector that this process holds: all of them."""
        return Rows(self._gramian.side1.num_rows)

    def explain(
        self, num_columns: int = 1, num_products: int = 1, *, eigenpairs: int | None = None, solve: Solve | None = None
    ) -> Plan:
        """Say what products will do, before they run.

        Args:
            num_columns: Columns of one product.
            num_products: Products in a row, within ``linearised``, during which parameters stay as they are.
            eigenpairs: Plan for ``eigsh(K, eigenpairs)`` instead: about ``1.75 k / b + 5`` products of b columns.
            solve: Plan for a solve instead, such as ``Solve(noise=0.1)``: by conjugate gradients, or, where J has fewer
                columns than rows, by a Gram matrix of the columns.

        Returns:
            The plan: engine, chunks, predicted bytes, flops and seconds; ``print`` it.

        Cost: two rates of the machine are measured, once. Nothing is multiplied, except that for ``solve`` the kernel
            between 512 of the rows is written down, once while parameters and inputs stay the same.

        Raises:
            BudgetError: Not even one example and one column fit the memory budget.
            ArgumentError: A number below 1, more pairs than rows, both jobs at once, or one of them for a kernel that
                is not square, is batched or has a negative scale.
        """
        return Plan.of(
            self._gramian.engine,
            self._settings,
            job_of(self, num_columns, num_products, eigenpairs, solve),
            shape=tuple(self.shape),
            num_examples=(self._gramian.side1.num_examples, self._gramian.columns.num_examples),
            is_symmetric=self.is_symmetric,
            preflight=self._preflight,
        )

    def linearised(self, num_columns: int = 1) -> AbstractContextManager[None]:
        """Keep the forward passes of the model between the products that are made within this context.

        What is kept depends on the engine: forward passes, the factors of layers, or K itself; nothing where the memory
        budget is scarce. ``eigsh`` does this itself. Parameters and inputs must not change within the context: products
        would not notice.
        """
        return self._settings.running(self._gramian.engine, num_columns)

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
        return self._gramian.jacobian_matmul(W)

    def jacobian_rmatmul(self, V: Block) -> ParameterBlock:
        """Multiply with the transpose of J of the rows: ``sqrt(s) J1ᵀ V``, shape ``(num_features, k)``.

        Cost: half a product, and all ``num_features * k`` numbers at once.

        Raises:
            ShapeError: V does not have n rows, or the operator is batched.
        """
        return self._gramian.jacobian_rmatmul(V)

    def matmul_afresh(self, V: Block) -> Block:
        """Return ``K V`` from the Jacobian alone, also where K is kept written down: what ``eigsh`` certifies with."""
        return self._gramian.matmul_afresh(V)

    def half_gram(self, V: Block) -> SmallMatrix:
        """Return ``VᵀKV`` from the half product, ``s (J1ᵀV)ᵀ(J1ᵀV)``, accumulated in float64, on the CPU.

        Its eigenvalues are non-negative by construction, and an eigenvalue ``lambda_i`` is off by
        ``eps sqrt(lambda_1/lambda_i)`` where a product is off by ``eps lambda_1/lambda_i``.

        Cost: half a product; with ``num_features * k`` numbers over the budget in q blocks, ``(q + 1) / 2`` of them.
        """
        return self._gramian.half_gram(V)

    def parameter_energies(self, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        """Return ``s ‖J_pᵀ v‖²`` for each parameter p of the model and each column v; they add up to ``vᵀKv``.

        Cost: half a product.
        """
        return self._gramian.parameter_energies(V)

    def at(
        self,
        x1: Tensor | np.ndarray | Probes,
        x2: Tensor | np.ndarray | Probes | None = None,
        *,
        model: FunctionalModel | None = None,
    ) -> NTKLinearOperator:
        """The same kernel at other points: square at ``x1``, or between ``x1`` and ``x2``.

        Args:
            x1: Points of the rows. One example without its leading dimension is one point.
            x2: Points of the columns.
            model: The same model with other tensors of the same names, dtype and device; None for those of now.

        Raises:
            ShapeError: Points of another shape, kind of numbers or device than those of the kernel.
        """
        old = self._gramian.side1
        example = old.x.shape[old.axis + 1 :]
        sides = []
        for given in (x1, x2):
            x = given if given is None or isinstance(given, Tensor) else Probes.of(given).inputs
            x = x.unsqueeze(0) if x is not None and x.shape == example else x
            if x is not None and (x.ndim <= old.example_dims or x.shape[x.ndim - old.example_dims :] != example):
                raise ShapeError(
                    f"points of shape {tuple(x.shape)} do not fit a kernel whose examples have shape {tuple(example)}; "
                    "put the number of examples in front."
                )
            if x is not None:
                _check_kind(x, old.x)
            sides.append(None if x is None else Side(x, None, old.example_dims, old.rows_per_example))
        return self._rebuild(cast(Side, sides[0]), sides[1], tensors={} if model is None else _tensors(model))

    # The contract of linear_operator.

    @override
    def _size(self) -> torch.Size:
        return self._gramian.shape

    @override
    def _transpose_nonbatch(self) -> LinearOperator:
        return self if self.is_symmetric else self._rebuild(self._gramian.columns, self._gramian.side1)

    @override
    def _matmul(self, rhs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (rhs.requires_grad or self.requires_grad):
            return self.matmul(rhs)  # linear_operator's Function, which comes back here without a graph
        if rhs.ndim == 1:
            return self._gramian.matmul(rhs.unsqueeze(-1)).squeeze(-1)
        return self._gramian.matmul(rhs)

    @override
    def _diagonal(self) -> Tensor:
        every = (torch.arange(size, device=self.device) for size in (*self.batch_shape, self.shape[-1]))
        *batch, rows = torch.meshgrid(*every, indexing="ij")
        return self._get_indices(rows, rows, *batch)

    @override
    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        index = tuple(torch.broadcast_tensors(*batch_indices, row_index, col_index))
        return read_entries(self.representation_tree(), index, self.representation())

    @override
    def __getitem__(self, index: Any) -> LinearOperator | Tensor:
        plain = list(plain_indices(index, self.shape, self.device))
        kernel: LinearOperator = self
        # A slice stays a slice beside a tensor: it is taken by itself, and first.
        for dim, elements in backward_slices(tuple(plain), self.shape).items():
            alone: list[Any] = [slice(None)] * len(plain)
            alone[dim], plain[dim] = elements.to(self.device), slice(None)
            kernel = LinearOperator.__getitem__(kernel, tuple(alone))
        return LinearOperator.__getitem__(kernel, tuple(plain))

    @override
    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        side1, side2 = self._gramian.side1, self._gramian.columns
        symmetric = self.is_symmetric and is_same_index(row_index, col_index)
        if batch_indices:
            side1, side2 = side1.expand(self.batch_shape), side2.expand(self.batch_shape)
            side1, side2 = (side.with_x(side.x[tuple(batch_indices)]) for side in (side1, side2))
        side1 = side1 if is_everything(row_index) else side1.select(row_index)
        side2 = side2 if is_everything(col_index) else side2.select(col_index)
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
        old = self._gramian.scale
        return self._rebuild(self._gramian.side1, self._gramian.side2, scale=scale if old is None else scale * old)

    @override
    def mul(self, other: float | Tensor | LinearOperator) -> LinearOperator:
        if isinstance(other, Tensor) and other.shape[-2:] == (1, 1):
            # One number for each kernel of a batch; linear_operator takes it for a matrix where K has no such batch,
            # and would write K down.
            batch = torch.broadcast_shapes(self.batch_shape, other.shape[:-2])
            if other.numel() > 1 and batch != self.batch_shape:
                return self._expand_batch(batch)._mul_constant(other[..., 0, 0].expand(batch))
        return super().mul(other)

    @override
    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        # In whatever shape linear_operator takes it: one number, or one for each row.
        return AddedDiagonal(self, super().add_diagonal(diag)._diag_tensor)

    @override
    def __add__(self, other: Any) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return AddedDiagonal(self, other)
        if isinstance(other, RootLinearOperator):
            # linear_operator 0.6 takes a root of K first, as if all that follows were solves.
            return SumLinearOperator(self, other)
        return super().__add__(other)

    @override
    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if left_vecs.ndim == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        return self._gradients(lambda wrt: self._gramian.bilinear(left_vecs, right_vecs, wrt=wrt))

    def dense_derivative(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate ``⟨upstream, K⟩`` in all tensors of the representation but the scale."""
        return self._gradients(lambda wrt: self._gramian.dense_gradient(upstream, wrt=wrt))

    def _gradients(self, differentiate: Callable[[set[str]], BilinearGradient]) -> tuple[Tensor | None, ...]:
        """Hand what was found by the names of the engine to the tensors that ask for a gradient."""
        names = [*("x1", "x2")[: len(self._args)], *self._differentiable_kwargs]
        asked = {n for n, t in zip(names, self.representation(), strict=True) if t.requires_grad and n[:2] != _BUFFER}
        if not asked:
            return (None,) * len(names)
        engine_names = {n: {"x1": X1, "x2": X2}.get(n, n[2:]) for n in asked - {"scale"}}
        total = differentiate(set(engine_names.values()))
        scale = 1.0 if self._gramian.scale is None else self._gramian.scale.detach()
        found = {n: total.gradient(name) for n, name in engine_names.items()}
        scaled = {n: None if g is None else g * scale for n, g in found.items()} | {"scale": total.value}
        return tuple(scaled[n] if n in asked else None for n in names)

    @override
    def to_dense(self, *, max_dense_bytes: int | None = None) -> Tensor:
        """Write K down, from tiles of factors or of rows of J; a few rows or columns by products where that is less.

        Args:
            max_dense_bytes: Refuse a larger K; None means what was given to ``ntk``, by default its memory budget.

        Returns:
            Shape ``(*batch, n1, n2)``, differentiable; nothing but K, for a scale, is kept for the backward pass.

        Cost: ``2 n1 n2 P`` flops, half of that for a symmetric K, and the rows of J once for each tile.

        Raises:
            BudgetError: K would be larger than allowed.
        """
        limit = self._settings.max_dense_bytes if max_dense_bytes is None else max_dense_bytes
        size = prod(self.shape) * self.dtype.itemsize
        if size > limit:
            raise BudgetError(
                f"K is {' x '.join(map(str, self.shape))} and would take {size:,} bytes written down; {limit:,} are "
                "allowed. Use products (K @ V), eigsh or K[rows, cols]; or raise max_dense_bytes if you must have it.",
                requested_bytes=size,
                available_bytes=limit,
            )
        scale = self._gramian.scale
        if scale is not None and scale.requires_grad:
            # Its gradient comes from the entries, where a backward pass through K takes products with n columns.
            unscaled = self.unscaled()
            return write_down(unscaled.representation_tree(), unscaled.representation()) * scale
        return write_down(self.representation_tree(), self.representation())

    @override
    def pivoted_cholesky(
        self, rank: int, error_tol: float | None = None, return_pivots: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Factorise K approximately, from its diagonal and a row for each pivot; what rows share is kept meanwhile.

        Args:
            rank: Columns of the factor, at most.
            error_tol: Stop where the trace of what is left, relative to the largest entry of the diagonal, is below it.
            return_pivots: Whether to return the permutation too.

        Returns:
            L of shape ``(*batch, n, rank)``, ``K ≈ L Lᵀ``, differentiable.
        """
        with self.linearised(rank):
            return super().pivoted_cholesky(rank, error_tol, return_pivots)

    @override
    def type(self, dtype: torch.dtype) -> LinearOperator:
        return self._map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)

    @override
    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        example = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._map_tensors(
            lambda t: t.to(example.device, example.dtype) if t.is_floating_point() else t.to(example.device)
        )

    def nystrom_root(self, rank: int) -> Tensor | None:
        """Approximate K by ``L Lᵀ`` with L of shape ``(*batch, n, rank)``, detached; None under a negative scale.

        The last one is kept while inputs and parameters stay the same, whatever the scale.

        Cost: a product with ``rank`` columns; see ``linalg.nystrom``.
        """
        scale, rows = self._gramian.scale, self._gramian.side1
        if scale is not None and not float(scale.detach()) > 0:
            return None
        root = self.kept_nystrom_root()
        if root is None or root.shape[-1] != rank:
            self._settings.root.forget()  # before its successor is made
            with torch.no_grad():
                matmul = self.unscaled()._matmul
                root = nystrom_root(matmul, self.shape, rank, dtype=self.dtype, device=self.device)
            if not self.batch_shape:
                self._settings.root.keep(self._model, rows.x, rows.selected, root)
        return root if scale is None else root * scale.detach().sqrt()

    def kept_nystrom_root(self) -> Tensor | None:
        """The last root, of whichever rank, of the kernel without its scale; None if there is none."""
        rows = self._gramian.side1
        return None if self.batch_shape else self._settings.root.find(self._model, rows.x, rows.selected)

    def precondition_with(self, values: Tensor, vectors: Tensor) -> None:
        """Precondition later solves with ``K + D`` by eigenpairs of K, in the place of a randomised approximation.

        With the k largest ones the condition number becomes ``(λ_{k+1} + σ²) / σ²``, and no product is spent on a
        preconditioner. They serve all operators of these points and parameters, whatever becomes of scale and
        diagonal, until points or parameters change or other pairs are given; also those that a Gaussian process
        makes of its kernel, and whatever rank and least size GPyTorch's settings ask for.

        Args:
            values: Shape ``(k,)``, as in ``EigenResult.values``.
            vectors: Shape ``(n, k)``, orthonormal, as in ``EigenResult.vectors``.

        Cost: a product with one column, by which the pairs are checked, and ``n k²`` operations; ``n k`` numbers are
            kept.

        Raises:
            ShapeError: Sizes, dtype or device that are not those of K; a kernel that is batched.
            ArgumentError: Values that are not positive, vectors that are not orthonormal, pairs that are not those of
                K; a kernel that is not square or has no positive scale.
        """
        scale, rows = self._gramian.scale, self._gramian.side1
        if self.batch_shape:
            raise ShapeError(
                f"pairs belong to one kernel; this is a batch of shape {tuple(self.batch_shape)}: index it."
            )
        if not self.is_symmetric or (scale is not None and not float(scale.detach()) > 0):
            raise ArgumentError("only a square kernel of one set of rows with a positive scale is solved with.")
        with torch.no_grad():
            root = deflation_root(self.detach()._matmul, self, values, vectors)
        if scale is not None:
            root = root / scale.detach().sqrt()
        self._settings.pairs.keep(self._model, rows.x, rows.selected, root)

    def deflation_root(self) -> Tensor | None:
        """The root of K that eigenpairs gave, shape ``(n, k)``; None if none were given."""
        scale, rows = self._gramian.scale, self._gramian.side1
        if not self.is_gram_matrix:
            return None
        root: Tensor | None = self._settings.pairs.find(self._model, rows.x, rows.selected)
        return root if root is None or scale is None else root * scale.detach().sqrt()

    def unscaled(self) -> NTKLinearOperator:
        """The same kernel without its scale: ``J1 J2ᵀ``."""
        return self if self._gramian.scale is None else self.__class__(*self._args, **(self._kwargs | {"scale": None}))

    @property
    def settings(self) -> EngineSettings:
        """What was asked of the engine, and what is kept from one operator to the next."""
        return self._settings

    @property
    def gramian(self) -> Gramian:
        """The numbers beneath the operator, for the backward passes of what is read off it."""
        return self._gramian

    def _rebuild(
        self,
        side1: Side,
        side2: Side | None,
        *,
        scale: Tensor | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> NTKLinearOperator:
        kwargs = self._kwargs | (tensors or {})
        kwargs |= {"rows1": side1.selected, "rows2": None if side2 is None else side2.selected}
        kwargs["scale"] = self._gramian.scale if scale is None else scale
        return self.__class__(*([side1.x] if side2 is None else [side1.x, side2.x]), **kwargs)

    def _on_batches(self, change: Callable[[Tensor], Tensor]) -> NTKLinearOperator:
        sides = [
            side.with_x(change(side.expand(self.batch_shape).x))
            for side in (self._gramian.side1, self._gramian.columns)
        ]
        return self._rebuild(sides[0], None if self.is_symmetric else sides[1])

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> NTKLinearOperator:
        kwargs: dict[str, Any] = {n: change(v) if isinstance(v, Tensor) else v for n, v in self._kwargs.items()}
        return self.__class__(*(change(x) for x in self._args), **kwargs)


def _check_kind(points: Tensor, of_kernel: Tensor) -> None:
    """Refuse points of a dtype or on a device that the model was not checked with."""
    kinds = [as_ieee(x).dtype if x.is_floating_point() or x.is_complex() else torch.int64 for x in (points, of_kernel)]
    if kinds[0] != kinds[1] or points.device != of_kernel.device:
        raise ShapeError(
            f"points are {points.dtype} on {points.device} and those of the kernel {of_kernel.dtype} on "
            f"{of_kernel.device}: pass x.to({str(of_kernel.device)!r}, {of_kernel.dtype})."
        )


def _tensors(model: FunctionalModel) -> dict[str, Tensor]:
    """Name the tensors of a model as the representation of the operator has them."""
    tensors = {_PARAM + n: t for n, t in model.params.items()}
    return tensors | {(_BUFFER if n in model.buffer_names else _CONSTANT) + n: t for n, t in model.constants.items()}
