"""How a kernel lies to a target, an output or a residual, and how two kernels or two eigenspaces lie to each other."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.columns import Eigenpairs, HasVectors, as_directions, check_orthonormal, span_of
from ntk_lazy.errors import ArgumentError, DegenerateError, ShapeError
from ntk_lazy.estimate import Deflation, Estimate, frobenius_norm, jackknife_error, sample_products
from ntk_lazy.estimate import trace as exact_trace
from ntk_lazy.linalg import gram, row_tiles
from ntk_lazy.precision import ieee_precision
from ntk_lazy.products import Operator, quadratic_form, rows_of
from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block

# A cumulative energy above 1 by this much is rounding in float32 vectors; more says that they are not orthonormal.
_ENERGY_SLACK = 1e-3
_SMALLEST_SINE = 1e-5


@ieee_precision()
def relative_energy(pairs: HasVectors | Tensor, phi: Tensor) -> Float64[Tensor, " k"]:
    """Measure how much of a function lies in the span of the first 1, 2, … k eigenvectors.

    Also known as cumulative power (of a target) or energy concentration. Where eigenvalues are close to each
    other their vectors turn into one another from step to step: read the energy at the end of such a group,
    never inside it. The rest of the vectors holds ``1 − E(φ, k)``; a φ that does not depend on the kernel has
    ``k/n`` on average.

    Args:
        pairs: An ``EigenResult``, or a tensor of orthonormal columns ``(n, k)``, most important first.
        phi: ``(n,)`` or ``(N, C)`` with ``n = N C`` in the order ``i * C + c``, or ``(n, c)`` for c functions
            together (Frobenius inner product). Not centred here. Integers are refused, as they may be the labels of
            classes; their one-hot code is not.

    Returns:
        ``E(φ, j) = Σ_{i≤j} ‖v_iᵀφ‖² / ‖φ‖²`` for j = 1 … k, shape ``(k,)``, float64 on the CPU: in [0, 1] and never
        falling. Energies over pairs below the noise floor of the result mean nothing.

    Cost: ``2 n k c`` flops in float64, no product.

    Raises:
        ShapeError: φ does not fit the rows.
        NonFiniteError: φ or the vectors hold a NaN or an infinity.
        DegenerateError: φ is zero.
        ArgumentError: The vectors are not orthonormal, or a tensor is none.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020); Canatar, Bordelon and Pehlevan,
        Spectral bias and task-model alignment (Nat. Commun. 2021), cumulative power.
    """
    V = span_of(pairs, name="pairs")
    direction, rows = as_directions(phi, V.shape[0], name="phi").to(V.device), Rows(V.shape[0])
    if isinstance(pairs, Tensor):
        check_orthonormal(gram(V, rows=rows), V.dtype, name="pairs")
    coefficients = gram(V, direction, rows=rows)
    energy = coefficients.square().sum(1).cumsum(0) / direction.square().sum().cpu()
    if not energy[-1] <= 1 + _ENERGY_SLACK:
        raise ArgumentError(
            f"{V.shape[1]} vectors hold {energy[-1]:.4f} of the energy of phi, more than all of it: they are not "
            "orthonormal. Take them from eigsh."
        )
    return energy.clamp(max=1.0)


@ieee_precision()
def kernel_target_alignment(
    K: Operator,
    y: Tensor,
    *,
    pairs: Eigenpairs | None = None,
    frobenius: Estimate | None = None,
    num_samples: int = 16,
    seed: int = 0,
) -> Estimate:
    """Measure the cosine between a kernel and the Gram matrix of the targets.

    Not centred. It moves with the leading eigenvector alone when that dominates, and may fall while
    ``relative_energy`` over the leading twenty rises.

    Args:
        K: Symmetric and positive semi-definite.
        y: ``(n,)`` or ``(N, C)`` with ``n = N C`` in the order ``i * C + c``: one vector; or ``(n, c)``: c of them.
            Labels of classes as a one-hot code.
        pairs: Eigenpairs of K, which make the norm of K cheaper and its error smaller.
        frobenius: ``‖K‖_F`` if it is known.
        num_samples: Random vectors spent on ``‖K‖_F``.
        seed: Of the random vectors.

    Returns:
        ``⟨K, YYᵀ⟩_F / (‖K‖_F ‖YYᵀ‖_F)``, in [0, 1] up to the standard error; for one vector
        ``yᵀ K y / (‖K‖_F ‖y‖²)``.

    Cost: c half products (products where K has no halves), and those of ``frobenius_norm``.

    Raises:
        ArgumentError: y is no tensor, K does not multiply, or pairs are no pairs.
        ShapeError: y does not fit the rows.
        NonFiniteError: y or a product is not finite.
        DegenerateError: y or K is zero.

    Source: Cristianini et al., On kernel-target alignment (NIPS 2001), Definition 1.
    """
    rows = rows_of(K, name="K")
    Y = as_directions(y, rows.local, name="y")
    norm = frobenius_norm(K, pairs=pairs, num_samples=num_samples, seed=seed) if frobenius is None else frobenius
    if not norm.value > 0:
        raise DegenerateError("the kernel is zero, so that it has no angle with the targets.")
    value = quadratic_form(K, Y, rows).trace().item() / norm.value / gram(Y, rows=rows).norm().item()
    spent = Y.shape[1] + (norm.num_products if frobenius is None else 0)
    return Estimate(value=value, standard_error=abs(value) * norm.relative_error, num_products=spent)


@ieee_precision()
def spectral_position(K: Operator, g: Tensor, *, trace: Estimate | None = None) -> Estimate:
    """Measure how high in the spectrum a loss gradient lies: the eigenvalue it sees, relative to the sum of all.

    The squared norm of the parameter gradient is a product: ``‖∂L/∂θ‖² = ‖g‖² · tr K · χ_pos``.

    Args:
        K: Symmetric and positive semi-definite; for the identity above, ``outputs="full"``.
        g: ``∂L/∂f`` at any scale, ``(n,)``, ``(N, C)`` or ``(n, c)``; for squared errors, the residual.
        trace: tr K if it is known; otherwise it comes from the diagonal.

    Returns:
        ``χ_pos = gᵀ K g / (‖g‖² tr K)``, in [0, 1]: ``λ_1 / tr K`` at most, ``1/n`` for a random g.

    Cost: one half product for each column of g, and the diagonal.

    Raises:
        ArgumentError: g is no tensor, or K does not multiply.
        ShapeError: g does not fit the rows.
        NonFiniteError: g or a product is not finite.
        DegenerateError: g or the trace is zero.

    Source: Spectral Reach (arXiv 2605.31244).
    """
    rows = rows_of(K, name="K")
    direction = as_directions(g, rows.local, name="g")
    total = exact_trace(K) if trace is None else trace
    if not total.value > 0:
        raise DegenerateError(f"the trace of the kernel is {total.value}, so that no position in it is defined.")
    squared_norm = gram(direction, rows=rows).trace().item()
    value = quadratic_form(K, direction, rows).trace().item() / squared_norm / total.value
    spent = direction.shape[1] + (total.num_products if trace is None else 0)
    return Estimate(value=value, standard_error=abs(value) * total.relative_error, num_products=spent)


@runtime_checkable
class HasParameterEnergies(Protocol):
    """A kernel that knows what each parameter of its model adds to a quadratic form."""

    def parameter_energies(self, V: Block) -> dict[str, Float64[Tensor, " k"]]:
        """Return ``‖J_pᵀ v‖²`` for each parameter p and column v."""


@ieee_precision()
def layer_energies(
    pairs: HasVectors | Tensor, K: HasParameterEnergies, *, by: Literal["layer", "parameter"] = "layer"
) -> dict[str, Float64[Tensor, " k"]]:
    """Split each eigenvalue into the parts that the layers of the network contribute.

    K is a sum of kernels, one for each group of parameters: ``λ_i = Σ_l v_iᵀ K_l v_i``. A part says how fast the
    network moves along an eigenvector by way of one layer.

    Args:
        pairs: An ``EigenResult`` of K, or a tensor ``(n, k)`` whose quadratic forms are split in the same way.
        K: What ``ntk`` returns, on the same rows.
        by: ``"layer"`` puts the parameters of one module together (weight and bias) under its name, and those that
            the model itself holds under ``""``; ``"parameter"`` names each.

    Returns:
        For each layer, in the order of the model, ``‖J_lᵀ v_i‖²`` for i = 1 … k, float64 on the CPU, never negative.

    Cost: one half product, and k parameter vectors or as many as the memory budget holds.

    Raises:
        ArgumentError: K has no parameters, or ``by`` is something else.
        ShapeError: The vectors do not fit the rows of K.

    Source: Baratin et al., Implicit regularization via neural feature alignment (AISTATS 2021), section 3.
    """
    if not isinstance(K, HasParameterEnergies):
        raise ArgumentError(f"K is a {type(K).__name__}, which has no layers; pass a kernel of ntk().")
    if by not in ("layer", "parameter"):
        raise ArgumentError(f"by must be 'layer' or 'parameter', not {by!r}.")
    V = span_of(pairs, name="pairs")
    with torch.no_grad():
        energies = K.parameter_energies(V)
    if by == "parameter":
        return energies
    layers: dict[str, Tensor] = {}
    for name, energy in energies.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers[layer] + energy if layer in layers else energy
    return layers


@ieee_precision()
def kernel_distance(
    K1: Operator,
    K2: Operator,
    *,
    pairs: tuple[Eigenpairs, Eigenpairs] | None = None,
    num_leading: int = 16,
    num_samples: int = 16,
    seed: int = 0,
) -> Estimate:
    """Measure how far one kernel has turned from another, whatever the scale of either.

    Both are multiplied with the same vectors, so that the distance of a kernel to itself is 0 and the error of a
    small distance is small relative to it.

    Args:
        K1: Symmetric.
        K2: Symmetric, on the same rows.
        pairs: Eigenpairs of both; the leading ones span the subspace that is multiplied exactly. Without them a
            block of random products finds it.
        num_leading: Leading vectors of each kernel.
        num_samples: Random vectors spent on the rest.
        seed: Of the random vectors.

    Returns:
        ``1 − ⟨K1, K2⟩_F / (‖K1‖_F ‖K2‖_F)``: 0 for multiples of each other, 1 for kernels with nothing in common.

    Cost: for each kernel ``2 num_leading + num_samples`` products, and ``num_leading`` more without pairs; at most n
        products, and then the distance is exact.

    Raises:
        ArgumentError: A kernel does not multiply, or pairs are no pairs of both.
        ShapeError: The kernels have different rows.
        NonFiniteError: A product is not finite.
        DegenerateError: A kernel is zero.

    Source: Fort et al., Deep learning versus kernel learning (NeurIPS 2020), kernel distance.
    """
    sampled = sample_products(
        [K1, K2],
        pairs=pairs,
        deflation=Deflation(num_leading=num_leading, num_samples=num_samples),
        seed=seed,
    )
    m = len(sampled.samples)
    total = sampled.exact + (sampled.samples.mean(0) if m else 0)
    if not total.diagonal().min() > 0:
        raise DegenerateError("a kernel is zero, so that it has no angle with the other.")
    value, error = _cosine_distance(total).item(), 0.0
    if m:
        others = sampled.exact + (sampled.samples.sum(0) - sampled.samples) / (m - 1)
        # Products that are off by eps turn each kernel by about eps, and move a distance S by eps · sqrt(2 S).
        eps = torch.finfo(K1.dtype).eps
        error = max(jackknife_error(_cosine_distance(others)), eps * (2 * abs(value)) ** 0.5 + eps**2)
    return Estimate(value=max(value, 0.0), standard_error=error, num_products=sampled.num_products)


def _cosine_distance(products: Float64[Tensor, "*m 2 2"]) -> Float64[Tensor, "*m"]:
    """Return 1 − cos from the inner products of two things."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return 1 - products[..., 0, 1] / norms.prod(-1)


