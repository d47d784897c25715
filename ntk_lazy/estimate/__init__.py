"""Scalars of an operator that is never formed: each with its standard error and what it cost."""

from ntk_lazy.estimate.frobenius import Deflation, frobenius_norm, sample_products
from ntk_lazy.estimate.rank import effective_rank
from ntk_lazy.estimate.result import Estimate, jackknife_error, skew_widening
from ntk_lazy.estimate.trace import trace

__all__ = [
    "Deflation",
    "Estimate",
    "effective_rank",
    "frobenius_norm",
    "jackknife_error",
    "sample_products",
    "skew_widening",
    "trace",
]
