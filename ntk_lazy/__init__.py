"""The empirical neural tangent kernel of any PyTorch model, lazily, with eigenpairs one can trust."""

import importlib
from typing import TYPE_CHECKING, Any

from ntk_lazy.alignment import (
    kernel_distance,
    kernel_target_alignment,
    layer_energies,
    principal_angles,
    relative_energy,
    spectral_position,
    subspace_overlap,
)
from ntk_lazy.doctor import Diagnosis, doctor
from ntk_lazy.dynamics import first_order_error, first_order_step, information_flow, stability
from ntk_lazy.eigen import LOBPCG, Dense, EigenResult, Lanczos, eigsh
from ntk_lazy.eigenfunctions import eigenfunctions, kernel_slice, radial_spectrum
from ntk_lazy.errors import (
    ArgumentError,
    BudgetError,
    DegenerateError,
    NonFiniteError,
    NotConvergedError,
    NTKLazyError,
    SecondDerivativeError,
    ShapeError,
    UnsupportedModuleError,
)
from ntk_lazy.estimate import Estimate, effective_rank, frobenius_norm, trace
from ntk_lazy.kernel import ntk
from ntk_lazy.model import FunctionalModel
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.plan import Plan
from ntk_lazy.probes import Probes
from ntk_lazy.records import SpectrumRecord
from ntk_lazy.schedule import LogSpaced
from ntk_lazy.solves import Solve
from ntk_lazy.tracker import SpectrumTracker

__all__ = [
    "LOBPCG",
    "ArgumentError",
    "BudgetError",
    "DegenerateError",
    "Dense",
    "Diagnosis",
    "EigenResult",
    "Estimate",
    "FunctionalModel",
    "Lanczos",
    "LogSpaced",
    "NTKLazyError",
    "NTKLinearOperator",
    "NonFiniteError",
    "NotConvergedError",
    "Plan",
    "Probes",
    "SecondDerivativeError",
    "ShapeError",
    "Solve",
    "SpectrumRecord",
    "SpectrumTracker",
    "UnsupportedModuleError",
    "doctor",
    "effective_rank",
    "eigenfunctions",
    "eigsh",
    "first_order_error",
    "first_order_step",
    "frobenius_norm",
    "information_flow",
    "kernel_distance",
    "kernel_slice",
    "kernel_target_alignment",
    "layer_energies",
    "ntk",
    "principal_angles",
    "radial_spectrum",
    "relative_energy",
    "spectral_position",
    "stability",
    "subspace_overlap",
    "trace",
]

if TYPE_CHECKING:
    from ntk_lazy import gp as gp
else:

    def __getattr__(name: str) -> Any:
        """Import ``ntk_lazy.gp`` where it is first used: most programs do without GPyTorch."""
        if name == "gp":
            return importlib.import_module("ntk_lazy.gp")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
