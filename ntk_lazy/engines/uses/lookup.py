"""Embeddings: a row of a table for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.uses.outer import OutputGradients
from ntk_lazy.engines.uses.use import COPY_BYTES, Coefficients, ParameterColumns, ParameterRows, Use


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

    @property
    @override
    def division(self) -> tuple[object, ...]:
        # As the weight of a layer is divided: a table may be both, at the two ends of a model.
        return "rows of the weight", self.num_tokens, self.G.shape[3]

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        return slices(self.num_tokens, max(1, num_entries // self.G.shape[3]))

    @override
    def part(self, which: slice) -> ParameterRows:
        count = which.stop - which.start
        is_inside = (self.tokens >= which.start) & (self.tokens < which.stop)
        # A last row for all other tokens.
        tokens = torch.where(is_inside, self.tokens - which.start, count)
        return replace(self, tokens=tokens, num_tokens=count + 1).rows()[..., : count * self.G.shape[3]]

    @override
    def at(self, examples: slice) -> Lookup:
        return replace(self, tokens=self.tokens[examples], G=self.G[:, examples])

    def _pieces(self) -> Iterator[slice]:
        """Cut the chunk into pieces whose temporaries are small beside what is held."""
        _, b, S, d = self.G.shape
        return slices(b, max(1, COPY_BYTES // max(1, S * d * self.G.element_size())))


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
