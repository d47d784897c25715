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

from ntk_lazy.alignment import kernel_target_alignment
from ntk_lazy.dynamics import LossReduction, stability
from ntk_lazy.eigen import EigenResult, Solver, SolveState, eigsh
from ntk_lazy.eigen.arguments import as_seed, as_tolerance, check_progress, check_solver
from ntk_lazy.engines.chunks import parse_budget
from ntk_lazy.engines.scratch import Scratch
from ntk_lazy.errors import (
    ArgumentError,
    BudgetError,
    NonFiniteError,
    NotConvergedError,
    NTKLazyError,
    ShapeError,
)
from ntk_lazy.estimate import effective_rank, frobenius_norm, trace
from ntk_lazy.kernel import ntk
from ntk_lazy.learning import Learning
from ntk_lazy.model import FunctionalModel, OutputFunction, ParameterChoice, as_parameter_choice, check_output_fn
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.outputs import OutputMode, as_output_mode
from ntk_lazy.precision import ieee_precision
from ntk_lazy.probes import Probes
from ntk_lazy.records import Provenance, SpectrumRecord, append_record, read_records, versions
from ntk_lazy.schedule import LogSpaced

_LOG = logging.getLogger(__name__)
# What a solve may end with that is no fault of the training loop. An exception of the user's model is not among them.
_SOLVE_ERRORS: tuple[type[Exception], ...] = (
    NTKLazyError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    torch.OutOfMemoryError,
    MemoryError,
)


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
    fails becomes a record with ``status="failed"`` and a line in the log: it never ends the training. What the
    user's own model raises reaches the user. Model, mode, gradients and the global RNG are left as they were.

    Attributes:
        probes: The examples, N of them: a Tensor, an array, or Probes. Often those of the training.
        k: Pairs in each record; all n if there are fewer rows.
        folder: Where ``spectrum.jsonl`` is kept. A folder that holds records already is gone on with, provided that
            they were made with the same probes. None keeps the records in memory only.
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
            self.folder.mkdir(parents=True, exist_ok=True)
            self._go_on(self.folder)

    @property
    def pairs(self) -> EigenResult | None:
        """The pairs of the latest successful record, in memory."""
        return self._pairs

    def due(self, step: int) -> bool:
        """Whether the schedule asks for this step and it has not been recorded yet."""
        return step in self.schedule and all(r.step != step for r in self.records)

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
            ArgumentError: The target is no array of numbers. The model does not fit the probes or the settings, as long
                as no record has succeeded; later it makes a failed record.
            ShapeError: The target does not fit the probes or the outputs.
            UnsupportedModuleError: The model has no kernel, as long as no record has succeeded; later, such as in train
                mode with dropout by mistake, it makes a failed record.
        """
        target = _target(target)
        if target is not None and target.shape[:1] != (self.probes.num_examples,):
            raise ShapeError(
                f"the target has shape {tuple(target.shape)}, but there are {self.probes.num_examples} probes."
            )
        started = time.perf_counter()
        K: NTKLinearOperator | None = None
        try:
            K = self._kernel(model)
        except _SOLVE_ERRORS as error:
            if _is_misuse(error) and not any(r.is_usable for r in self.records):
                raise
            known = _failed(0, error)
        else:
            self._check_target(K, target)
            known = self._observe(model, K, step, lr, target)
        known["cost"] = {**known.get("cost", {}), "record_seconds": time.perf_counter() - started}
        record = SpectrumRecord(step=step, **known, provenance=self._provenance(K))
        if not record.is_usable:
            _LOG.warning("no spectrum at step %d: %s", step, record.message)
        self.records.append(record)
        if isinstance(self.folder, Path):
            append_record(self.folder / "spectrum.jsonl", record)
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
        try:
            pairs = self._solve(K)
            if not pairs.values.numel():
                raise NotConvergedError(f"no pair was found: {pairs.status}", result=pairs)
        except _SOLVE_ERRORS as error:
            return _failed(K.shape[0], error)
        self._pairs = pairs
        known = {"num_rows": K.shape[0], "vectors": self._keep(pairs, step), **_of_pairs(pairs)}
        try:
            known |= self._measure(model, K, pairs, lr, target)
        except _SOLVE_ERRORS as error:
            # The pairs are good and dear: they are kept without what could not be measured of them.
            known["message"] += f"; not measured: {type(error).__name__}: {error}"
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

    def _measure(
        self, model: nn.Module, K: NTKLinearOperator, pairs: EigenResult, lr: float | None, target: Tensor | None
    ) -> dict[str, Any]:
        """Measure everything that the pairs and a few products give."""
        norm = frobenius_norm(K, pairs=pairs, seed=self.seed)
        total = trace(K)
        rank = effective_rank(K, trace=total, frobenius=norm)
        scalars = {"trace": total.value, "frobenius_norm": norm.value, "effective_rank": rank.value}
        errors = {"frobenius_norm": norm.standard_error, "effective_rank": rank.standard_error}
        energies: dict[str, tuple[float, ...]] = {}
        if lr is not None:
            edge = stability(
                pairs, lr, num_examples=K.num_examples, num_outputs=K.num_outputs, reduction=self.reduction
            )
            scalars |= {"lr": lr, "stability": edge.value, "critical_eigenvalue": edge.critical_eigenvalue}
        if target is not None:
            with ieee_precision():
                learning = Learning.of(
                    FunctionalModel.from_module(model, params=self.params, output_fn=self.output_fn),
                    K,
                    self.probes.inputs,
                    target,
                    outputs=self.outputs,
                    reduction=self.reduction,
                )
                energies, scalars["loss"] = learning.energies(pairs), learning.loss
                if bool((learning.target != 0).any()):
                    aligned = kernel_target_alignment(K, learning.target, frobenius=norm)
                    scalars["kernel_target_alignment"] = aligned.value
                    errors["kernel_target_alignment"] = aligned.standard_error
                if learning.loss > 0:
                    scalars["spectral_position"] = learning.spectral_position(total)
                if lr is not None and self.outputs == "full":
                    scalars |= learning.first_order(lr)
        return {"energies": energies, "scalars": scalars, "errors": errors}

    def _keep(self, pairs: EigenResult, step: int) -> str | None:
        """Write the pairs beside the records; return their place relative to the folder."""
        if not self.keep_vectors or not isinstance(self.folder, Path):
            return None
        name = f"vectors/step-{step:08d}.safetensors"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        pairs.save(path)
        return name

    def _go_on(self, folder: Path) -> None:
        """Take over the records of an earlier process, and the vectors of the last of them."""
        path = folder / "spectrum.jsonl"
        if not path.exists():
            return
        self.records = read_records(path)
        for record in self.records:
            if record.provenance.probes != self._fingerprint:
                raise ArgumentError(
                    f"{path} holds records of other probes ({record.provenance.probes}, and these are "
                    f"{self._fingerprint}). Choose another folder."
                )
        kept = [r.vectors for r in self.records if r.vectors is not None]
        if kept:
            self._pairs = EigenResult.load(folder / kept[-1])

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
        return torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"the target must be a Tensor, an array or a list of numbers, not this {type(target).__name__}: {error}"
        ) from error


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
        "message": f"{type(error).__name__}: {error}",
        "values": (),
        "residual_norms": (),
        "converged": (),
        "noise_floor": math.nan,
    }
