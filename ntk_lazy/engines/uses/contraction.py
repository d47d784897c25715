"""What the contractions of factors cost, by position and by example; the cheaper one is taken."""

from __future__ import annotations

# Bytes moved cost as much as so many operations of a matrix product.
_BALANCE = 12.0


def contraction_cost(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    """Operations for one example in a product with k columns, both halves, with bytes moved in units of operations.

    Of the two contractions the cheaper one. Of a parameter without positions, ``S = i = 1``.
    """
    return min(by_position(S, o, i, itemsize, q=q, k=k), by_example(S, o, i, itemsize, q=q, k=k))


def rows_cost(p: int, itemsize: int, *, q: int, k: int) -> float:
    """The same where rows of J are there."""
    return 4.0 * q * p * k + _BALANCE * itemsize * 2 * q * p


def by_position(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    """Both halves as products over all positions."""
    scaled, fixed = (i, o) if scales_input(q, o, i) else (o, i)
    return 4.0 * S * k * scaled * (fixed + q) + _BALANCE * itemsize * S * (4 * k * scaled + 2 * fixed)


def scales_input(q: int, o: int, i: int) -> bool:
    """Whether the input of a layer is narrower than the gradient: one of the two is scaled for each column."""
    return q == 1 and i < o


def by_example(S: int, o: int, i: int, itemsize: int, *, q: int, k: int) -> float:
    """Both halves with rows of J, from positions that are summed first."""
    return 4.0 * q * o * i * (S + k) + _BALANCE * itemsize * 2 * (2 * q * o * i + S * i)
