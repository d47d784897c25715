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
from ntk_lazy.engines.uses.contraction import by_example, by_position
from ntk_lazy.engines.uses.use import Coefficients, ParameterColumns, ParameterRows, Rows, Use
from ntk_lazy.gemm import add_gram_, times_transposed

OutputGradients: TypeAlias = Float[Tensor, "q b S o"]

# Columns that are multiplied at once: the accumulator of a layer stays in cache, and products are wide enough.
_COLUMNS = 4
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

    def unfold(self, x: Tensor) -> Float[Tensor, "b S c taps"]:
        """Copy what lies beneath the kernel at each position: ``(b, c, *size)`` becomes ``(b, S, c, taps)``."""
        pads = [side for p in reversed(self.padding) for side in (p, p)]
        x = pad(x, pads).contiguous()
        dims = len(self.kernel)
        sizes = [
            (x.shape[2 + d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d] + 1 for d in range(dims)
        ]
        strides = x.stride()
        moves = [self.stride[d] * strides[2 + d] for d in range(dims)]
        taps = [self.dilation[d] * strides[2 + d] for d in range(dims)]
        view = x.as_strided((x.shape[0], *sizes, x.shape[1], *self.kernel), (strides[0], *moves, strides[1], *taps))
        return view.reshape(x.shape[0], prod(sizes), x.shape[1], prod(self.kernel))


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
        return x if self.window is None else self.window.unfold(x).flatten(2)

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        q, S, o, i = self._sizes
        k = V.shape[2]
        by_example = self._is_by_example(k)
        if by_example:
            for piece in self._pieces(q * o * i, _ROWS_BYTES):
                add_gram_(W, V[piece].flatten(0, 1), self.rows(piece).flatten(0, 1))
            return
        # Columns first: an accumulator of a few columns stays in cache while all examples pass.
        weights = W.view(k, o, i) if self.is_transposed else W.new_zeros(k, o, i)
        for piece in self._pieces(S * max(_COLUMNS * o, i)):
            G, A = self.G[:, piece], self.left(piece).flatten(0, 1)
            for columns in slices(k, _COLUMNS):
                v = V[piece, :, columns]
                if q == 1:
                    D = G[0].unsqueeze(2) * v[:, 0, None, :, None]
                else:
                    # (b, S o, q) x (b, q, k): the gradient of each column at each output of the layer.
                    D = torch.bmm(v.mT, G.permute(1, 0, 2, 3).flatten(2)).unflatten(2, (S, o)).transpose(1, 2)
                part = weights[columns]
                add_gram_(part.view(-1, i), D.reshape(A.shape[0], -1), A)
        if not self.is_transposed:
            W += weights.mT.reshape(k, -1)

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        q, S, o, i = self._sizes
        k = W.shape[0]
        by_example = self._is_by_example(k)
        weights = W.view(k, o, i) if self.is_transposed else W.view(k, i, o).mT
        if by_example:
            for piece in self._pieces(q * o * i, _ROWS_BYTES):
                R = self.rows(piece)
                Y[piece] += times_transposed(R.flatten(0, 1), W).view(*R.shape[:2], k)
            return
        for piece in self._pieces(S * max(_COLUMNS * o, i)):
            G, A = self.G[:, piece], self.left(piece).flatten(0, 1)
            for columns in slices(k, _COLUMNS):
                H = times_transposed(A, weights[columns].reshape(-1, i)).view(G.shape[1], S, -1, o)
                if q == 1:
                    Y[piece, 0, columns] += H.mul_(G[0].unsqueeze(2)).sum((1, 3))
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

    def _is_by_example(self, k: int) -> bool:
        q, S, o, i = self._sizes
        return by_example(S, o, i, self.G.element_size(), q=q, k=k) < by_position(
            S, o, i, self.G.element_size(), q=q, k=k
        )

    def _pieces(self, numbers_per_example: int, num_bytes: int = _PIECE_BYTES) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries stay in cache."""
        size = max(1, num_bytes // (numbers_per_example * self.G.element_size()))
        return slices(self.G.shape[1], size)
