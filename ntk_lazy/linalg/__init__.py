"""Linear algebra of tall blocks: long vectors in their own dtype, sums and small matrices in float64."""

from ntk_lazy.linalg.basis import Basis
from ntk_lazy.linalg.orthonormal import Orthonormalised, orthonormalise, project_out_
from ntk_lazy.linalg.rayleigh import rayleigh_ritz
from ntk_lazy.linalg.tiles import column_norms, combine, gram, row_tiles, subtract_

__all__ = [
    "Basis",
    "Orthonormalised",
    "column_norms",
    "combine",
    "gram",
    "orthonormalise",
    "project_out_",
    "rayleigh_ritz",
    "row_tiles",
    "subtract_",
]
