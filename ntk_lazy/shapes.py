"""Names for the shapes that cross the borders between files.

``n`` counts rows, which are (example, output) pairs in C order; ``k`` counts columns, which are vectors;
``p`` counts entries of one flat parameter vector.
"""

from __future__ import annotations

from jaxtyping import Float, Float64
from torch import Tensor

Block = Float[Tensor, "n k"]
ParameterBlock = Float[Tensor, "p k"]
SmallMatrix = Float64[Tensor, "k k"]
Values = Float64[Tensor, " k"]
