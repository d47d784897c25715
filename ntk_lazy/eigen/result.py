"""What an eigensolve hands back: plain data that can be printed, saved and loaded."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntk_lazy.eigen.bounds import ErrorBounds
from ntk_lazy.errors import ArgumentError

Status = Literal["converged", "max_products", "noise_floor"]
_FORMAT = "ntk_lazy.EigenResult.1"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What was spent.

    Attributes:
        block_calls: Calls of the operator.
        columns: Products: the operator times one column, those of the checks included.
        search_columns: The products among them that built the space; the others certified what was found.
        half_columns: Half products ``Jᵀ x``, which are not among ``columns``.
        seconds: Wall time.
        peak_bytes: Most bytes of long vectors that the solver held, beside the operator's own.
        written_columns: Columns of the matrix that the operator wrote down by itself, which are not among ``columns``.
    """

    block_calls: int
    columns: int
    search_columns: int
    half_columns: int
    seconds: float
    peak_bytes: int
    written_columns: int = 0


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """What is known about eigenvalues that might have been missed.

    Attributes:
        method: ``"exhaustive"`` (the space was everything), ``"fast"``, ``"rigorous"`` or ``"none"``.
        columns: Products spent on it.
        largest_outside: Largest Ritz value found orthogonal to the searched space, relative to the last value;
            NaN where nothing was measured.
        factor: A missed eigenvalue is at most this many times the last value, but for ``failure_probability``;
            infinite where nothing is claimed.
        failure_probability: Probability, over the random block, that the claim is wrong.
    """

    method: Literal["exhaustive", "fast", "rigorous", "none"]
    columns: int = 0
    largest_outside: float = float("nan")
    factor: float = float("inf")
    failure_probability: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EigenResult:
    """The largest eigenvalues of a symmetric operator and their vectors.

    Attributes:
        values: ``(k,)``, float64 on the CPU, descending. Fewer than asked for only if the search was cut
            short before that many existed.
        vectors: ``(n, k)``, local rows, in the dtype and on the device of the operator.
        residual_norms: ``(k,)``, ``‖A v − lambda v‖``: recomputed by fresh products where the rounding of
            ``v`` matters, else from the products of the search with the measured rounding added.
        converged: ``(k,)``, ``residual_norms <= rtol · |values|``, or, for values that are below the noise floor
            and therefore cannot be told from zero, ``residual_norms <= noise_floor · ‖A‖``.
        status: ``"converged"``; ``"max_products"``, cut short; or ``"noise_floor"``: the rounding of the
            products keeps some residuals above ``rtol``, and no further product will help.
        noise_floor: Size of values that are only rounding, relative to ``norm``: measured, and at least
            eight times the machine precision.
        norm: ``‖A‖``, the largest absolute eigenvalue, from below: the largest that a product or a Ritz value of
            either sign has shown. It is above the first value where negative eigenvalues are larger.
        completeness: What is known about values that were missed.
        bounds: How far values and vectors may be off.
        cost: What was spent.
        method: The solver with every derived option filled in; passing them repeats the solve. "Dense(...) after
            Lanczos(...)" is what ``"auto"`` does with a spectrum that no search is worth.
        rtol: The tolerance.
        seed: The seed.
    """

    values: Float64[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residual_norms: Float64[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    status: Status
    noise_floor: float
    norm: float
    completeness: Completeness
    bounds: ErrorBounds
    cost: Cost
    method: str
    rtol: float
    seed: int

    @property
    def is_below_noise(self) -> Bool[Tensor, " k"]:
        """Which values cannot be told from zero in this arithmetic: they are below ``noise_floor · norm``."""
        return self.values.abs() <= self.noise_floor * self.norm

    def __str__(self) -> str:
        k = self.values.numel()
        if k == 0:
            return f"no eigenpairs: {self.status}"
        relative = self.residual_norms / self.values.abs().clamp_min(torch.finfo(torch.float64).tiny)
        above = ~self.is_below_noise
        worst = float(relative[above].max()) if bool(above.any()) else 0.0
        lines = [
            f"{k} eigenpairs of {self.vectors.shape[0]} rows, {self.status}: {int(self.converged.sum())} within "
            f"rtol {self.rtol:.0e}",
            f"  values       {float(self.values[0]):.6e} .. {float(self.values[-1]):.6e}",
            f"  residuals    at most {worst:.1e} of the value; noise floor {self.noise_floor:.1e} of the norm",
            f"  completeness {self._completeness_in_words()}",
            f"  cost         {self._written_in_words()}{self.cost.columns} products in {self.cost.block_calls} "
            f"block calls, {self.cost.seconds:.2f} s, {self.cost.peak_bytes / 2**20:.1f} MiB, {self.method}",
        ]
        num_noise = int((~above).sum())
        if num_noise:
            lines.insert(3, f"  {num_noise} values lie below the noise floor: they cannot be told from zero")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tensors and metadata to one safetensors file; it appears whole or not at all.

        Raises:
            FileNotFoundError: There is no folder to write it into.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"no such folder: {target.parent}. Make it before {target.name} is saved there.")
        tensors = {
            "values": self.values,
            "vectors": self.vectors.cpu().contiguous(),
            "residual_norms": self.residual_norms,
            "converged": self.converged,
            "bounds.value": self.bounds.value,
            "bounds.angle": self.bounds.angle,
        }
        about = {
            "status": self.status,
            "noise_floor": self.noise_floor,
            "norm": self.norm,
            "completeness": asdict(self.completeness),
            "bounds": {"space_angle": self.bounds.space_angle, "residual_norm": self.bounds.residual_norm},
            "cost": asdict(self.cost),
            "method": self.method,
            "rtol": self.rtol,
            "seed": self.seed,
        }
        partial = target.with_name(target.name + ".partial")
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                partial,
                metadata={"format": _FORMAT, "about": json.dumps(about)},
            )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> EigenResult:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArgumentError: The file is truncated or is not of this kind.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ArgumentError(f"{path} does not hold eigenpairs: its format is not {_FORMAT}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArgumentError(f"{path} is truncated or not a safetensors file: {error}") from error
        about = json.loads(metadata["about"])
        # Files of earlier versions do not have it; then it was taken to be the largest value.
        about.setdefault("norm", float(tensors["values"].abs().max()) if tensors["values"].numel() else 0.0)
        bounds = ErrorBounds(value=tensors["bounds.value"], angle=tensors["bounds.angle"], **about.pop("bounds"))
        return cls(
            values=tensors["values"],
            vectors=tensors["vectors"].to(device),
            residual_norms=tensors["residual_norms"],
            converged=tensors["converged"],
            completeness=Completeness(**about.pop("completeness")),
            bounds=bounds,
            cost=Cost(**about.pop("cost")),
            **about,
        )

    def _written_in_words(self) -> str:
        """Say whether the operator wrote the matrix down."""
        return f"{self.cost.written_columns} columns written down, " if self.cost.written_columns else ""

    def _completeness_in_words(self) -> str:
        """Say in one line what is known about missed values."""
        known = self.completeness
        if known.method == "exhaustive":
            return "certain, the whole space was searched"
        if known.method == "none":
            return "not checked"
        text = f"{known.method} probe of {known.columns} products found nothing"
        if known.method == "rigorous":
            text += f"; nothing above {known.factor:.3f} of the last value but for p = {known.failure_probability:.0e}"
        return text