@ieee_precision()
def principal_angles(U: HasVectors | Tensor, V: HasVectors | Tensor) -> Float64[Tensor, " j"]:
    """Measure the angles between two eigenspaces, which do not depend on the basis chosen in either.

    Small angles come from sines and large ones from cosines, so that both ends are accurate.

    Args:
        U: An ``EigenResult`` or linearly independent columns ``(n, k)``.
        V: The same on the same rows, ``(n, m)``; m may differ from k.

    Returns:
        ``min(k, m)`` angles in radians, from 0 to π/2, ascending, float64 on the CPU.

    Cost: ``4 n (k + m)²`` flops in float64, no product; no copy of a block is made.

    Raises:
        ArgumentError: Neither a result nor a tensor.
        ShapeError: The blocks have different rows.
        DegenerateError: The columns of one are linearly dependent.

    Source: Björck and Golub, Numerical methods for computing angles between linear subspaces (Math. Comp. 1973),
        section 3.
    """
    first, second = span_of(U, name="U"), span_of(V, name="V")
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    whiten_first, whiten_second = _whitener(first), _whitener(second)
    M = whiten_first @ _cross(first, second) @ whiten_second.mT
    cosines = torch.linalg.svdvals(M).clamp(max=1.0)
    sines = _sines(first, second, whiten_first.mT @ M, whiten_second)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


