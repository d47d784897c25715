"""The kernel inside GPyTorch. ``import ntk_lazy`` does not import this: most programs do without GPyTorch."""

from ntk_lazy.gp.big_data import big_data
from ntk_lazy.gp.ntk_kernel import NTKKernel

__all__ = ["NTKKernel", "big_data"]
