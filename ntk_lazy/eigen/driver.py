"""The one iteration loop: step, test, probe, certify."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from ntk_lazy.eigen.bounds import error_bounds
from ntk_lazy.eigen.certify import CertifiedPairs, certify
from ntk_lazy.eigen.criterion import Criterion, least_noise
from ntk_lazy.eigen.iteration import Iteration, RitzPairs
from ntk_lazy.eigen.lanczos import BlockKrylov
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.progress import Callback, SolveState
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.eigen.result import Completeness, Cost, EigenResult, Status
from ntk_lazy.eigen.verify import Verify, look_for_missed, make_probe
from ntk_lazy.eigen.write_down import WriteDown
from ntk_lazy.linalg.tiles import TILE_BYTES

_PATIENCE = 8  # steps without progress before residuals of rounding size count as all there is
_FEW_OPERATIONS = 8  # that round in float64 whatever the number of rows
_BLOCKS_IN_FLIGHT = 6  # the copy that goes in, what comes back, its scaled copy, and three while it is orthonormalised
_ROUNDING_SHARE = 0.9  # of the tolerance: what rounding may take for the search to be able to do the rest
_SLACK = 0.25  # of the tolerance: a value that a probe raises by more belonged to another eigenvalue
_STRICTEST = 0.2  # of the tolerance: where a search stops making room for rounding
_NEIGHBOUR = 4.0  # tolerances: the first value that is not wanted, so near the last wanted one, may be mistaken for it
_AT_A_NEIGHBOUR = 0.25  # of the tolerance: what a search goes on to where the two could be mistaken


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is wanted, whatever the method.

    Attributes:
        num_wanted: Pairs.
        rtol: Tolerance, relative to each value.
        seed: Of all random columns.
        verify: Which completeness probe follows.
        fresh_width: Columns of a certifying call; so many pairs are all multiplied afresh.
        method: The solver in words, options filled in.
    """

    num_wanted: int
    rtol: float
    seed: int
    verify: Verify
    fresh_width: int
    method: str


@dataclass
class _Watch:
    """Notices when residuals stop falling."""

    best: float = float("inf")
    idle_steps: int = 0

    def sees_progress(self, excess: float) -> bool:
        """Take the sum of the orders by which residuals exceed their tolerances; say whether to go on."""
        if excess < 0.95 * self.best:
            self.best, self.idle_steps = excess, 0
        else:
            self.idle_steps += 1
        return self.idle_steps < _PATIENCE


