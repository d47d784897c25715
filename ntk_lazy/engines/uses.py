"""What one use of a parameter in a forward pass contributes to J, kept as factors instead of numbers.

For a layer, a row of J is a sum over positions (pixels, tokens; one for a plain layer) of outer products of what went
into the layer and the gradient at what came out. Whoever keeps these two multiplies with J by matrix products alone.

Shapes: ``b`` examples, ``S`` positions, ``q`` rows of J for an example, ``k`` columns, ``i`` and ``o`` the width of a
layer before and after, ``p`` entries of the parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.gemm import add_gram_, times_transposed

Coefficients: TypeAlias = Float[Tensor, "b q k"]
ParameterColumns: TypeAlias = Float[Tensor, "k p"]
ParameterRows: TypeAlias = Float[Tensor, "b q p"]
OutputGradients: TypeAlias = Float[Tensor, "q b S o"]

# Columns that are multiplied at once: the accumulator of a layer stays in cache, and products are wide enough.
_COLUMNS = 4
# Entries of a parameter so small that its sums are in float64.
_FEW = 4096
# Scaling a factor and multiplying with it stay in cache when they work on pieces of so many bytes.
_PIECE_BYTES = 4 << 20
# Products and sums that copy their operands do so for pieces of so many bytes.
_COPY_BYTES = 32 << 20
# Bytes moved cost as much as so many operations of a matrix product.
_BALANCE = 12.0


class Use(ABC):
    """The part of J that belongs to one use of one parameter, on a chunk of examples."""

    @property
    @abstractmethod
    def held(self) -> tuple[Tensor | None, Tensor]:
        """The factors: one that is the same for every row of J of an example, if there is one, and the other."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The same with the examples as their first dimension."""

    @property
    @abstractmethod
    def kind(self) -> tuple[object, ...]:
        """All that is not a factor; uses of the same kind divide into the same parts."""

    @abstractmethod
    def with_factors(self, *factors: Tensor) -> Use:
        """The same kind of use with other factors."""

    @property
    @abstractmethod
    def num_entries(self) -> int:
        """Entries of the parameter, p."""

    @abstractmethod
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        """Add ``(Jᵀ V)ᵀ`` to W."""

    @abstractmethod
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        """Add ``J Wᵀ`` to Y."""

    @abstractmethod
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        """Write the rows of J down."""

    def as_rows(self) -> Rows:
        """The same with positions summed."""
        return Rows(self.rows())

    @abstractmethod
    def parts(self, num_entries: int) -> Iterator[slice]:
        """Divide the entries of the parameter into parts of about so many; what a part counts is up to the use."""

    @abstractmethod
    def part(self, which: slice) -> ParameterRows:
        """Write the rows of J down for one part."""

    @abstractmethod
    def at(self, examples: slice) -> Use:
        """The same for some examples of the chunk, without a copy."""


