"""The kernel inside GPyTorch. ``import ntk_lazy`` does not import this: most programs do without GPyTorch."""

from ntk_lazy.gp.big_data import big_data
from ntk_lazy.gp.linearised_mean import LinearisedMean
from ntk_lazy.gp.ntk_kernel import NTKKernel

__all__ = ["LinearisedMean", "NTKKernel", "big_data"]