@ieee_precision()
def subspace_overlap(U: HasVectors | Tensor, V: HasVectors | Tensor) -> float:
    """Measure how much two eigenspaces have in common, between 0 (orthogonal) and 1 (one holds the other).

    Compare with the baseline ``max(k, m)/n``, what a random subspace gets. It falls when k cuts through a group
    of close eigenvalues although the kernel hardly changed: choose k at a gap.

    Args:
        U: An ``EigenResult`` or linearly independent columns ``(n, k)``.
        V: The same on the same rows, ``(n, m)``.

    Returns:
        ``‖UᵀV‖_F² / min(k, m)`` for orthonormal U and V, the mean squared cosine of the principal angles.

    Cost: ``2 n (k + m)²`` flops in float64, no product.

    Raises:
        ArgumentError: Neither a result nor a tensor.
        ShapeError: The blocks have different rows.
        DegenerateError: The columns of one are linearly dependent.
    """
    first, second = span_of(U, name="U"), span_of(V, name="V")
    M = _whitener(first) @ _cross(first, second) @ _whitener(second).mT
    return min(1.0, M.square().sum().item() / min(M.shape))


def _cross(first: Tensor, second: Tensor) -> Tensor:
    if first.shape[0] != second.shape[0]:
        raise ShapeError(f"vectors of {first.shape[0]} and of {second.shape[0]} rows do not live in one space.")
    return gram(first, second.to(first.device), rows=Rows(first.shape[0]))


