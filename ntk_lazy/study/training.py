"""Full-batch gradient descent with a halved learning rate, and checkpoints that it resumes from."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ntk_lazy.errors import ArgumentError, NTKLazyError
from ntk_lazy.precision import ieee_precision
from ntk_lazy.study.config import StudyConfig

_CURVE_POINTS = 2_000


def loss_stride(config: StudyConfig) -> int:
    """Return how many steps lie between two losses that are kept."""
    return max(1, config.steps // _CURVE_POINTS)


def known_losses(losses: NDArray[np.float64], config: StudyConfig) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps and values of the losses that are not still to come."""
    known = np.isfinite(losses)
    steps = np.arange(len(losses), dtype=np.int64) * loss_stride(config)
    return steps[known], losses[known]


class DivergedError(NTKLazyError):
    """The training loss is no longer finite; the message says from which step on and what to do."""


@final
class Training:
    """Gradient descent on ``L = 1/(2N) Σ (f(x) − y)²``, the loss whose bound on lambda_1 is ``2N/delta``.

    It has no state but the parameters and the step, so that a resumed run repeats an uninterrupted one to
    the last bit on the same machine with as many threads.

    Attributes:
        model: The network, changed in place by ``advance_to``.
        step: Steps taken.
        seconds: Wall time spent on them, that of earlier processes included.
        losses: The training loss every ``stride`` steps, NaN where it is yet to come.
        stride: Steps between two entries of ``losses``.
    """

    def __init__(self, model: nn.Module, x: Float[Tensor, "n d"], y: Float[Tensor, "n 1"], config: StudyConfig) -> None:
        self.model = model
        self.step = 0
        self.seconds = 0.0
        self.stride = loss_stride(config)
        self.losses = torch.full((config.steps // self.stride + 1,), torch.nan, dtype=torch.float64)
        self._x, self._y, self._config = x, y, config
        self._params = list(model.parameters())

    @property
    def curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and training losses so far."""
        return known_losses(self.losses.numpy(), self._config)

    @property
    def last_loss(self) -> float:
        """The latest loss that was kept; NaN before the first step."""
        known = self.losses[self.losses.isfinite()]
        return float(known[-1]) if len(known) else float("nan")

    def loss(self) -> Float[Tensor, ""]:
        """Evaluate ``1/(2N) Σ (f − y)²`` as a differentiable scalar."""
        return 0.5 * (self.model(self._x) - self._y).square().mean()

    def advance_to(self, step: int) -> None:
        """Take steps until ``step``; does nothing when it is reached already.

        Cost: 6 N P flops a step; the host waits for the device every ``stride`` steps only.

        Raises:
            DivergedError: The loss stopped being finite.
        """
        started = time.perf_counter()
        with ieee_precision(), torch.enable_grad():
            while self.step < step:
                self._take_step()
        self.seconds += time.perf_counter() - started

    def _take_step(self) -> None:
        loss = self.loss()
        grads = torch.autograd.grad(loss, self._params)
        if self.step % self.stride == 0:
            self._note(loss.item())
        lr = self._config.lr_at(self.step)
        with torch.no_grad():
            for parameter, grad in zip(self._params, grads, strict=True):
                parameter.sub_(grad, alpha=lr)
        self.step += 1

    def _note(self, loss: float) -> None:
        if not loss < float("inf"):
            raise DivergedError(
                f"the training loss is {loss} at step {self.step}: the learning rate {self._config.lr} is too large "
                "for this network. Halve it."
            )
        self.losses[self.step // self.stride] = loss

    def state(self) -> dict[str, Tensor]:
        """Copy the parameters by name, on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.model.named_parameters()}

    def save(self, path: Path) -> None:
        """Write parameters, losses and step, so that a reader finds the old file or the new one, never a mixture."""
        write_tensors(
            path,
            {**self.state(), "losses": self.losses},
            metadata={"step": str(self.step), "seconds": str(self.seconds)},
        )

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            ArgumentError: The file does not fit this network or is damaged.
        """
        tensors, found = read_tensors(path)
        try:
            self.losses = tensors.pop("losses")
            self.model.load_state_dict(tensors)
            self.step, self.seconds = int(found["step"]), float(found["seconds"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"the checkpoint {path} does not fit this study: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name and rename it into place.

    Raises:
        OSError: It cannot be written, such as on a full disk; an old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file with its metadata.

    Raises:
        ArgumentError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"cannot read {path}: {error}") from error
