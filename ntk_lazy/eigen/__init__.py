"""Eigenpairs of symmetric operators that are known by their products alone."""

from ntk_lazy.eigen.bounds import ErrorBounds
from ntk_lazy.eigen.contract import HalfGram, SymmetricOperator
from ntk_lazy.eigen.options import LOBPCG, Dense, Lanczos, Solver
from ntk_lazy.eigen.progress import SolveState
from ntk_lazy.eigen.result import Completeness, Cost, EigenResult
from ntk_lazy.eigen.solve import eigsh

__all__ = [
    "LOBPCG",
    "Completeness",
    "Cost",
    "Dense",
    "EigenResult",
    "ErrorBounds",
    "HalfGram",
    "Lanczos",
    "SolveState",
    "Solver",
    "SymmetricOperator",
    "eigsh",
]
