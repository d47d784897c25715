"""Every setting of a study, the presets, and how a TOML file and flags override them."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch

from ntk_lazy.errors import ArgumentError

# Below this, 1 % of the steps is over before lambda_1 has climbed to the edge of stability.
MIN_STEPS_FOR_EARLY_CLAIM = 20_000

_EARLY_STEPS = (10, 30)
_AFTER_HALVING = (100, 250, 500)
_LATE_IN_PHASE = (0.6, 0.75, 0.9)


def _setting(default: Any, help_text: str) -> Any:
    """Declare a field together with the sentence that ``--help`` shows."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def check_seed(seed: int) -> None:
    """Refuse a seed that a generator of torch or NumPy would.

    Raises:
        ArgumentError: It is negative or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed must lie in 0..2**63-1, not {seed}.")


@final
@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The settings of one study; two studies with equal settings give equal results up to rounding.

    Raises:
        ArgumentError: A value that no study can be run with; the message names the setting.
    """

    image: str = _setting("flower.jpg", "flower.jpg, china.jpg, analytic, or a picture file of your own")
    blur: float = _setting(3.0, "standard deviation of the Gaussian blur, in pixels")
    num_points: int = _setting(2_000, "training points N, drawn uniformly from the pixels")
    num_test_points: int = _setting(2_000, "points that the network never sees")
    num_layers: int = _setting(6, "weight layers")
    width: int = _setting(96, "units in each hidden layer")
    negative_slope: float = _setting(0.01, "slope of the Leaky-ReLU below zero")
    lr: float = _setting(0.25, "learning rate delta of the first phase")
    steps: int = _setting(6_000, "steps of full-batch gradient descent")
    halvings: tuple[int, ...] = _setting((4_000,), "steps at which the learning rate is halved")
    num_pairs: int = _setting(200, "eigenpairs k in every snapshot")
    rtol: float = _setting(1e-3, "residual allowed, relative to each eigenvalue")
    snapshots: tuple[int, ...] = _setting((), "steps at which the spectrum is taken; derived when empty")
    num_pictures: int = _setting(6, "eigenfunctions drawn on the full pixel grid")
    seed: int = _setting(0, "seed of the points, of the weights and of the eigensolver")
    device: str = _setting("cpu", "device of training and of products, such as cpu or cuda")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        for name in ("num_points", "num_test_points", "num_layers", "width", "num_pairs", "steps"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("lr", "rtol"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name} must be positive and finite, not {getattr(self, name)}.")
        if not 0 <= self.blur < float("inf"):
            raise ArgumentError(f"blur must not be negative, not {self.blur}.")
        if not 0 <= self.negative_slope < 1:
            raise ArgumentError(f"negative_slope must lie in [0, 1), not {self.negative_slope}.")
        if self.num_pairs > self.num_points:
            raise ArgumentError(
                f"num_pairs is {self.num_pairs}, but {self.num_points} points have no more than as many eigenpairs."
            )
        if not 1 <= self.num_pictures <= self.num_pairs:
            raise ArgumentError(f"num_pictures must lie in 1..num_pairs, not {self.num_pictures}.")
        if list(self.halvings) != sorted(set(self.halvings)) or not all(0 < h < self.steps for h in self.halvings):
            raise ArgumentError(f"halvings must rise and lie between 0 and steps={self.steps}, not {self.halvings}.")
        if not all(0 <= s <= self.steps for s in self.snapshots):
            raise ArgumentError(f"snapshots must lie in 0..steps={self.steps}, not {self.snapshots}.")
        check_seed(self.seed)
        if self.dtype not in ("float32", "float64"):
            raise ArgumentError(f"dtype must be float32 or float64, not {self.dtype!r}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of training and of products."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def num_parameters(self) -> int:
        """P, weights and biases of the network."""
        widths = (2, *[self.width] * (self.num_layers - 1), 1)
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """First and last-but-one step of each phase of constant learning rate."""
        edges = (0, *self.halvings, self.steps)
        return tuple(itertools.pairwise(edges))

    @property
    def warm_up(self) -> int:
        """Steps in which lambda_1 still climbs: 1,000, or half of a first phase that is shorter than twice that."""
        return min(1_000, self.phases[0][1] // 2)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the step from ``step`` to ``step + 1``."""
        return self.lr * 0.5 ** sum(step >= h for h in self.halvings)

    def snapshot_steps(self) -> tuple[int, ...]:
        """List the steps at which the spectrum is taken, in order; always the first and the last.

        Unless given, they are log-spaced in the first phase, several on the later half of each but the last phase
        (gradient descent at the edge of stability oscillates with period 2, so that claims about it are
        about means), and close behind each halving, where the residual leaves the top eigenspace.
        """
        if self.snapshots:
            return tuple(sorted({0, self.steps, *self.snapshots}))
        chosen = {0, self.steps, *_EARLY_STEPS}
        if self.steps >= MIN_STEPS_FOR_EARLY_CLAIM:
            chosen |= {self.steps // 100, self.steps // 25}
        first_end = self.phases[0][1]
        chosen |= {m * 10**e for e in range(2, 7) for m in (1, 3) if m * 10**e <= first_end // 2}
        for start, end in self.phases:
            is_last = end == self.steps
            chosen |= {start + round(f * (end - start)) for f in (_LATE_IN_PHASE[1:2] if is_last else _LATE_IN_PHASE)}
            if not is_last:
                chosen.add(end - 1)
            if start:
                chosen |= {start + d for d in _AFTER_HALVING if start + d < end}
        return tuple(sorted(s for s in chosen if 0 <= s <= self.steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values that JSON and TOML can hold."""
        return {
            f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, base: StudyConfig | None = None) -> StudyConfig:
        """Override settings by name, each with a value of the setting's own type.

        Raises:
            ArgumentError: An unknown name or a value of another type.
        """
        base = cls() if base is None else base
        fields = {f.name: f for f in dataclasses.fields(cls)}
        changes = {}
        for name, value in values.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}."
                raise ArgumentError(f"unknown setting {name!r}; {hint}")
            changes[name] = _coerce(name, value, like=fields[name].default)
        return dataclasses.replace(base, **changes)

    def is_like(self, other: StudyConfig, *, but: Collection[str]) -> bool:
        """Whether all settings but some agree, so that two studies compare."""
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine[n] == theirs[n] for n in mine if n not in but)

    def differences(self, other: StudyConfig) -> list[str]:
        """Say in words which settings differ, for the refusal to mix two studies in one folder."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{n}={mine[n]!r} (here {theirs[n]!r})" for n in mine if mine[n] != theirs[n]]


PRESETS: Mapping[str, StudyConfig] = MappingProxyType(
    {
        "demo": StudyConfig(),
        "claims": StudyConfig(steps=30_000, halvings=(10_000, 20_000)),
        "paper": StudyConfig(
            num_points=10_000,
            num_test_points=10_000,
            width=256,
            steps=600_000,
            halvings=(100_000, 200_000, 300_000, 400_000, 500_000),
        ),
        "analytic": StudyConfig(
            image="analytic", num_points=1_000, num_test_points=1_000, width=64, steps=3_000, halvings=(2_000,)
        ),
    }
)


def preset(name: str) -> StudyConfig:
    """Look a preset up by name.

    Raises:
        ArgumentError: There is no such preset.
    """
    if name not in PRESETS:
        raise ArgumentError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}.")
    return PRESETS[name]


def read_toml(path: Path) -> dict[str, Any]:
    """Read overrides from a TOML file; the key ``preset`` is kept for the caller.

    Raises:
        ArgumentError: The file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"cannot read the configuration {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is not valid TOML: {error}.") from error


def _coerce(name: str, value: Any, *, like: Any) -> Any:
    """Accept a value of the type of the default; an integer where a float is meant; a list for a tuple."""
    if isinstance(like, tuple):
        if isinstance(value, list | tuple) and all(type(v) is int for v in value):
            return tuple(value)
        raise ArgumentError(f"{name} must be a list of integers, not {value!r}.")
    if isinstance(like, float) and type(value) is int:
        return float(value)
    if type(value) is not type(like):
        raise ArgumentError(f"{name} must be of type {type(like).__name__}, not {value!r}.")
    return value


def check_device(name: str) -> None:
    """Try a device, apart from the settings: they may well be read where it is missing.

    Raises:
        ArgumentError: Torch does not know it, or nothing can be computed on it here.
    """
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ArgumentError(f"device {name!r} cannot be used here; try cpu or cuda. torch says: {why}") from error
