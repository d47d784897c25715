"""How many products a solve by conjugate gradients takes: found by running it on a spectrum like that of the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.counts import check_count
from ntk_lazy.errors import ArgumentError

SAMPLED_ROWS = 512
"""Least rows of K whose eigenvalues stand for those of K. With 256, counts were 3 times too low at a noise of 1e-3."""
_MOST_SAMPLED_ROWS = 2048
_SAMPLED_SHARE = 1 / 32
MOST_RTOL = 0.5
"""The loosest tolerance that is planned for; linear_operator's own default asks for nothing."""
TYPICAL_STEPS = 50
"""Of conjugate gradients, where a choice has to be made before they are counted."""
COLUMNS_PER_RANK = 1.5
"""Columns of K that are written down for each one of a root: a fifth fewer iterations than with one. With two it is a
quarter, for twice the algebra."""
_CLEARLY_LESS = 0.25  # small captures and small tiles take up to twice as long as is predicted of large ones
_GROUPS = 2000  # of eigenvalues that the sample does not resolve
_MOST_ITERATIONS = 10_000
_LEAST_RANK = 16
# As many operations as matrix products in the dtype of K do in that time. For a root, in float64, times n and the rank
# squared; for the eigendecomposition times the columns cubed; for the inverse times n, the rank and the columns that it
# multiplies, few at a time, at less than half of the rate.
_ROOT_FLOPS = 32.0
_WRITTEN_ROOT_FLOPS = 25.0
_EIGEN_FLOPS = 35.0
_INVERSE_FLOPS = 20.0


@dataclass(frozen=True, kw_only=True)
class Solve:
    """A job to plan: ``(K + noise I) X = B`` by conjugate gradients or what is cheaper, as in a Gaussian process.

    Attributes:
        noise: Added to the diagonal, in the units of K; positive.
        right_hand_sides: Columns of B; all of them are multiplied in each iteration.
        rtol: ``‖(K + noise I) x − b‖ <= rtol ‖b‖`` for each column.
        rank: Of a randomised Nyström preconditioner, 0 for none.
        num_solves: Of one kernel, in a row, as training has them: noise and scale change, and the preconditioner stays.
    """

    noise: float
    right_hand_sides: int = 1
    rtol: float = 1e-2
    rank: int = 0
    num_solves: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.noise, int | float) and 0 < self.noise < math.inf):
            raise ArgumentError(f"noise must be positive and finite, not {self.noise!r}: without it K may be singular.")
        if not (isinstance(self.rtol, int | float) and 0 < self.rtol < 1):
            raise ArgumentError(f"rtol must be between 0 and 1, not {self.rtol!r}.")
        check_count(self.right_hand_sides, "right_hand_sides")
        check_count(self.num_solves, "num_solves")
        if self.rank != 0:
            check_count(self.rank, "rank")


