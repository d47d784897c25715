"""What one use of a parameter in a forward pass contributes to J, kept as factors instead of numbers.

For a layer, a row of J is a sum over positions (pixels, tokens; one for a plain layer) of outer products of what went
into the layer and the gradient at what came out. Whoever keeps these two multiplies with J by matrix products alone.

Shapes: ``b`` examples, ``S`` positions, ``q`` rows of J for an example, ``k`` columns, ``i`` and ``o`` the width of a
layer before and after, ``p`` entries of the parameter.
"""

from ntk_lazy.engines.uses.contraction import contraction_cost, rows_cost
from ntk_lazy.engines.uses.lookup import Lookup, relabelled
from ntk_lazy.engines.uses.outer import Outer, Window
from ntk_lazy.engines.uses.use import Coefficients, ParameterColumns, ParameterRows, Rows, Use
from ntk_lazy.engines.uses.within import Within

__all__ = [
    "Coefficients",
    "Lookup",
    "Outer",
    "ParameterColumns",
    "ParameterRows",
    "Rows",
    "Use",
    "Window",
    "Within",
    "contraction_cost",
    "relabelled",
    "rows_cost",
]