@dataclass
class Search:
    """One solve: a method, the operator it multiplies with, and what has been learnt so far."""

    task: Task
    product: Product
    method: Iteration
    draw: RandomColumns
    callback: Callback | None = None
    began: float = field(default_factory=time.perf_counter)
    peak_bytes: int = 0
    completeness: Completeness = field(default_factory=lambda: Completeness(method="none"))
    next_seen: float = float("inf")
    check_columns: int = 0
    search_rtol: float = 0.0
    num_due: int = 0
    way_out: WriteDown | None = None

    @property
    def criterion(self) -> Criterion:
        """The test that pairs must pass, with the noise measured so far."""
        return Criterion(rtol=self.task.rtol, floor=self.product.floor)

    def run(self) -> EigenResult:
        """Iterate until the set is complete, the products are spent, or only rounding is left.

        Cost: the products of the method, those of the probe and those of ``certify``; beside the method's own
            vectors, six blocks of the width of a call and two tiles of float64.
        """
        self.search_rtol = self.task.rtol
        pairs: RitzPairs | None = None
        found: CertifiedPairs | None = None
        watch = _Watch()
        status: Status | None = None
        while status is None:
            self._try_the_way_out()
            if not self.product.affords(self.method.next_width):
                status = "max_products"
                break
            self._note_bytes(_BLOCKS_IN_FLIGHT * self.method.next_width)
            pairs = self.method.step()
            self.product.check_symmetry(pairs.asymmetry)
            self._tell(pairs)
            excess = self._excess(pairs)
            is_stuck = self.method.is_exhaustive or (not watch.sees_progress(excess) and self._is_rounding(pairs))
            if (excess > 0 or self.product.num_columns < self.num_due) and not is_stuck:
                continue
            if not is_stuck and (goal := self._goal(pairs)) < self.search_rtol:
                self._tighten(goal)
                if self.method.next_width:
                    continue
            if self._may_have_missed(pairs):
                watch = _Watch()
                continue
            found = self._certify(pairs)
            status = self._judge(found)
            if status is None and self.method.next_width == 0:
                status = "noise_floor"
            watch = _Watch()
        if pairs is not None and found is None:
            found = self._certify(pairs)
        return self._conclude(pairs, found or self._nothing(), status or "max_products")

    def _try_the_way_out(self) -> None:
        """Go on with the whole matrix where the search has become the dearer way."""
        if self.way_out is None or not isinstance(self.method, BlockKrylov):
            return
        found = self.way_out.take_over(self.method)
        if found is not None:
            self.method, name = found
            self.task = replace(self.task, fresh_width=0, method=f"{name} after {self.task.method}")

    def _excess(self, pairs: RitzPairs) -> float:
        """Sum the orders by which removable residuals exceed tolerances: zero if none does, infinite if pairs lack."""
        k = self.task.num_wanted
        if pairs.theta.numel() < k:
            return float("inf")
        allowed = Criterion(rtol=self.search_rtol, floor=self.product.floor).tolerances(pairs.theta[:k])
        above = pairs.removable[:k] > allowed
        tiny = torch.finfo(torch.float64).tiny
        return float((pairs.removable[:k] / allowed.clamp_min(tiny))[above].log10().sum())

    def _goal(self, pairs: RitzPairs) -> float:
        """Tolerance that a search reaches before its pairs are probed and certified.

        A plateau of values a tolerance apart lets a search take the wrong one of two for the last: its residual is
        within the tolerance of both. And where a tolerance is below one unit of rounding, half of it is left for that.
        """
        k, rtol = self.task.num_wanted, self.task.rtol
        last, floor = abs(float(pairs.theta[k - 1])), self.product.floor
        following = abs(float(pairs.theta[k])) if pairs.theta.numel() > k else 0.0
        if last - following < _NEIGHBOUR * rtol * last:
            return _AT_A_NEIGHBOUR * rtol
        return rtol / 2 if rtol * last < self._unit and last > floor else rtol

    def _tighten(self, rtol: float) -> None:
        """Aim at a smaller tolerance from now on."""
        self.search_rtol = rtol
        self.method.tighten(rtol)

    def _is_rounding(self, pairs: RitzPairs) -> bool:
        """Whether all that exceeds a tolerance is of the size of rounding."""
        k = self.task.num_wanted
        met = self.criterion.met(pairs.theta[:k], pairs.removable[:k])
        is_small = pairs.removable[:k] <= max(self._unit, pairs.rounding)
        return pairs.theta.numel() >= k and bool((met | is_small).all())

    @property
    def _unit(self) -> float:
        """One unit of rounding of the norm."""
        return float(torch.finfo(self.draw.dtype).eps) * self.product.norm

    def _may_have_missed(self, pairs: RitzPairs) -> bool:
        """Probe for missed eigenvalues; whatever is found joins the space. A clean probe is not repeated."""
        task = self.task
        if self.method.is_exhaustive:
            self.completeness = Completeness(method="exhaustive")
            return False
        if task.verify is False or self.completeness.method != "none":
            return False
        probe = make_probe(task.verify, self.product.rows.total)
        if not self.product.affords(probe.total_columns):
            return False
        self._note_bytes(4 * probe.total_columns)
        verdict = look_for_missed(
            self.method.space(),
            pairs.theta[: task.num_wanted],
            slack=_SLACK * task.rtol,
            # One unit of a product, and what the projection, which is float64 in any case, is off by.
            noise=self._unit + least_noise(torch.float64, self.product.rows.total) * self.product.norm,
            probe=probe,
            product=self.product,
            draw=self.draw,
        )
        self.check_columns += verdict.completeness.columns
        self.completeness = verdict.completeness
        self.next_seen = verdict.next_value
        if verdict.missed is None:
            return False
        self.method.inject(verdict.missed)
        # A value that was missed may count as found at once: the others must be multiplied before the next probe.
        self.num_due = self.product.num_columns + verdict.missed.shape[1]
        return True

    def _certify(self, pairs: RitzPairs) -> CertifiedPairs:
        """Spend fresh products on what the search ended with."""
        task = self.task
        self._note_bytes(2 * task.num_wanted + 3 * max(task.fresh_width, 32))
        before = self.product.num_columns
        found = certify(
            pairs,
            task.num_wanted,
            method=self.method,
            product=self.product,
            draw=self.draw,
            criterion=self.criterion,
            fresh_width=task.fresh_width,
        )
        self.check_columns += self.product.num_columns - before
        return found

    def _judge(self, found: CertifiedPairs) -> Status | None:
        """Say how a certified set ends the search; None to go on with a stricter search.

        A residual is made of what the search left and of rounding. Where rounding alone is within the tolerance, the
        search can make room for it.
        """
        met = self.criterion.met(found.theta, found.residuals)
        is_probed = self.task.verify is False or self.completeness.method != "none"
        if bool(met.all()):
            return "converged" if is_probed else "max_products"
        if not found.is_measured:
            return "max_products"
        allowed = self.criterion.tolerances(found.theta)
        # The noise is the difference of two products; a residual has that of one.
        has_room = bool((found.noise / 2**0.5 <= _ROUNDING_SHARE * allowed)[~met].all())
        if self.method.is_exhaustive or not has_room or self.search_rtol < _STRICTEST * self.task.rtol:
            return "noise_floor"
        self._tighten(self.search_rtol / 2)
        return None

    def _conclude(self, pairs: RitzPairs | None, found: CertifiedPairs, status: Status) -> EigenResult:
        """Write the result in the units of the operator."""
        task = self.task
        following = float("inf") if pairs is None else self._next_value(pairs, found.theta.numel())
        scale = self.product.scale
        noise = float(found.noise.max()) if found.noise.numel() else 0.0
        # In units of the scale: squares of values of 1e200 do not exist.
        bounds = error_bounds(found.theta, found.residuals, next_value=following, noise=noise + self._rounding(found))
        return EigenResult(
            values=found.theta * scale,
            vectors=found.X,
            residual_norms=found.residuals * scale,
            converged=self.criterion.met(found.theta, found.residuals),
            status=status,
            noise_floor=self.product.noise_floor,
            norm=self.product.norm * scale,
            completeness=self.completeness,
            bounds=bounds.times(scale),
            cost=Cost(
                block_calls=self.product.num_calls,
                columns=self.product.num_columns,
                search_columns=self.product.num_columns - self.check_columns,
                half_columns=self.product.num_half_columns,
                written_columns=self.product.num_written_columns,
                seconds=time.perf_counter() - self.began,
                peak_bytes=self.peak_bytes,
            ),
            method=task.method,
            rtol=task.rtol,
            seed=task.seed,
        )

    def _rounding(self, found: CertifiedPairs) -> float:
        """Bound what values are off by beside the measured rounding of products.

        The small eigenproblem is solved in float64 by a backward stable method: its values are those of a matrix that
        is off by ``c n eps ‖A‖`` (LAPACK Users' Guide, 4.7.1, takes 1 for c, and 2^-53 for its eps, which is half of
        ours: the other half is for the sums over n rows that a value is made of). Where no product was spent on it,
        the rounding of products is what the noise floor assumes.
        """
        own = (self.product.rows.total + _FEW_OPERATIONS) * torch.finfo(torch.float64).eps * self.product.norm
        return own if found.is_measured else own + self.product.floor

    def _next_value(self, pairs: RitzPairs, k: int) -> float:
        """Bound the first eigenvalue that is not wanted; infinite where it may be a copy of the last wanted one."""
        if k == self.product.rows.total:
            return float("-inf")
        if pairs.theta.numel() <= k:
            return float("inf")
        known = float(pairs.theta[k] + pairs.residuals[k])
        is_known = self.completeness.method == "exhaustive" or self.next_seen <= known
        return known if is_known else float("inf")

    def _nothing(self) -> CertifiedPairs:
        """No pairs at all."""
        none = torch.zeros(0, dtype=torch.float64)
        X = torch.empty(self.product.rows.local, 0, dtype=self.draw.dtype, device=self.draw.device)
        return CertifiedPairs(none, X, none, none, False)

    def _note_bytes(self, num_vectors: int) -> None:
        """Record what is held at this moment."""
        itemsize = self.draw.dtype.itemsize
        held = self.method.held_bytes + num_vectors * self.product.rows.local * itemsize
        self.peak_bytes = max(self.peak_bytes, held + 2 * min(TILE_BYTES, 2 * held))

    def _tell(self, pairs: RitzPairs) -> None:
        """Report to the callback; copies only, so that it cannot change a value."""
        if self.callback is None:
            return
        k = self.task.num_wanted
        met = self.criterion.met(pairs.theta[:k], pairs.residuals[:k])
        scale = self.product.scale
        self.callback(
            SolveState(
                block_calls=self.product.num_calls,
                columns=self.product.num_columns,
                num_wanted=k,
                num_converged=int(met.sum()),
                values=tuple((pairs.theta[:k] * scale).tolist()),
                residual_norms=tuple((pairs.residuals[:k] * scale).tolist()),
                seconds=time.perf_counter() - self.began,
            )
        )
