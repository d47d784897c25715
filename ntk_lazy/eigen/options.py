"""The solvers to choose from, each a frozen dataclass of its options; None means derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ntk_lazy.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Lanczos:
    """Block Lanczos with full reorthogonalisation, thickly restarted when the basis is full.

    Attributes:
        block_size: Columns of one call. None: the power of two next to ``sqrt(2.8 k)`` between 8 and 64, and not
            below the number of outputs plus 2 (up to 64). Whatever it is, the space grows from at least that
            many columns, because fewer can miss copies of a repeated eigenvalue. ``"timed"``: the same with the
            measured cost of a call in place of a typical one; two runs may then choose differently, and
            ``EigenResult.method`` says what was chosen.
        max_basis: Most basis vectors held. None: ``3 k + 10 b``; most spectra need ``1.75 k + 5 b``.
    """

    block_size: int | Literal["timed"] | None = None
    max_basis: int | None = None

    def __post_init__(self) -> None:
        if self.block_size != "timed":
            _check_count("block_size", self.block_size)
        _check_count("max_basis", self.max_basis)


@dataclass(frozen=True, kw_only=True)
class LOBPCG:
    """Locally optimal block preconditioned conjugate gradients on an orthonormal ``[X P W]``.

    Fewest block calls and fixed memory (six blocks), for twice the products of ``Lanczos``. With three blocks
    remembered each digit costs as much as the last: small tolerances on slowly falling spectra take many times as many.

    Attributes:
        num_guards: Columns beyond ``k``, which make the last wanted pairs converge. None: ``k / 4``, and
            at least the number of outputs plus 2.
    """

    num_guards: int | None = None

    def __post_init__(self) -> None:
        _check_count("num_guards", self.num_guards, least=0)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """All entries, then LAPACK in float64: ``40 n²`` bytes.

    An operator with a ``to_dense`` of its own writes itself down, as far as its memory budget goes, and few products
    certify that; another takes ``n`` products with unit vectors. Above 32,766 rows LAPACK's other driver takes ``8 n²``
    bytes.

    Attributes:
        block_size: Columns of one product. None: 256.
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        _check_count("block_size", self.block_size)


Solver = Lanczos | LOBPCG | Dense


def _check_count(name: str, value: int | str | None, *, least: int = 1) -> None:
    """Refuse numbers that are too small and what is no integer."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ArgumentError(f"{name} is {value!r}; it must be an integer of at least {least}, or None.")