@dataclass(frozen=True)
class ColumnCosts:
    """What else is done with columns of n rows, in columns that K multiplies: one of these takes 1.

    Attributes:
        written: A column of K that is written down.
        flop: An operation, at the rate of matrix products.
        num_rows: n.
    """

    written: float = math.inf
    flop: float = 0.0
    num_rows: int = 0

    @property
    def is_written(self) -> bool:
        """Whether a root is made from columns of K: where these take clearly less than a product with random ones."""
        return COLUMNS_PER_RANK * self.written < _CLEARLY_LESS

    def num_columns(self, rank: int) -> int:
        """Columns that a root of this rank is made from."""
        return math.ceil(COLUMNS_PER_RANK * rank) if self.is_written else rank

    def root(self, rank: int, known: int = 0) -> float:
        """Make the columns for a root, where one of rank ``known`` is there; a product serves one that grows."""
        if rank == known:
            return 0.0
        return self.num_columns(rank) * self.written if self.is_written else float(rank - known)

    def algebra(self, rank: int, known: int = 0) -> float:
        """Make the root from them."""
        if rank == known:
            return 0.0
        each = _WRITTEN_ROOT_FLOPS if self.is_written else _ROOT_FLOPS
        return self.flop * (each * self.num_rows * rank**2 + _EIGEN_FLOPS * self.num_columns(rank) ** 3)

    def inverse(self, rank: int) -> float:
        """Apply the preconditioner to a column."""
        return self.flop * _INVERSE_FLOPS * self.num_rows * rank


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in descending order, in groups.

    Attributes:
        values: Of each group, not negative.
        counts: Eigenvalues in each group.
    """

    values: Float64[Tensor, " groups"]
    counts: Float64[Tensor, " groups"]

    @classmethod
    def of_sample(cls, sampled: Float64[Tensor, " m"], num_rows: int) -> Spectrum:
        """Stretch the eigenvalues of ``m`` random rows and columns of a kernel to all of its ``num_rows``.

        Times ``n / m`` they stand for the first ones of K. The upper half is taken as it is; the others follow a
        power law, which goes on from there and adds up to the rest of the trace.

        Source: Williams and Seeger, Using the Nyström method to speed up kernel machines (NIPS 2000).
        """
        m = sampled.numel()
        values = sampled.to("cpu", torch.float64).sort(descending=True).values.clamp_min(0) * (num_rows / m)
        if m >= num_rows:
            return cls(values, torch.ones_like(values))
        kept = max(1, m // 2)
        ends = torch.logspace(math.log10(kept), math.log10(num_rows), _GROUPS, dtype=torch.float64).round().unique()
        counts, places = ends.diff(), (ends[1:] + ends[:-1]) / (2 * kept)
        last, rest = values[kept - 1], values[kept:].sum()
        least, most = 0.0, 20.0
        for _ in range(50):
            power = (least + most) / 2
            is_slow = bool((counts * last * places**-power).sum() > rest)
            least, most = (power, most) if is_slow else (least, power)
        tail = last * places**-most
        return cls(torch.cat([values[:kept], tail]), torch.cat([torch.ones_like(values[:kept]), counts]))

    def preconditioned(self, rank: int, num_columns: int) -> Spectrum:
        """Bring the first ones down to the level that a randomised Nyström preconditioner of this rank leaves.

        From ``c`` columns it knows the first ``q`` pairs well, where ``q`` makes ``λ_{q+1} / (c − q − 1)`` small: one
        half to two thirds of them where eigenvalues decay like a power, nearly all where they drop. Of these it keeps
        as many as its rank.

        Source: after Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a positive-semidefinite matrix
            (NIPS 2017), theorem 4.1, with the largest of the eigenvalues that are left in place of their sum.
        """
        if rank < 2:
            return self
        values = self.values.repeat_interleave(self.counts.long())
        first = values[: num_columns - 1]
        known = int((first / torch.arange(num_columns - 1, 0, -1)[: len(first)]).argmin())
        level = values[min(known, rank, len(values) - 1)]
        return Spectrum(self.values.clamp_max(float(level)), self.counts)


@dataclass(frozen=True)
class PredictedSolve:
    """What a solve will take.

    Attributes:
        job: What is solved.
        costs: Of columns beside those of products.
        iterations: Products with all right-hand sides in one solve, those that make the preconditioner not counted.
        most_iterations: What the condition number alone promises; far more where eigenvalues decay fast.
        condition: Estimated condition number of ``K + noise I``, preconditioned.
    """

    job: Solve
    costs: ColumnCosts
    iterations: int
    most_iterations: int
    condition: float

    @classmethod
    def of(cls, job: Solve, spectrum: Spectrum, dtype: torch.dtype, costs: ColumnCosts | None = None) -> PredictedSolve:
        """Run conjugate gradients on a diagonal matrix with a spectrum, in the arithmetic of a dtype.

        Rounding is a part of it: directions of large eigenvalues come back when orthogonality to them is lost, and
        float32 took up to four times the iterations of float64. How often they do is a matter of the eigenvalues
        alone. The right-hand side has equal parts in all directions.

        A prediction and not a bound: on four MLPs and a CNN with 700 and 2,000 rows, noise of 1e-4 to 1 of the mean
        diagonal, ``rtol = 1e-2``, random right-hand sides and both dtypes it was 0.74 to 1.5 times the measured count.

        Source: Greenbaum, Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences (Linear Algebra
            Appl. 113, 1989). The bound: Saad, Iterative Methods for Sparse Linear Systems (2003), equation 6.128, from
            the norm of errors to that of residuals. The preconditioner: Frangella, Tropp and Udell, Randomized
            Nyström preconditioning (SIAM J. Matrix Anal. Appl. 44, 2023).
        """
        costs = costs or ColumnCosts()
        eased = spectrum.preconditioned(job.rank, costs.num_columns(job.rank))
        condition = 1 + float(eased.values.max()) / job.noise
        root = math.sqrt(condition)
        most = math.ceil(0.5 * root * math.log(2 * root / job.rtol))
        working = torch.float64 if dtype == torch.float64 else torch.float32
        # In units of the noise, so that no dtype overflows for its scale.
        diagonal = (eased.values / job.noise + 1).to(working)
        iterations = _count_iterations(diagonal, eased.counts.sqrt().to(working), job.rtol, limit=_MOST_ITERATIONS)
        return cls(job, costs, most if iterations is None else iterations, most, condition)

    @property
    def num_products(self) -> int:
        """Products with as many columns as there are right-hand sides.

        That with which each solve measures its residual is among them, and what makes the preconditioner.
        """
        made = math.ceil(self.costs.root(self.job.rank) / self.job.right_hand_sides)
        return self.job.num_solves * (self.iterations + 1) + made

    @property
    def other_columns(self) -> float:
        """What makes and applies the preconditioner beside products, in columns of these."""
        job = self.job
        multiplied = job.num_solves * job.right_hand_sides * self.iterations
        return self.costs.algebra(job.rank) + multiplied * self.costs.inverse(job.rank)


def num_sampled_rows(num_rows: int) -> int:
    """Rows of K whose eigenvalues stand for those of K: with more rows, more eigenvalues are above a noise."""
    return min(num_rows, max(SAMPLED_ROWS, min(int(_SAMPLED_SHARE * num_rows), _MOST_SAMPLED_ROWS)))


def cheapest_rank(
    job: Solve,
    spectrum: Spectrum,
    dtype: torch.dtype,
    *,
    most: int,
    known: int = 0,
    costs: ColumnCosts | None = None,
) -> int:
    """Choose the rank of a Nyström preconditioner that makes all solves of a job the cheapest.

    Args:
        job: What is solved, and how often; its own rank is not looked at.
        spectrum: Of the kernel.
        dtype: Of the products.
        most: The largest rank that there is memory for.
        known: The rank of a preconditioner that was made before and costs nothing, 0 for none. A larger one that comes
            from products costs what it has more.
        costs: Of columns beside those of products; None where products alone count.

    Returns:
        0, ``known``, ``most``, or a rank below it of 16, 23, 32, 45, 64, ...: half powers of two.

    Cost: conjugate gradients on a diagonal matrix for each of them, a millisecond or so for each ten iterations.
    """
    steps = range(2 * max(most, 1).bit_length())
    ranks = sorted({most, *(rank for step in steps if (rank := round(_LEAST_RANK * 2 ** (step / 2))) < most)})

    costs = costs or ColumnCosts()

    def made(rank: int) -> float:
        return costs.root(rank, known) + costs.algebra(rank, known)

    def columns(rank: int) -> float:
        iterations = PredictedSolve.of(replace(job, rank=rank), spectrum, dtype, costs).iterations
        return job.num_solves * job.right_hand_sides * iterations * (1 + costs.inverse(rank)) + made(rank)

    best, least = known, columns(known)
    for rank in ranks:
        if rank <= known or rank < _LEAST_RANK:
            continue
        if made(rank) >= least:
            break  # it costs more than the solves do
        asked = columns(rank)
        if asked < least:
            best, least = rank, asked
    return best


def _count_iterations(diagonal: Tensor, b: Tensor, rtol: float, *, limit: int) -> int | None:
    """Count the steps of conjugate gradients for a diagonal matrix; None where they are too many."""
    r, p = b.clone(), b.clone()
    squared = r @ r
    goal = rtol**2 * squared
    for i in range(limit):
        if squared <= goal:
            return i
        image = diagonal * p
        r = r - (squared / (p @ image)) * image
        before, squared = squared, r @ r
        p = r + (squared / before) * p
    return None
