"""Record the spectrum of a kernel while its network trains, from any training loop."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ntk_lazy.columns import check_numbers
from ntk_lazy.dynamics import LossReduction
from ntk_lazy.eigen import EigenResult, Solver, SolveState, eigsh
from ntk_lazy.eigen.arguments import as_seed, as_tolerance, check_progress, check_solver
from ntk_lazy.engines.chunks import parse_budget
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.errors import (
    ArgumentError,
    BudgetError,
    NonFiniteError,
    NotConvergedError,
    ShapeError,
)
from ntk_lazy.kernel import ntk
from ntk_lazy.measures import Measures, Subject
from ntk_lazy.model import OutputFunction, ParameterChoice, as_parameter_choice, check_output_fn
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.outputs import OutputMode, as_output_mode
from ntk_lazy.probes import Probes
from ntk_lazy.record_folder import RecordFolder
from ntk_lazy.records import Provenance, SpectrumRecord, versions
from ntk_lazy.schedule import LogSpaced
from ntk_lazy.setbacks import SETBACKS, in_words, is_setback

_LOG = logging.getLogger(__name__)
_NOT_KEPT: tuple[type[Exception], ...] = (OSError, *SETBACKS)


@final
@dataclass(eq=False)
class SpectrumTracker:
    """Follow the top of the spectrum, and how target, output and residual lie in it, through training.

    One call a snapshot, from any loop::

        tracker = SpectrumTracker(probes, k=200, folder="runs/mine")
        for step in range(num_steps):
            if tracker.due(step):
                tracker.record(model, step, lr=lr, target=y)
            optimiser.step()

    Each solve starts from the vectors of the one before, which pays once the kernel moves slowly. A solve that
    fails becomes a record with ``status="failed"`` and a line in the log: it never ends the training. A measure that
    fails is missing, with its reason in ``failures``, and costs no other. A record that cannot be written, such as on a
    full disk, is kept in memory and written with a later one. What the user's own model raises reaches the user. Model,
    mode, gradients and the global RNG are left as they were.

    Attributes:
        probes: The examples, N of them: a Tensor, an array, or Probes. Often those of the training.
        k: Pairs in each record; all n if there are fewer rows.
        folder: Where ``spectrum.jsonl`` is kept. A folder that holds records already is gone on with, provided that
            they were made with the same probes. One process at a time writes to a folder. None keeps the records in
            memory only.
        schedule: Which steps are due: anything that ``step in schedule`` can be asked of.
        keep_vectors: Whether the pairs of each record are written beside it, ``vectors/step-….safetensors``; needs a
            folder, and lets a resumed run start as warm as an uninterrupted one.
        params: Which parameters make up J, as in ``ntk``.
        outputs: Which outputs make up the rows, as in ``ntk``.
        output_fn: As in ``ntk``.
        memory_budget: As in ``ntk``.
        scratch: As in ``ntk``.
        solver: As in ``eigsh``.
        rtol: As in ``eigsh``.
        seed: Of the solver.
        reduction: How the loss of the training is reduced; moves the stability bound by 2 or by C.
        progress: As in ``eigsh``.
        records: What has been recorded, in the order of recording.
    """

    probes: Any
    k: int = 200
    folder: Path | str | None = None
    schedule: Container[int] = field(default_factory=LogSpaced)
    keep_vectors: bool = False
    params: ParameterChoice = None
    outputs: OutputMode = "full"
    output_fn: OutputFunction | None = None
    memory_budget: int | str | None = None
    scratch: Path | str | None = None
    solver: Solver | Literal["auto"] = "auto"
    rtol: float = 1e-3
    seed: int = 0
    reduction: LossReduction = "half_mean"
    progress: bool | Callable[[SolveState], object] = False
    records: list[SpectrumRecord] = field(default_factory=list, init=False)
    _pairs: EigenResult | None = field(default=None, init=False, repr=False)
    _kept: RecordFolder | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.k = _count(self.k)
        if self.reduction not in get_args(LossReduction):
            known = ", ".join(get_args(LossReduction))
            raise ArgumentError(f"reduction={self.reduction!r} is unknown. Choose from {known}.")
        if self.keep_vectors and self.folder is None:
            raise ArgumentError("keep_vectors needs a folder to keep them in.")
        self.params, self.outputs = as_parameter_choice(self.params), as_output_mode(self.outputs)
        self.rtol, self.seed = as_tolerance(self.rtol), as_seed(self.seed)
        check_output_fn(self.output_fn)
        check_solver(self.solver)
        check_progress(self.progress)
        self.probes = Probes.of(self.probes)
        parse_budget(self.memory_budget, self.probes.inputs.device)
        if self.scratch is not None:
            Scratch.at(self.scratch, self.probes.inputs.device)
        self._fingerprint = self.probes.fingerprint()
        if self.folder is not None:
            self.folder = Path(self.folder)
            self._kept = RecordFolder(self.folder)
            self.records = self._kept.read(fingerprint=self._fingerprint)
            self._pairs = self._kept.latest_pairs(self.records)

    @property
    def pairs(self) -> EigenResult | None:
        """The pairs of the latest successful record, in memory."""
        return self._pairs

    def due(self, step: int) -> bool:
        """Whether the schedule asks for this step and it has not been recorded yet."""
        return step in self.schedule and all(r.step != step for r in self.records)

    @property
    def unsaved(self) -> tuple[SpectrumRecord, ...]:
        """Records that the folder had no room for; the next one writes them, or ``append_record`` to another file."""
        return () if self._kept is None else tuple(self._kept.unsaved)

    def close(self) -> None:
        """Let another process write to the folder; otherwise it may when this tracker, or its process, has gone."""
        if self._kept is not None:
            self._kept.close()

    @torch.no_grad()
    def record(
        self, model: nn.Module, step: int, *, lr: float | None = None, target: Tensor | ArrayLike | None = None
    ) -> SpectrumRecord:
        """Solve for the top pairs, measure what they say, and append it all as one line.

        Args:
            model: The network as it is now.
            step: What the caller counts.
            lr: δ of the coming step of full-batch gradient descent; with it ``stability`` is measured, and with a
                target also the error of the first-order step, exact if the probes are the training set.
            target: y on the probes, ``(N,)`` or ``(N, C)``, a Tensor, an array or a list; with it the energies of
                target and residual, the loss and the spectral position are measured.

        Returns:
            The record, whether or not the solve succeeded.

        Cost: one eigensolve, the exact trace (one gradient an example), and a few single products.

        Raises:
            ArgumentError: The target is no array of numbers, or holds the labels of classes. The folder is in use by
                another process, or by a later tracker of this one. The model does not fit the probes or the settings,
                as long as no record has succeeded; later it makes a failed record.
            ShapeError: The target does not fit the probes or the outputs.
            UnsupportedModuleError: The model has no kernel, as long as no record has succeeded; later, such as in train
                mode with dropout by mistake, it makes a failed record.
        """
        target, rate = _target(target), _rate(lr)
        if target is not None and target.shape[:1] != (self.probes.num_examples,):
            raise ShapeError(
                f"the target has shape {tuple(target.shape)}, but there are {self.probes.num_examples} probes."
            )
        if self._kept is not None:
            self._kept.claim()
        started = time.perf_counter()
        K: NTKLinearOperator | None = None
        try:
            K = self._kernel(model)
        except SETBACKS as error:
            if not is_setback(error) or (_is_misuse(error) and not any(r.is_usable for r in self.records)):
                raise
            known = _failed(0, error)
        else:
            self._check_target(K, target)
            known = self._observe(model, K, step, rate, target)
        known["cost"] = {**known.get("cost", {}), "record_seconds": time.perf_counter() - started}
        record = SpectrumRecord(step=step, **known, provenance=self._provenance(K))
        if not record.is_usable:
            _LOG.warning("no spectrum at step %d: %s", step, record.message)
        self.records.append(record)
        if self._kept is not None:
            self._kept.append(record)
        return record

    def _kernel(self, model: nn.Module) -> NTKLinearOperator:
        return ntk(
            model,
            self.probes,
            params=self.params,
            outputs=self.outputs,
            output_fn=self.output_fn,
            memory_budget=self.memory_budget,
            scratch=self.scratch,
        )

    def _check_target(self, K: NTKLinearOperator, target: Tensor | None) -> None:
        """Refuse a target before the solve: no later step would cure it."""
        if target is not None and target.numel() != K.num_examples * K.num_outputs:
            raise ShapeError(
                f"the target has shape {tuple(target.shape)}, but the model returns {K.num_outputs} outputs for each "
                f"of {K.num_examples} probes."
            )

    def _observe(
        self, model: nn.Module, K: NTKLinearOperator, step: int, lr: float | None, target: Tensor | None
    ) -> dict[str, Any]:
        """Solve and measure; what fails is said in the fields of the record."""
        pairs: EigenResult | None = None
        try:
            pairs = self._solve(K)
            if not pairs.values.numel():
                raise NotConvergedError(f"no pair was found: {pairs.status}", result=pairs)
        except SETBACKS as error:
            if not is_setback(error):
                raise
            pairs, known = None, _failed(K.shape[0], error)
        else:
            self._pairs = pairs
            known = {"num_rows": K.shape[0], **_of_pairs(pairs), **self._keep(pairs, step)}
        subject = Subject(
            model=model,
            kernel=K,
            inputs=self.probes.inputs,
            params=self.params,
            output_fn=self.output_fn,
            outputs=self.outputs,
            reduction=self.reduction,
            seed=self.seed,
        )
        found = Measures.take(subject, pairs, lr=lr, target=target)
        known |= {"energies": found.energies, "scalars": found.scalars, "errors": found.errors}
        known["failures"] = {**known["failures"], **found.failures}
        if found.unexpected and pairs is not None:
            reasons = [f"{reason} ({', '.join(names)})" for reason, names in found.unexpected.items()]
            known["message"] += f"; not measured: {'; '.join(reasons)}"
            _LOG.warning("step %d: %s", step, known["message"])
        return known

    def _solve(self, K: NTKLinearOperator) -> EigenResult:
        start = None
        if self._pairs is not None and self._pairs.vectors.shape[0] == K.shape[0]:
            start = self._pairs.vectors.to(K.device, K.dtype)
        k = min(self.k, K.shape[0])
        return eigsh(
            K,
            k,
            solver=self.solver,
            rtol=self.rtol,
            start=start,
            seed=self.seed,
            on_unconverged="return",
            progress=self.progress,
        )

    def _keep(self, pairs: EigenResult, step: int) -> dict[str, Any]:
        """Write the pairs beside the records; return the fields of the record that say where, or why not."""
        if not self.keep_vectors or self._kept is None:
            return {"vectors": None, "failures": {}}
        try:
            return {"vectors": self._kept.keep(pairs, step), "failures": {}}
        except _NOT_KEPT as error:
            if not (isinstance(error, OSError) or is_setback(error)):
                raise
            _LOG.warning("the pairs of step %d cannot be written: %s", step, error)
            return {"vectors": None, "failures": {"vectors": in_words(error)}}

    def _provenance(self, K: NTKLinearOperator | None) -> Provenance:
        device = self.probes.inputs.device if K is None else K.device
        name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
        return Provenance(
            versions=versions(),
            seed=self.seed,
            probes=self._fingerprint,
            num_examples=self.probes.num_examples,
            device=name,
            dtype="" if K is None else str(K.dtype).removeprefix("torch."),
        )


def _count(k: Any) -> int:
    """Read the number of pairs; an integer of NumPy is one."""
    if not isinstance(k, bool):
        try:
            count = operator.index(k)
        except TypeError:
            pass
        else:
            if count >= 1:
                return count
    raise ArgumentError(f"k must be an integer of at least 1, not {k!r}.")


def _is_misuse(error: BaseException) -> bool:
    """Whether an error is of the model or the settings: the state of a training, and of a machine, may mend itself."""
    return isinstance(error, ArgumentError) and not isinstance(error, NonFiniteError | BudgetError)


def _target(target: Tensor | ArrayLike | None) -> Tensor | None:
    """Read a target of any kind."""
    if target is None:
        return None
    try:
        values = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"the target must be a Tensor, an array or a list of numbers, not this {type(target).__name__}: {error}"
        ) from error
    check_numbers(values, name="target")
    return values


def _rate(lr: Any) -> float | None:
    """Read a learning rate of any kind; one that no step can be taken with costs the numbers that need it."""
    if lr is None:
        return None
    try:
        return float(lr)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"lr must be a number, not {lr!r}.") from error


def _of_pairs(pairs: EigenResult) -> dict[str, Any]:
    """Return the fields of a record that the solver alone decides."""
    return {
        "status": "converged" if pairs.status == "converged" else "partial",
        "message": f"{pairs.status}; completeness: {pairs.completeness.method}",
        "values": tuple(pairs.values.tolist()),
        "residual_norms": tuple(pairs.residual_norms.tolist()),
        "converged": tuple(pairs.converged.tolist()),
        "noise_floor": float(pairs.noise_floor),
        "cost": {
            "block_calls": float(pairs.cost.block_calls),
            "columns": float(pairs.cost.columns),
            "seconds": float(pairs.cost.seconds),
            "peak_bytes": float(pairs.cost.peak_bytes),
        },
    }


def _failed(num_rows: int, error: BaseException) -> dict[str, Any]:
    """Return the fields of a record that claims nothing."""
    return {
        "num_rows": num_rows,
        "status": "failed",
        "message": in_words(error),
        "values": (),
        "residual_norms": (),
        "converged": (),
        "noise_floor": math.nan,
        "failures": {"pairs": in_words(error)},
    }
