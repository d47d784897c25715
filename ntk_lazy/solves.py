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
"""Rows of K whose eigenvalues stand for those of K. With 256, counts were 3 times too low at a noise of 1e-3."""
MOST_RTOL = 0.5
"""The loosest tolerance that is planned for; linear_operator's own default asks for nothing."""
_GROUPS = 2000  # of eigenvalues that the sample does not resolve
_MOST_ITERATIONS = 10_000
_LEAST_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Solve:
    """A job to plan: ``(K + noise I) X = B`` by conjugate gradients or what is cheaper, as in a Gaussian process.

    Attributes:
        noise: Added to the diagonal, in the units of K; positive.
        right_hand_sides: Columns of B; all of them are multiplied in each iteration.
        rtol: ``‖(K + noise I) x − b‖ <= rtol ‖b‖`` for each column.
        rank: Columns of a randomised Nyström preconditioner, 0 for none.
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

    def preconditioned(self, rank: int) -> Spectrum:
        """Bring the first ones down to the level that a randomised Nyström preconditioner of this rank leaves.

        Of ``r`` columns it knows the first ``q`` pairs well, where ``q`` makes ``λ_{q+1} / (r − q − 1)`` small: one
        half to two thirds of them where eigenvalues decay like a power, nearly all where they drop.

        Source: after Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a positive-semidefinite matrix
            (NIPS 2017), theorem 4.1, with the largest of the eigenvalues that are left in place of their sum.
        """
        if rank < 2:
            return self
        first = self.values.repeat_interleave(self.counts.long())[: rank - 1]
        level = first[(first / torch.arange(rank - 1, 0, -1)).argmin()]
        return Spectrum(self.values.clamp_max(float(level)), self.counts)


@dataclass(frozen=True)
class PredictedSolve:
    """What a solve will take.

    Attributes:
        job: What is solved.
        iterations: Products with all right-hand sides in one solve, those that make the preconditioner not counted.
        most_iterations: What the condition number alone promises; far more where eigenvalues decay fast.
        condition: Estimated condition number of ``K + noise I``, preconditioned.
    """

    job: Solve
    iterations: int
    most_iterations: int
    condition: float

    @classmethod
    def of(cls, job: Solve, spectrum: Spectrum, dtype: torch.dtype) -> PredictedSolve:
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
        eased = spectrum.preconditioned(job.rank)
        condition = 1 + float(eased.values.max()) / job.noise
        root = math.sqrt(condition)
        most = math.ceil(0.5 * root * math.log(2 * root / job.rtol))
        working = torch.float64 if dtype == torch.float64 else torch.float32
        # In units of the noise, so that no dtype overflows for its scale.
        diagonal = (eased.values / job.noise + 1).to(working)
        iterations = _count_iterations(diagonal, eased.counts.sqrt().to(working), job.rtol, limit=_MOST_ITERATIONS)
        return cls(job, most if iterations is None else iterations, most, condition)

    @property
    def num_products(self) -> int:
        """Products with as many columns as there are right-hand sides, those of the preconditioner among them."""
        return self.job.num_solves * self.iterations + math.ceil(self.job.rank / self.job.right_hand_sides)


def cheapest_rank(job: Solve, spectrum: Spectrum, dtype: torch.dtype, *, most: int, known: int = 0) -> int:
    """Choose the rank of a Nyström preconditioner that makes all solves of a job the cheapest.

    Args:
        job: What is solved, and how often; its own rank is not looked at.
        spectrum: Of the kernel.
        dtype: Of the products.
        most: The largest rank that there is memory for.
        known: The rank of a preconditioner that was made before and costs nothing, 0 for none; a larger one costs what
            it has more.

    Returns:
        0, ``known``, ``most``, or a rank below it of 16, 23, 32, 45, 64, ...: half powers of two.

    Cost: conjugate gradients on a diagonal matrix for each of them, a millisecond or so for each ten iterations.
    """
    steps = range(2 * max(most, 1).bit_length())
    ranks = sorted({most, *(rank for step in steps if (rank := round(_LEAST_RANK * 2 ** (step / 2))) < most)})

    def columns(rank: int) -> int:
        iterations = PredictedSolve.of(replace(job, rank=rank), spectrum, dtype).iterations
        return job.num_solves * job.right_hand_sides * iterations + max(0, rank - known)

    best, least = known, columns(known)
    for rank in ranks:
        if rank <= known or rank < _LEAST_RANK:
            continue
        if rank - known >= least:
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
