"""Weights of layers and convolutions: outer products of what goes in and the gradient at what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.uses.contraction import by_example, by_position, scales_input
from ntk_lazy.engines.uses.use import Coefficients, ParameterColumns, ParameterRows, Rows, Use
from ntk_lazy.gemm import add_gram_, times_transposed

OutputGradients: TypeAlias = Float[Tensor, "q b S o"]

# A factor is scaled for as many columns at once as make it so wide: products are wide enough, and stay in cache.
_WIDTH = 1024
# Scaling a factor and multiplying with it stay in cache when they work on pieces of so many bytes.
_PIECE_BYTES = 4 << 20
# Rows of J of few examples meet all columns, which come from memory each time: with twice as many, wide products are
# half as fast again.
_ROWS_BYTES = 8 << 20


@final
@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input.

    Attributes:
        kernel: Size of the kernel in each dimension.
        stride: Steps between positions.
        padding: Zeros on each side.
        dilation: Steps between taps.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def unfold(self, x: Tensor) -> Float[Tensor, "b c taps S"]:
        """Copy what lies beneath each tap of the kernel as it moves: ``(b, c, *size)`` becomes ``(b, c, taps, S)``.

        With the taps last, runs of as many numbers as a kernel is wide would be copied, in two to three times the time.
        """
        pads = [side for p in reversed(self.padding) for side in (p, p)]
        x = pad(x, pads).contiguous()
        dims = len(self.kernel)
        sizes = [
            (x.shape[2 + d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d] + 1 for d in range(dims)
        ]
        strides = x.stride()
        taps = [self.dilation[d] * strides[2 + d] for d in range(dims)]
        moves = [self.stride[d] * strides[2 + d] for d in range(dims)]
        view = x.as_strided((*x.shape[:2], *self.kernel, *sizes), (strides[0], strides[1], *taps, *moves))
        return view.reshape(*x.shape[:2], prod(self.kernel), prod(sizes))


@final
@dataclass(frozen=True, eq=False)
class Outer(Use):
    """A weight: ``sum_s G_s ⊗ A_s``, of shape ``(o, i)``, or ``(i, o)`` if it is not transposed.

    Two contractions of the same factors: *by position*, where both halves of a product are matrix products over all
    positions, and *by example*, where positions are summed first. The second costs the same for any number of
    columns: it is cheaper where positions are many and outputs are few.

    Attributes:
        source: ``(b, S, i)``, or the input of a convolution, unfolded when it is needed.
        G: Gradients at the output of the layer.
        window: Of a convolution; None for a plain layer.
        is_transposed: Whether the output is the first dimension of the weight.
    """

    source: Tensor
    G: OutputGradients
    window: Window | None = None
    is_transposed: bool = True

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return self.source, self.G

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return self.source, self.G.transpose(0, 1)

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return Outer, self.window, self.is_transposed

    @override
    def with_factors(self, *factors: Tensor) -> Outer:
        source, G = factors
        return replace(self, source=source, G=G.transpose(0, 1))

    @property
    @override
    def num_entries(self) -> int:
        _, _, o, i = self._sizes
        return o * i

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """``q, S, o, i``."""
        q, _, S, o = self.G.shape
        i = self.source.shape[-1] if self.window is None else self.source.shape[1] * prod(self.window.kernel)
        return q, S, o, i

    def left(self, examples: slice = slice(None)) -> Float[Tensor, "b S i"]:
        """What went into the layer at each position."""
        x = self.source[examples]
        return x if self.window is None else self.window.unfold(x).flatten(1, 2).mT

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        q, S, o, i = self._sizes
        k = V.shape[2]
        if self._is_by_example(k):
            for piece in self._pieces(q * o * i, _ROWS_BYTES):
                add_gram_(W, V[piece].flatten(0, 1), self.rows(piece).flatten(0, 1))
            return
        for piece in self._pieces(S * max(self._width(k), o, i)):
            G, A = self.G[:, piece], self.left(piece)
            fixed = (G[0] if self._scales_input else A).flatten(0, 1)
            for columns in slices(k, self._num_columns):
                v = V[piece, :, columns]
                if self._scales_input:
                    D = A.unsqueeze(2) * v[:, 0, None, :, None]
                elif q == 1:
                    D = G[0].unsqueeze(2) * v[:, 0, None, :, None]
                else:
                    # (b, S o, q) x (b, q, k): the gradient of each column at each output of the layer.
                    D = torch.bmm(v.mT, G.permute(1, 0, 2, 3).flatten(2)).unflatten(2, (S, o)).transpose(1, 2)
                part, scaled = self._matrices(W[columns]), D.reshape(fixed.shape[0], -1)
                if part.is_contiguous():
                    add_gram_(part.view(-1, fixed.shape[1]), scaled, fixed)
                else:
                    total = part.new_zeros(scaled.shape[1], fixed.shape[1])
                    add_gram_(total, scaled, fixed)
                    part += total.view_as(part)

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        q, S, o, i = self._sizes
        k = W.shape[0]
        if self._is_by_example(k):
            for piece in self._pieces(q * o * i, _ROWS_BYTES):
                R = self.rows(piece)
                Y[piece] += times_transposed(R.flatten(0, 1), W).view(*R.shape[:2], k)
            return
        for piece in self._pieces(S * max(self._width(k), o, i)):
            G, A = self.G[:, piece], self.left(piece)
            fixed = (G[0] if self._scales_input else A).flatten(0, 1)
            for columns in slices(k, self._num_columns):
                part = self._matrices(W[columns])
                H = times_transposed(fixed, part.reshape(-1, fixed.shape[1])).view(*A.shape[:2], *part.shape[:2])
                if q == 1:
                    scale = A if self._scales_input else G[0]
                    Y[piece, 0, columns] += H.mul_(scale.unsqueeze(2)).sum((1, 3))
                else:
                    Y[piece, :, columns] += torch.einsum("bsko,qbso->bqk", H, G)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        A, G = self.left(examples), self.G[:, examples].permute(1, 0, 3, 2)
        b, q, o, S = G.shape
        R = torch.bmm(G.reshape(b, q * o, S), A).view(b, q, o, -1)
        return (R if self.is_transposed else R.mT).flatten(2)

    @override
    def as_rows(self) -> Rows:
        q, S, o, i = self._sizes
        R = self.G.new_empty(self.G.shape[1], q, o * i)
        for piece in self._pieces(max(S * i, q * o * i)):
            R[piece] = self.rows(piece)
        return Rows(R)

    @property
    @override
    def division(self) -> tuple[object, ...]:
        _, _, o, i = self._sizes
        return "rows of the weight" if self.is_transposed else "columns of the weight", o, i

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        _, _, o, i = self._sizes
        return slices(o, max(1, num_entries // i))

    @override
    def part(self, which: slice) -> ParameterRows:
        return replace(self, G=self.G[..., which]).as_rows().R

    @override
    def at(self, examples: slice) -> Outer:
        return replace(self, source=self.source[examples], G=self.G[:, examples])

    @property
    def _scales_input(self) -> bool:
        """Whether coefficients scale what goes in, and not the gradient, for the narrower one of the two is cheaper."""
        q, _, o, i = self._sizes
        return scales_input(q, o, i)

    @property
    def _num_columns(self) -> int:
        """Columns that are multiplied at once."""
        _, _, o, i = self._sizes
        return max(1, _WIDTH // (i if self._scales_input else o))

    def _width(self, num_columns: int) -> int:
        """Numbers at each position of a factor that is scaled for so many columns, or as many as go at once."""
        _, _, o, i = self._sizes
        return min(num_columns, self._num_columns) * (i if self._scales_input else o)

    def _matrices(self, W: ParameterColumns) -> Float[Tensor, "k scaled fixed"]:
        """View columns of the weight with the factor that is scaled first."""
        _, _, o, i = self._sizes
        weights = W.view(-1, o, i) if self.is_transposed else W.view(-1, i, o)
        return weights.mT if self._scales_input == self.is_transposed else weights

    def _is_by_example(self, k: int) -> bool:
        q, S, o, i = self._sizes
        return by_example(S, o, i, self.G.element_size(), q=q, k=k) < by_position(
            S, o, i, self.G.element_size(), q=q, k=k
        )

    def _pieces(self, numbers_per_example: int, num_bytes: int = _PIECE_BYTES) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries stay in cache."""
        size = max(1, num_bytes // (numbers_per_example * self.G.element_size()))
        return slices(self.G.shape[1], size)
