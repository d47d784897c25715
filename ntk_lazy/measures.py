"""Everything that a snapshot says beside its eigenpairs: each number stands or falls alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar, final

from torch import Tensor, nn

from ntk_lazy.alignment import kernel_target_alignment
from ntk_lazy.dynamics import LossReduction, stability
from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import DegenerateError
from ntk_lazy.estimate import Estimate, effective_rank, frobenius_norm, trace
from ntk_lazy.learning import Learning
from ntk_lazy.model import FunctionalModel, OutputFunction, ParameterChoice
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.outputs import OutputMode
from ntk_lazy.precision import ieee_precision
from ntk_lazy.setbacks import SETBACKS, in_words, is_setback

_T = TypeVar("_T")
_ENERGIES: tuple[Literal["target", "output", "residual"], ...] = ("target", "output", "residual")
_OF_LR = ("stability", "critical_eigenvalue")
_OF_STEP = ("first_order_error", "first_order_cosine")
_OF_TARGET = (*(f"energies.{name}" for name in _ENERGIES), "loss", "kernel_target_alignment", "spectral_position")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is measured, and how its training counts.

    Attributes:
        model: The network.
        kernel: Its kernel on the probes.
        inputs: The probes.
        params: As in ``ntk``.
        output_fn: As in ``ntk``.
        outputs: Which outputs make up the rows.
        reduction: How the loss of the training is reduced.
        seed: Of the stochastic estimates.
    """

    model: nn.Module
    kernel: NTKLinearOperator
    inputs: Tensor
    params: ParameterChoice
    output_fn: OutputFunction | None
    outputs: OutputMode
    reduction: LossReduction
    seed: int


@final
@dataclass
class Measures:
    """What was found, and why the rest was not.

    Attributes:
        energies: Cumulative energies by name.
        scalars: Numbers by name.
        errors: Standard errors of those that are estimates.
        failures: Reason of each that was asked for and is missing; an energy is ``energies.NAME``.
        unexpected: The names of those that failed, by reason; the others are not defined, as for a zero target.
    """

    energies: dict[str, tuple[float, ...]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def take(
        cls, subject: Subject, pairs: EigenResult | None, *, lr: float | None = None, target: Tensor | None = None
    ) -> Measures:
        """Measure all that pairs, a learning rate and a target allow; without pairs, what needs none.

        Cost: the exact trace (one gradient an example), and a few single products.
        """
        found = cls()
        K = subject.kernel
        norm = found.estimate("frobenius_norm", lambda: frobenius_norm(K, pairs=pairs, seed=subject.seed))
        total = found.estimate("trace", lambda: trace(K))
        found.estimate(
            "effective_rank",
            lambda: effective_rank(K, trace=_needed(total, "trace"), frobenius=_needed(norm, "frobenius_norm")),
        )
        if lr is not None:
            found.scalars["lr"] = lr
            with found.attempt(*_OF_LR):
                found.of_learning_rate(subject, pairs, lr)
        if target is not None:
            with ieee_precision():
                found.of_target(subject, pairs, target, lr=lr, norm=norm, total=total)
        return found

    def of_learning_rate(self, subject: Subject, pairs: EigenResult | None, lr: float) -> None:
        """Compare the learning rate with the edge of stability."""
        K = subject.kernel
        edge = stability(
            _needed(pairs, "the eigenpairs"),
            lr,
            num_examples=K.num_examples,
            num_outputs=K.num_outputs,
            reduction=subject.reduction,
        )
        self.put("stability", edge.value)
        self.put("critical_eigenvalue", edge.critical_eigenvalue)

    def of_target(
        self,
        subject: Subject,
        pairs: EigenResult | None,
        target: Tensor,
        *,
        lr: float | None,
        norm: Estimate | None,
        total: Estimate | None,
    ) -> None:
        """Measure how target, output and residual lie, and what the next step does."""
        K, learning = subject.kernel, None
        with self.attempt(*_OF_TARGET, *(_OF_STEP if lr is not None else ())):
            learning = Learning.of(
                FunctionalModel.from_module(subject.model, params=subject.params, output_fn=subject.output_fn),
                K,
                subject.inputs,
                target,
                outputs=subject.outputs,
                reduction=subject.reduction,
            )
        if learning is None:
            return
        for name in _ENERGIES:
            if not self._is_zero(learning, name, f"energies.{name}"):
                with self.attempt(f"energies.{name}"):
                    self.energies[name] = learning.energy(name, _needed(pairs, "the eigenpairs"))
        with self.attempt("loss"):
            self.put("loss", learning.loss)
        if not self._is_zero(learning, "target", "kernel_target_alignment"):
            self.estimate(
                "kernel_target_alignment",
                lambda: kernel_target_alignment(K, learning.target, frobenius=_needed(norm, "frobenius_norm")),
            )
        if not self._is_zero(learning, "residual", "spectral_position"):
            with self.attempt("spectral_position"):
                self.put("spectral_position", learning.spectral_position(_needed(total, "trace")))
        if lr is not None:
            with self.attempt(*_OF_STEP):
                self.of_step(learning, lr)

    def of_step(self, learning: Learning, lr: float) -> None:
        """Compare the coming step with its first order."""
        if learning.outputs != "full":
            self.failures |= dict.fromkeys(_OF_STEP, "needs outputs='full'")
            return
        step = learning.first_order(lr)
        if not step:
            self.failures |= dict.fromkeys(_OF_STEP, "the step changes nothing")
        for name, value in step.items():
            self.put(name, value)

    @contextmanager
    def attempt(self, *names: str) -> Iterator[None]:
        """Note the reason why some numbers could not be measured, and go on."""
        try:
            yield
        except SETBACKS as error:
            if not is_setback(error):
                raise
            self._fail(names, in_words(error))
        except ArithmeticError as error:  # a scale beyond what a double holds
            self._fail(names, in_words(error))

    def estimate(self, name: str, compute: Callable[[], Estimate]) -> Estimate | None:
        """Measure one scalar with its standard error; None if that failed."""
        found: Estimate | None = None
        with self.attempt(name):
            found = compute()
            self.put(name, found.value)
            if name != "trace":  # exact
                self.errors[name] = found.standard_error
        return found if name in self.scalars else None

    def put(self, name: str, value: float) -> None:
        """Note a number, unless it is none."""
        if math.isfinite(value):
            self.scalars[name] = value
        else:
            self._fail((name,), f"it is {value}")

    def _is_zero(self, learning: Learning, function: Literal["target", "output", "residual"], name: str) -> bool:
        """Leave a number out that a function which is zero on all rows does not have."""
        if bool((learning.function(function) != 0).any()):
            return False
        self.failures[name] = f"the {function} is zero"
        return True

    def _fail(self, names: tuple[str, ...], reason: str) -> None:
        missing = [n for n in names if n not in self.scalars and n not in self.failures]
        self.failures |= dict.fromkeys(missing, reason)
        if missing:
            self.unexpected.setdefault(reason, []).extend(missing)


def _needed(found: _T | None, name: str) -> _T:
    """Return what was found before, or fail for want of it."""
    if found is None:
        raise DegenerateError(f"needs {name}, which failed")
    return found