def _whitener(V: Tensor) -> Tensor:
    """Return the small matrix W for which ``V Wᵀ`` is orthonormal."""
    G = gram(V, rows=Rows(V.shape[0]))
    norms = G.diagonal().sqrt()
    if not norms.isfinite().all():
        raise ShapeError("a block of vectors holds a NaN or an infinity.")
    factor, info = torch.linalg.cholesky_ex(G / norms.outer(norms))
    # A pivot is the sine between a column and those before it; whitening loses its square from 16 digits.
    if info != 0 or not factor.diagonal().min() > _SMALLEST_SINE:
        raise DegenerateError(f"the {V.shape[1]} columns are linearly dependent, so they span less than they should.")
    return torch.linalg.solve_triangular(factor, torch.diag(1 / norms), upper=False)


def _sines(first: Tensor, second: Tensor, coefficients: Tensor, whiten_second: Tensor) -> Tensor:
    """Return the sines of the angles, ascending: singular values of what the first space leaves of the second."""
    # A running triangular factor, not a Gram matrix: that would lose the sines below 1e-8.
    triangle = torch.zeros(0, second.shape[1], dtype=torch.float64, device=second.device)
    for tile in row_tiles(second.shape[0], first.shape[1] + second.shape[1], device=second.device):
        rest = second[tile].double() @ whiten_second.mT.to(second.device)
        rest -= (first[tile].double() @ coefficients.to(first.device)).to(second.device)
        triangle = torch.linalg.qr(torch.cat([triangle, rest]), mode="r").R
    return torch.linalg.svdvals(triangle.cpu()).flip(0).clamp(max=1.0)
