"""Look for eigenvalues that a converged set has missed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.iteration import Space
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.eigen.result import Completeness
from ntk_lazy.linalg import Basis, combine, gram, orthonormalise, rayleigh_ritz
from ntk_lazy.shapes import Block

Verify = Literal["fast", "rigorous", False]

_FAR_BELOW = 0.5  # of the last wanted value: what is seen outside may still be half of what is there
_VISIBLE = 3.0  # weight of what is outside, per column of a probe, beside which one missed direction still shows
_RIGOROUS_EPS = 0.1
_RIGOROUS_FAILURE = 1e-3
_RIGOROUS_COLUMNS = 4


@dataclass(frozen=True)
class Probe:
    """A random block and the number of times it is multiplied.

    Attributes:
        level: What the probe may claim.
        num_columns: Width.
        least_steps: Products of the block that are always made.
        most_steps: Products while a missed vector could hide among those outside the space.
    """

    level: Literal["fast", "rigorous"]
    num_columns: int
    least_steps: int
    most_steps: int

    @property
    def total_columns(self) -> int:
        """Products that it may take."""
        return self.num_columns * self.most_steps


def make_probe(level: Literal["fast", "rigorous"], num_rows: int) -> Probe:
    """Choose width and depth.

    ``"fast"``: two products of eight columns where all that they see stays far below the wanted values and weighs
    little, which found 159 of 159 missed multiplicities in the study behind this default; else up to six. Copies of
    an eigenvalue that outnumber the block of the search, on a spectrum that falls by 5 % from group to group, were
    missed by every fourth probe of four products; those above a tail of ``i^-0.3`` at 50,000 rows by two of three
    probes of two; neither by any of six.

    ``"rigorous"``: deep enough that, for a positive semi-definite operator, the probability of overlooking an
    eigenvalue more than ``1 / (1 - 0.1)`` times the largest one seen is below 1e-3 for any spectrum.

    Source: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2: one random start in
        ``n`` dimensions fails with probability at most ``1.648 √n exp(−√ε (2q − 1))``; a block fails only if
        each of its columns does.
    """
    if level == "fast":
        return Probe("fast", 8, 2, 6)
    each = _RIGOROUS_FAILURE ** (1 / _RIGOROUS_COLUMNS)
    steps = (math.log(1.648 * math.sqrt(num_rows) / each) / math.sqrt(_RIGOROUS_EPS) + 1) / 2
    steps = max(2, math.ceil(steps))
    return Probe("rigorous", _RIGOROUS_COLUMNS, steps, steps)


@dataclass(frozen=True)
class Verdict:
    """What a probe saw.

    Attributes:
        completeness: The claim, if nothing was found.
        missed: Directions that raise one of the values, to be searched; None if there are none.
        next_value: First value that is not wanted, extracted with the help of the probe; a copy of the last wanted
            one shows here.
    """

    completeness: Completeness
    missed: Block | None
    next_value: float


def look_for_missed(
    space: Space,
    theta: Float64[Tensor, " k"],
    *,
    slack: float,
    noise: float,
    probe: Probe,
    product: Product,
    draw: RandomColumns,
) -> Verdict:
    """Add a short block Krylov iteration from random columns to a space, and see whether a value rises.

    An eigenvector that was missed has a part in the random block, and what the space has of it helps: values are
    extracted from both together, which sees neighbours in a plateau that the block alone could not tell apart.

    Args:
        space: What the search has multiplied.
        theta: The values it found.
        slack: Rise, relative to a value, that is not worth another search.
        noise: Rise that rounding can make.
        probe: Width and depth.
        product: The operator.
        draw: Gives the random block.

    Cost: ``probe.total_columns`` products at most, in calls of ``probe.num_columns``, and twice as many long vectors.
    """
    rows = product.rows
    room = rows.total - space.V.shape[1]
    width = min(probe.num_columns, room)
    if width == 0:
        return Verdict(Completeness(method="exhaustive"), None, float("-inf"))
    V, last = space.V, float(theta[-1])
    Z, images = _explore(V, max(last, noise), width=width, probe=probe, product=product, draw=draw)
    cross = gram(V, images.block, rows=rows)
    inner = gram(Z.block, images.block, rows=rows)
    overlap = gram(V, Z.block, rows=rows)
    T = torch.cat([torch.cat([space.T, cross], dim=1), torch.cat([cross.mT, inner], dim=1)])
    M = torch.cat([torch.cat([space.M, overlap], dim=1), torch.cat([overlap.mT, Z.gram_matrix], dim=1)])
    better, Y = rayleigh_ritz(T, M)
    k = theta.numel()
    following = float(better[k]) if better.numel() > k else float("-inf")
    rise = better[:k] - theta
    has_risen = rise > slack * theta.abs() + noise
    outside = float(rayleigh_ritz(inner, Z.gram_matrix)[0][0])
    relative = outside / last if last else float("nan")
    if bool(has_risen.any()):
        U, _, _ = torch.linalg.svd(Y[V.shape[1] :, :k][:, has_risen], full_matrices=False)
        missed = combine(Z.block, U[:, : probe.num_columns])
        return Verdict(Completeness(method="none", columns=Z.size, largest_outside=relative), missed, following)
    is_rigorous = probe.level == "rigorous" and last > noise
    return Verdict(
        Completeness(
            method=probe.level,
            columns=Z.size,
            largest_outside=relative,
            factor=(1 + slack + noise / last) / (1 - _RIGOROUS_EPS) if is_rigorous else float("inf"),
            failure_probability=_RIGOROUS_FAILURE if is_rigorous else 1.0,
        ),
        None,
        following,
    )


def _explore(
    V: Block, reach: float, *, width: int, probe: Probe, product: Product, draw: RandomColumns
) -> tuple[Basis, Basis]:
    """Multiply a random block outside a space until nothing outside can hide, or as often as the probe may.

    A missed eigenvector has a part of ``width / n`` in the random block; all others together weigh
    ``Σ (μ_i / reach)²`` columns of that size after one product. Where they weigh little and the largest value seen is
    far below, a missed one would have shown. Under a heavy tail it takes more products, each of which weakens the
    others by what is seen of their largest value.

    Args:
        V: The space, orthonormal.
        reach: The last wanted value.
        width: Columns of the block.
        probe: Least and most products.
        product: The operator.
        draw: Gives the random block.

    Returns:
        The basis that was built, and its images.
    """
    rows = product.rows
    room = rows.total - V.shape[1]
    Z = Basis(rows, dtype=V.dtype, device=V.device, capacity=probe.total_columns)
    images = Basis(rows, dtype=V.dtype, device=V.device, capacity=probe.total_columns, has_gram=False)
    block, weight = draw(width), 0.0
    for step in range(probe.most_steps):
        if Z.size == room:
            break
        made = orthonormalise(block, [V, Z.block], rows=rows, width=min(width, room - Z.size), draw=draw)
        if step == 1:
            weight = room * float(made.R.square().sum()) / width
        Z.append(made.Q)
        block = product(made.Q)
        images.append(block)
        seen = max(0.0, float(rayleigh_ritz(gram(Z.block, images.block, rows=rows), Z.gram_matrix)[0][0]))
        if step + 1 < probe.least_steps or seen > _FAR_BELOW * reach:
            continue
        weakened = weight * (seen / reach) ** (2 * step - 2) if reach else 0.0
        if weakened <= _VISIBLE * width * reach**2:
            break
    return Z, images
