"""K = J1 J2ᵀ as a linear_operator: products, indices, diagonals and gradients, and never a matrix."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any, cast, final

import numpy as np
import torch
from jaxtyping import Float64
from linear_operator.operators import DiagLinearOperator, LinearOperator, RootLinearOperator, SumLinearOperator
from linear_operator.utils.broadcasting import _matmul_broadcast_shape
from torch import Tensor
from typing_extensions import override

from ntk_lazy.errors import BudgetError, ShapeError
from ntk_lazy.model import FunctionalModel, as_ieee
from ntk_lazy.modes import ordinary_mode
from ntk_lazy.operator.added_blocks import AddedBlocks
from ntk_lazy.operator.added_diagonal import AddedDiagonal
from ntk_lazy.operator.covariance import KernelCovariance
from ntk_lazy.operator.differentiation import differentiable_once, multiply, once, solve_for
from ntk_lazy.operator.indices import backward_slices, plain_indices
from ntk_lazy.operator.job import job_of
from ntk_lazy.operator.ordinary import in_ordinary_mode
from ntk_lazy.operator.readout import read_entries, write_down
from ntk_lazy.operator.roots import keep_pairs
from ntk_lazy.operator.side import Side
from ntk_lazy.out_of_memory import out_of_memory_named
from ntk_lazy.plan import Plan
from ntk_lazy.probes import Probes
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block, ParameterBlock, SmallMatrix
from ntk_lazy.solves import Solve


@final
@in_ordinary_mode
class NTKLinearOperator(KernelCovariance):
    """The empirical neural tangent kernel, lazily; made by ``ntk_lazy.ntk``.

    ``K = s J1 J2ᵀ`` with J the Jacobian of the model's outputs in its chosen parameters. Row ``i*C + c`` belongs
    to example i and output c. Square (``x2`` is None) or rectangular, batched over leading dimensions of the inputs.

    Nothing is cached: after an optimiser step the same operator is the new kernel. It is differentiable in points,
    parameters and scale; products, entries, ``to_dense`` and ``solve`` any number of times, all else once: to
    differentiate that again raises ``SecondDerivativeError``.

    Cost: a product with k columns is two sweeps over the examples, see ``explain()``. A gradient that is taken with
        ``create_graph=True`` holds the graph of all examples at once, outside the memory budget.
    """

    # What the operator is.

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
    def rows(self) -> Rows:
        """The rows of a long vector that this process holds: all of them."""
        return Rows(self._gramian.side1.num_rows)

    @ordinary_mode()
    @out_of_memory_named()
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
            between 512 of the rows, or 2,048 of very many, is written down, once while parameters and inputs stay the
            same.

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
        return self._rebuild(cast(Side, sides[0]), sides[1], model=model)

    # The contract of linear_operator.

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
        blocks = AddedBlocks.of(self, other)
        if blocks is not None:
            return blocks
        if isinstance(other, RootLinearOperator):
            # linear_operator 0.6 takes a root of K first, as if all that follows were solves.
            return SumLinearOperator(self, other)
        return super().__add__(other)

    @override
    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if left_vecs.ndim == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        with torch.no_grad():
            found = self.bilinear_gradients(left_vecs, right_vecs)
        # linear_operator asks with vectors that it has saved without their graph.
        return differentiable_once(found, (left_vecs, right_vecs, *self.representation()))

    def bilinear_gradients(self, left: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate ``sum_d left_dᵀ K right_d`` in all tensors of the representation; in the caller's grad mode.

        Args:
            left: Shape ``(*batch2, n1, d)``.
            right: Shape ``(*batch2, n2, d)``.
        """
        if torch.is_grad_enabled():
            return self._gradients_with_graph(lambda gramian: gramian.bilinear_form(left, right))
        return self._gradients(lambda wrt: self._gramian.bilinear(left, right, wrt=wrt))

    def dense_derivative(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate ``⟨upstream, K⟩`` in all tensors of the representation; in the caller's grad mode.

        Without a graph, that in the scale is left out.
        """
        if torch.is_grad_enabled():
            return self._gradients_with_graph(lambda gramian: gramian.dense_form(upstream))
        return self._gradients(lambda wrt: self._gramian.dense_gradient(upstream, wrt=wrt))

    def entries_derivative(self, index: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate a sum of entries with weights in all tensors of the representation, with a graph."""
        return self._gradients_with_graph(lambda gramian: (gramian.entries(*index) * upstream).sum())

    @override
    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        if not (isinstance(other, Tensor) and torch.is_grad_enabled() and (other.requires_grad or self.requires_grad)):
            return super().matmul(other)
        _matmul_broadcast_shape(self.shape, other.shape)
        return multiply(self.representation_tree(), other, self.representation())

    @override
    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        found = solve_for(self, right_tensor, left_tensor)
        return super().solve(right_tensor, left_tensor) if found is None else found

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
            L of shape ``(*batch, n, rank)``, ``K ≈ L Lᵀ``, differentiable once.
        """
        operator = self.representation_tree()(*once(*self.representation()))
        with self.linearised(rank):
            return LinearOperator.pivoted_cholesky(operator, rank, error_tol, return_pivots)

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
        keep_pairs(self, values, vectors)


def _check_kind(points: Tensor, of_kernel: Tensor) -> None:
    """Refuse points of a dtype or on a device that the model was not checked with."""
    kinds = [as_ieee(x).dtype if x.is_floating_point() or x.is_complex() else torch.int64 for x in (points, of_kernel)]
    if kinds[0] != kinds[1] or points.device != of_kernel.device:
        raise ShapeError(
            f"points are {points.dtype} on {points.device} and those of the kernel {of_kernel.dtype} on "
            f"{of_kernel.device}: pass x.to({str(of_kernel.device)!r}, {of_kernel.dtype})."
        )
