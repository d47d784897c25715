"""K as a linear_operator: from rows and blocks at the top to the rows of J at the bottom."""

from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator
from ntk_lazy.operator.side import Side

__all__ = ["NTKLinearOperator", "Side"]
