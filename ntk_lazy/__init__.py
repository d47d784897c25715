"""The empirical neural tangent kernel of any PyTorch model, lazily, with eigenpairs one can trust."""

from ntk_lazy.doctor import Diagnosis, doctor
from ntk_lazy.errors import (
    ArgumentError,
    BudgetError,
    DegenerateError,
    NonFiniteError,
    NotConvergedError,
    NTKLazyError,
    ShapeError,
    UnsupportedModuleError,
)
from ntk_lazy.kernel import ntk
from ntk_lazy.model import FunctionalModel
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.probes import Probes

__all__ = [
    "ArgumentError",
    "BudgetError",
    "DegenerateError",
    "Diagnosis",
    "FunctionalModel",
    "NTKLazyError",
    "NTKLinearOperator",
    "NonFiniteError",
    "NotConvergedError",
    "Probes",
    "ShapeError",
    "UnsupportedModuleError",
    "doctor",
    "ntk",
]
