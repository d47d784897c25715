"""Inner products of the rows of J of a table that is looked up, from the positions at which two examples look up alike.

A row of J of such a table is zero but for the tokens of its example:
``⟨J_i, J_j⟩ = Σ_st [token_is = token_jt] ⟨g_is, g_jt⟩``, whatever the size of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.uses import Lookup, Use
from ntk_lazy.gemm import times_transposed

# A pair of positions is gathered and added by its indices: as long as so many pairs in a matrix product of rows.
_PAIR_COST = 16


@final
@dataclass(frozen=True, eq=False)
class Matches:
    """What some examples look up in one table, with the gradients that come back.

    Attributes:
        tokens: Rows of the table, shape ``(n, S)``.
        G: Gradients at the output.
    """

    tokens: Int[Tensor, "n S"]
    G: Float[Tensor, "n q S d"]

    @classmethod
    def of(cls, chunks: Sequence[list[Use]]) -> Self | None:
        """Join the uses of a table in successive chunks; None where it is used in another way, or not everywhere."""
        parts = []
        for uses in chunks:
            lookups = [use for use in uses if isinstance(use, Lookup)]
            if not lookups or len(lookups) < len(uses):
                return None
            parts.append((torch.cat([u.tokens for u in lookups], 1), torch.cat([u.G for u in lookups], 2)))
        if len({(tokens.shape[1], G.shape[0]) for tokens, G in parts}) != 1:
            return None
        return cls(torch.cat([tokens for tokens, _ in parts]), torch.cat([G.transpose(0, 1) for _, G in parts]))

    @property
    def pair_flops(self) -> int:
        """Operations for one pair of rows of J, at the most."""
        return self.tokens.shape[1] ** 2 * self.G.shape[3]

    def part(self, examples: slice) -> Matches:
        """What some of the examples look up."""
        return Matches(self.tokens[examples], self.G[examples])


def add_matches(left: Matches, right: Matches, out: Float[Tensor, "n1q n2q"], *, num_entries: int) -> None:
    """Add the inner products of all rows of two sides.

    Tokens that most examples have go through matrix products, rare ones pair by pair of positions.

    Args:
        left: Of the rows.
        right: Of the columns.
        out: A tile of K.
        num_entries: Numbers that may be held at once, beside a copy of the tile.

    Cost: ``2 n1 n2 q² d`` operations for each frequent token, and ``2 q² d`` for each pair of positions with one rare
        token in both.
    """
    (n1, q, S1, d), (n2, _, S2, _) = left.G.shape, right.G.shape
    labels, place = torch.cat([left.tokens.flatten(), right.tokens.flatten()]).unique(return_inverse=True)
    places = place.split([n1 * S1, n2 * S2])
    counts = [torch.bincount(p, minlength=len(labels)) for p in places]
    is_frequent = _PAIR_COST * counts[0] * counts[1] > n1 * n2
    frequent = is_frequent.nonzero().squeeze(1)
    for some in slices(len(frequent), max(1, num_entries // max(1, (n1 + n2) * q * d))):
        number = torch.full_like(labels, -1)
        number[frequent[some]] = torch.arange(some.stop - some.start, device=labels.device)
        rows = [
            _dense_rows(G, number[p].view(len(G), -1), some.stop - some.start)
            for G, p in zip((left.G, right.G), places, strict=True)
        ]
        out += times_transposed(*rows)
    _add_pairs(left, right, places, counts, ~is_frequent, out, num_entries=num_entries)


def matched_entries(
    left: Matches, right: Matches, rows1: Tensor, rows2: Tensor, *, num_entries: int
) -> Float[Tensor, " entries"]:
    """Return the inner products of pairs of rows of two sides.

    Cost: ``2 S² d`` operations an entry.
    """
    q, S, d = left.G.shape[1:]
    out = left.G.new_empty(rows1.shape[0])
    for piece in slices(rows1.shape[0], max(1, num_entries // max(1, 2 * S * (S + d)))):
        sides = ((left, rows1[piece]), (right, rows2[piece]))
        (tokens1, G1), (tokens2, G2) = ((side.tokens[rows // q], side.G[rows // q, rows % q]) for side, rows in sides)
        same = tokens1[:, :, None] == tokens2[:, None, :]
        out[piece] = torch.bmm(G1, G2.mT).mul_(same).sum((1, 2))
    return out


def _dense_rows(G: Tensor, number: Tensor, count: int) -> Float[Tensor, "nq w"]:
    """Write rows of J down for some tokens, numbered from 0; what is looked up elsewhere has the number -1."""
    n, q, S, d = G.shape
    R = G.new_zeros(n, q, count + 1, d)  # a last one for all other tokens
    at = torch.where(number < 0, count, number)[:, None, :, None].expand(n, q, S, d)
    return R.scatter_add_(2, at, G)[:, :, :count].reshape(n * q, count * d)


def _add_pairs(
    left: Matches,
    right: Matches,
    places: Sequence[Tensor],
    counts: Sequence[Tensor],
    is_rare: Tensor,
    out: Tensor,
    *,
    num_entries: int,
) -> None:
    """Add the products of all pairs of positions whose token is the same, and rare."""
    (n1, q, S1, d), (n2, _, S2, _) = left.G.shape, right.G.shape
    # Of each position on the left: where its token begins among the sorted positions on the right, and how often it is.
    order = places[1].argsort()
    begins = counts[1].cumsum(0) - counts[1]
    matches = torch.where(is_rare, counts[1], 0)[places[0]]
    ends = matches.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return
    added = out.new_zeros(n1 * n2, q * q)
    for piece in slices(total, max(1, num_entries // max(1, 2 * q * d + q * q))):
        pair = torch.arange(piece.start, piece.stop, device=out.device)
        one = torch.searchsorted(ends, pair, right=True)
        two = order[begins[places[0][one]] + pair - (ends - matches)[one]]
        i, j = one // S1, two // S2
        inner = torch.bmm(left.G[i, :, one % S1], right.G[j, :, two % S2].mT)
        added.index_add_(0, i * n2 + j, inner.flatten(1))
    out += added.view(n1, n2, q, q).permute(0, 2, 1, 3).reshape(n1 * q, n2 * q)