@final
@dataclass(frozen=True, eq=False)
class Rows(Use):
    """The rows themselves, for parameters as small as a bias, or wherever they are as cheap as factors."""

    R: ParameterRows

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return None, self.R

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return (self.R,)

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return (Rows,)

    @override
    def with_factors(self, *factors: Tensor) -> Rows:
        return Rows(*factors)

    @property
    @override
    def num_entries(self) -> int:
        return self.R.shape[2]

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        # A bias near the output has one large gradient for all examples: it carries the largest eigenvector, and what
        # a long float32 sum loses would hide small eigenvalues. In float64 it costs next to nothing.
        is_small = self.num_entries <= _FEW
        total = W.double() if is_small else W
        for piece in self._pieces():
            v, R = V[piece].flatten(0, 1), self.R[piece].flatten(0, 1)
            if is_small:
                total.addmm_(v.mT.double(), R.double())
            else:
                add_gram_(total, v, R)
        if is_small:
            W.copy_(total)

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        for piece in self._pieces():
            part = Y[piece]
            part += times_transposed(self.R[piece].flatten(0, 1), W).view_as(part)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        return self.R[examples]

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        return slices(self.R.shape[2], num_entries)

    @override
    def part(self, which: slice) -> ParameterRows:
        return self.R[:, :, which]

    @override
    def at(self, examples: slice) -> Rows:
        return Rows(self.R[examples])

    def _pieces(self) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries are small beside what is held."""
        size = max(1, _COPY_BYTES // max(1, self.R.shape[1] * self.R.shape[2] * self.R.element_size()))
        return slices(self.R.shape[0], size)


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
            for piece in self._pieces(q * o * i):
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
            for piece in self._pieces(q * o * i):
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
        return _by_example(S, o, i, self.G.element_size(), q=q, k=k) < _by_position(
            S, o, i, self.G.element_size(), q=q, k=k
        )

    def _pieces(self, numbers_per_example: int) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries stay in cache."""
        size = max(1, _PIECE_BYTES // (numbers_per_example * self.G.element_size()))
        return slices(self.G.shape[1], size)


@final
@dataclass(frozen=True, eq=False)
class Lookup(Use):
    """An embedding: the gradient at each position belongs to the row of its token.

    Attributes:
        tokens: ``(b, S)``.
        G: Gradients at the output; zero where the padding token is.
        num_tokens: Rows of the table.
    """

    tokens: Int[Tensor, "b S"]
    G: OutputGradients
    num_tokens: int

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return self.tokens, self.G

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.G.transpose(0, 1)

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return Lookup, self.num_tokens

    @override
    def with_factors(self, *factors: Tensor) -> Lookup:
        tokens, G = factors
        return replace(self, tokens=tokens, G=G.transpose(0, 1))

    @property
    @override
    def num_entries(self) -> int:
        return self.num_tokens * self.G.shape[3]

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        d = self.G.shape[3]
        table = W.view(V.shape[2], self.num_tokens, d)
        for piece in self._pieces():
            G, tokens = self.G[:, piece], self.tokens[piece].flatten()
            for column in range(V.shape[2]):
                D = torch.einsum("bq,qbsd->bsd", V[piece, :, column], G)
                table[column].index_add_(0, tokens, D.flatten(0, 1))

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        table = W.view(W.shape[0], self.num_tokens, self.G.shape[-1])
        for piece in self._pieces():
            G, tokens = self.G[:, piece], self.tokens[piece]
            for column in range(W.shape[0]):
                Y[piece, :, column] += torch.einsum("bsd,qbsd->bq", table[column][tokens], G)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        tokens, G = self.tokens[examples], self.G[:, examples]
        q, b, S, d = G.shape
        R = G.new_zeros(b, q, self.num_tokens, d)
        place = tokens[:, None, :, None].expand(b, q, S, d)
        return R.scatter_add_(2, place, G.transpose(0, 1)).flatten(2)

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        d = self.G.shape[3]
        return slices(d, max(1, num_entries // self.num_tokens))

    @override
    def part(self, which: slice) -> ParameterRows:
        return replace(self, G=self.G[..., which]).rows()

    @override
    def at(self, examples: slice) -> Lookup:
        return replace(self, tokens=self.tokens[examples], G=self.G[:, examples])

    def _pieces(self) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries are small beside what is held."""
        _, b, S, d = self.G.shape
        return slices(b, max(1, _COPY_BYTES // max(1, S * d * self.G.element_size())))


@final
@dataclass(frozen=True, eq=False)
class Within(Use):
    """A use of some entries of a parameter that lie together, as of one part of a packed projection.

    Attributes:
        inner: The use of these.
        start: The first of them.
        size: Entries of the parameter.
    """

    inner: Use
    start: int
    size: int

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return self.inner.held

    @property
    @override
    def num_entries(self) -> int:
        return self.size

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return Within, self.start, self.size, self.inner.num_entries, *self.inner.kind

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return self.inner.factors

    @override
    def with_factors(self, *factors: Tensor) -> Within:
        return replace(self, inner=self.inner.with_factors(*factors))

    @property
    def _place(self) -> slice:
        return slice(self.start, self.start + self.inner.num_entries)

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        own = W[:, self._place].contiguous()
        self.inner.pull(V, own)
        W[:, self._place] = own

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        self.inner.push(W[:, self._place].contiguous(), Y)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        own = self.inner.rows(examples)
        R = own.new_zeros(*own.shape[:2], self.size)
        R[:, :, self._place] = own
        return R

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        return self.inner.parts(num_entries)

    @override
    def part(self, which: slice) -> ParameterRows:
        return self.inner.part(which)

    @override
    def at(self, examples: slice) -> Within:
        return replace(self, inner=self.inner.at(examples))


def relabelled(found: Sequence[list[Use]]) -> list[list[Use]]:
    """Number the tokens that occur anew, where a parameter is looked up and nothing else is done with it.

    Columns and rows of J of the table then have the size of what occurs, and not of the vocabulary.

    Args:
        found: The uses of one parameter, for each chunk.
    """
    lookups = [use for uses in found for use in uses if isinstance(use, Lookup)]
    if not lookups or len(lookups) < sum(map(len, found)):
        return list(found)
    tokens = torch.cat([use.tokens.flatten() for use in lookups]).unique()
    return [
        [
            replace(use, tokens=torch.searchsorted(tokens, use.tokens.contiguous()), num_tokens=len(tokens))
            for use in uses
            if isinstance(use, Lookup)
        ]
        for uses in found
    ]


def contraction_cost(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    """Operations for one example in a product with k columns, both halves, with bytes moved in units of operations.

    Of the two contractions the cheaper one. Of a parameter without positions, ``S = i = 1``.
    """
    return min(_by_position(S, o, i, itemsize, q=q, k=k), _by_example(S, o, i, itemsize, q=q, k=k))


def rows_cost(p: int, itemsize: int, *, q: int, k: int) -> float:
    """The same where rows of J are there."""
    return 4.0 * q * p * k + _BALANCE * itemsize * 2 * q * p


def _by_position(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    return 4.0 * S * k * o * (i + q) + _BALANCE * itemsize * S * (4 * k * o + 2 * i)


def _by_example(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    return 4.0 * q * o * i * (S + k) + _BALANCE * itemsize * 2 * (2 * q * o * i + S * i)
