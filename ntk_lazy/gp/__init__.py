"""The kernel inside GPyTorch. ``import ntk_lazy`` does not import this: most programs do without GPyTorch."""

from ntk_lazy.gp.big_data import big_data
from ntk_lazy.gp.linearised_mean import LinearisedMean
from ntk_lazy.gp.ntk_kernel import NTKKernel
from ntk_lazy.operator.loose_solves import LooseSolveWarning

__all__ = ["LinearisedMean", "LooseSolveWarning", "NTKKernel", "big_data"]
