"""The only place where a solver calls the operator: counted, scaled, checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.contract import Afresh, HalfGram, SymmetricOperator, asymmetry_tolerance, way_to_write_down
from ntk_lazy.eigen.criterion import least_noise
from ntk_lazy.errors import ArgumentError, BudgetError, NonFiniteError, ShapeError
from ntk_lazy.linalg import column_norms
from ntk_lazy.precision import ieee_precision
from ntk_lazy.shapes import Block, SmallMatrix

_CURE = "Check data and parameters with doctor(model, x)."
_LARGEST = torch.finfo(torch.float64).max
_LARGEST_EXPONENT = 511


class Product:
    """Products with ``A / scale``, where ``scale`` is a power of four near the norm of ``A``.

    With it, no threshold of a solver is absolute. Half of the scale is taken from the input and half from the
    output, so that ``J Jᵀ`` with a norm of 1e-30 or 1e30 stays inside float32 also between its factors.
    The operator gets a copy of its own and what it returns is copied, so that it may overwrite the one and
    return a view of whatever it likes.

    The second call carries one column of the first a second time, in another place: an operator that is
    not the same function twice is refused, and what is left of the difference is measured noise.

    Attributes:
        num_calls: Block calls so far.
        num_columns: Products so far: one is the operator times one column.
        num_half_columns: Half products so far.
        num_written_columns: Columns that the operator wrote down by itself.
        noise: Measured difference between two products of one column, relative to that product.
        norm: A lower bound of ``‖A‖`` in units of ``scale``: the largest norm of an image of a unit column so far, and
            the largest Ritz value of either sign.
    """

    def __init__(self, operator: SymmetricOperator, *, max_products: int) -> None:
        self.operator = operator
        self.rows = operator.rows
        self.max_products = max_products
        self.num_calls = 0
        self.num_columns = 0
        self.num_half_columns = 0
        self.num_written_columns = 0
        self.noise = 0.0
        self.norm = 0.0
        self._exponent: int | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._has_refused = False  # to be written down

    @property
    def scale(self) -> float:
        """What values of the scaled operator are multiplied with at the end."""
        return math.ldexp(1.0, 2 * (self._exponent or 0))

    @property
    def noise_floor(self) -> float:
        """Size of rounding relative to the norm of the operator: what was measured, and not less than assumed."""
        return max(least_noise(self.operator.dtype, self.rows.total), self.noise)

    @property
    def floor(self) -> float:
        """Size of rounding in units of ``scale``: a value below it cannot be told from zero."""
        return self.noise_floor * self.norm

    def note_norm(self, norm: float) -> None:
        """Learn how large the operator is at least, in units of ``scale``."""
        self.norm = max(self.norm, norm)

    def affords(self, num_columns: int) -> bool:
        """Say whether a call of this width stays within ``max_products``."""
        return self.num_columns + num_columns <= self.max_products

    def __call__(self, V: Block) -> Block:
        """Multiply the columns of a block, of norm about one, with the scaled operator.

        Cost: one block call; copies of the block in and out.

        Raises:
            ShapeError: The operator returned another shape, dtype or device.
            NonFiniteError: It returned a NaN or an infinity.
            ArgumentError: It is not deterministic.
        """
        repeat = self.num_calls == 1 and self._first is not None and self.affords(V.shape[1] + 1)
        block = torch.cat([V, self._first[0]], dim=1) if repeat and self._first is not None else V
        image = self._multiply(block)
        if self._exponent is None:
            image = self._choose_scale(image)
        self.note_norm(float(column_norms(image, rows=self.rows).max()))
        if self.num_calls == 1:
            self._first = V[:, :1].clone(), image[:, :1].clone()
        elif self._first is not None:
            if repeat:
                self._compare(image[:, -1:])
                image = image[:, :-1]
            self._first = None
        return image

    def afresh(self, V: Block) -> Block:
        """Multiply in another way, where the operator keeps rounded entries of itself; counted all the same."""
        return self._multiply(V, self.operator.matmul_afresh if isinstance(self.operator, Afresh) else None)

    def half_gram(self, X: Block) -> SmallMatrix | None:
        """Form ``Xᵀ A X`` from half products where the operator offers that; None where not."""
        if not isinstance(self.operator, HalfGram):
            return None
        self.num_half_columns += X.shape[1]
        factor = math.ldexp(1.0, -(self._exponent or 0))
        with ieee_precision():
            G = self.operator.half_gram((X * factor).contiguous())
        if G.shape != (X.shape[1], X.shape[1]):
            raise ShapeError(f"half_gram of {X.shape[1]} columns returned shape {tuple(G.shape)}.")
        G = G.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(G).all()):
            raise NonFiniteError("half_gram of the operator returned NaN or infinity.")
        return (G + G.mT) / 2

    def written_down(self) -> Float64[Tensor, "n n"] | None:
        """Return all of ``A / scale`` in float64 on the CPU, if the operator writes itself down; a copy of its own.

        None where it does not, where rows lie on several processes, and where its memory does not hold that: it is not
        asked again then.

        Raises:
            ShapeError: What it wrote down has another shape or dtype.
            NonFiniteError: There is a NaN or an infinity in it.
        """
        n, to_dense = self.rows.total, way_to_write_down(self.operator)
        if to_dense is None or self._has_refused or self.rows.local != n:
            return None
        try:
            with ieee_precision():
                written = to_dense()
        except BudgetError:
            self._has_refused = True
            return None
        if written.shape != (n, n) or written.dtype != self.operator.dtype:
            raise ShapeError(
                f"to_dense returned {tuple(written.shape)}, {written.dtype}; {(n, n)}, {self.operator.dtype} is needed."
            )
        self.num_written_columns += n
        K = written.detach().to("cpu", torch.float64, copy=True)
        if not bool(torch.isfinite(K).all()):
            raise NonFiniteError(f"to_dense returned NaN or infinity. {_CURE}")
        if self._exponent is None:
            K = self._choose_scale(K)
        else:
            half = math.ldexp(1.0, -self._exponent)
            K *= half
            K *= half
        self.note_norm(float(column_norms(K, rows=self.rows).max()))
        return K

    def check_symmetry(self, defect: float) -> None:
        """Refuse an operator for which ``⟨u, Av⟩`` and ``⟨Au, v⟩`` differ by this much, in units of scale."""
        if defect > asymmetry_tolerance(self.operator.dtype) * self.norm:
            raise ArgumentError(
                f"the operator is not symmetric: <u, Av> and <Au, v> differ by {defect / self.norm:.1e} of "
                f"its norm after {self.num_calls} block calls. Only symmetric operators have the eigenpairs that "
                "eigsh looks for; an operator that changes between calls (dropout) looks like this too."
            )

    def _multiply(self, V: Tensor, matmul: Callable[[Block], Block] | None = None) -> Tensor:
        """Call the operator once, and look at what comes back."""
        self.num_calls += 1
        self.num_columns += V.shape[1]
        factor = math.ldexp(1.0, -(self._exponent or 0))
        with ieee_precision():
            image = (matmul or self.operator.matmul)((V * factor).contiguous())
        if not isinstance(image, Tensor):
            raise ShapeError(f"the product returned a {type(image).__name__} and not a tensor.")
        if image.shape != V.shape or image.dtype != V.dtype or image.device != V.device:
            raise ShapeError(
                f"the product of a block of shape {tuple(V.shape)}, {V.dtype}, on {V.device} has shape "
                f"{tuple(image.shape)}, {image.dtype}, on {image.device}; the three must be the same."
            )
        image = image.detach()
        num_bad = self.rows.sum((~torch.isfinite(image)).sum())
        if int(num_bad):
            raise NonFiniteError(
                f"the operator returned {int(num_bad)} entries that are NaN or infinite at block call "
                f"{self.num_calls}. {_CURE}"
            )
        return image * factor

    def _choose_scale(self, image: Tensor) -> Tensor:
        """Fix the scale by the first image that is not zero, and apply it to that image."""
        norm = float(column_norms(image, rows=self.rows).max())
        if norm == 0.0:
            return image
        # From a norm of 2^1023 on the scale itself would overflow.
        self._exponent = min(round(math.log2(min(norm, _LARGEST)) / 2), _LARGEST_EXPONENT)
        half = math.ldexp(1.0, -self._exponent)
        return image * half * half

    def _compare(self, image: Tensor) -> None:
        """Measure how far two products of the same column are apart."""
        assert self._first is not None
        before = self._first[1]
        size = float(column_norms(before, rows=self.rows)[0])
        defect = float(column_norms(image - before, rows=self.rows)[0])
        largest = max(size, self.norm)
        if defect > asymmetry_tolerance(image.dtype) * largest:
            raise ArgumentError(
                f"the operator is not deterministic: two products of one column differ by "
                f"{defect / largest:.1e} of its norm. Put the model in eval mode, or fix its random state."
            )
        self.noise = defect / size if size > 0 else 0.0
