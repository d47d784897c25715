"""Eigenvectors of a kernel as functions of the input: at new points, as slices, and as pictures with frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.columns import Eigenpairs, check_pairs, check_tensor, span_of
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.products import Operator, multiply, rows_of
from ntk_lazy.shapes import Block, ParameterBlock

# ‖Jᵀ v‖² / λ is 1 up to the residual and the noise of a product; a kernel at other parameters is off by far more.
_MISMATCH = 1e-2


@runtime_checkable
class FactoredKernel(Operator, Protocol):
    """A kernel ``J Jᵀ`` that multiplies with each factor and can be had at other points."""

    def jacobian_matmul(self, W: ParameterBlock) -> Block:
        """Return ``J W``."""

    def jacobian_rmatmul(self, V: Block) -> ParameterBlock:
        """Return ``Jᵀ V``."""

    def at(self, x1: Any, x2: Any = None) -> Any:
        """Return the same kernel at other points."""


@final
@dataclass(frozen=True, eq=False)
class Eigenfunctions:
    """The functions ``ψ_i(x) = J(x) w_i / √λ_i`` that equal ``v_i`` on the probe points.

    Attributes:
        kernel: The kernel that the pairs belong to.
        values: λ_i, shape ``(k,)``.
        directions: ``w_i / √λ_i = Jᵀ v_i / λ_i``, one parameter vector each, shape ``(p, k)``.
    """

    kernel: FactoredKernel
    values: Float64[Tensor, " k"]
    directions: ParameterBlock

    @torch.no_grad()
    def __call__(self, x: Any) -> Block:
        """Evaluate all functions at new points.

        Args:
            x: Inputs like those of the kernel, N' of them.

        Returns:
            Shape ``(N' · C, k)`` in the row order of the kernel, ``i * C + c``: ``.reshape(N', C, k)`` splits it. The
            scale is that of ``v_i``, unit norm over the *probe* points: multiply by ``√n`` for functions of mean
            square 1 there.

        Cost: one forward-mode sweep over x for each function; the probe points are not visited.

        Raises:
            NonFiniteError: A value is not finite.
        """
        functions: Block = self.kernel.at(x).jacobian_matmul(self.directions)
        if not functions.isfinite().all():
            raise NonFiniteError("an eigenfunction is not finite at a new point. Look for a NaN in the inputs.")
        return functions


@torch.no_grad()
def eigenfunctions(pairs: Eigenpairs, K: FactoredKernel) -> Eigenfunctions:
    """Extend eigenvectors from the probe points to functions of the input.

    Args:
        pairs: Eigenpairs of K. To extend fewer of them, solve for fewer.
        K: The kernel ``J Jᵀ`` that they belong to, square, at the same parameters.

    Returns:
        A callable. On the probe points it returns ``v_i`` up to the relative residual of each pair.

    Cost: one reverse-mode sweep over the probe points for each pair, and ``p k`` numbers kept, p the parameters.

    Raises:
        ShapeError: The pairs have other rows than the kernel.
        DegenerateError: A value lies at or below the noise floor: its extension divides noise by noise.
        ArgumentError: The pairs belong to another kernel, or to other parameters; K has no factors.

    Source: With ``w_i = Jᵀ v_i / √λ_i`` it is the Nyström extension ``K(x, X) v_i / λ_i``; Lau et al., PINNACLE
        (ICLR 2024), eq. 12, gives the latter.
    """
    check_pairs(pairs)
    _check_factors(K)
    V, rows = span_of(pairs, name="pairs"), rows_of(K, name="K")
    if V.shape[0] != rows.local:
        raise ShapeError(f"the pairs have {V.shape[0]} rows and the kernel has {rows.local}.")
    values = pairs.values.double().cpu()
    num_usable = int((values > pairs.noise_floor * values[0]).sum())
    if num_usable < len(values):
        raise DegenerateError(
            f"only the first {num_usable} of {len(values)} eigenvalues lie above the noise floor of "
            f"{pairs.noise_floor:.1e} λ_1, and the others have no eigenfunction that means anything. "
            f"Solve for {num_usable} pairs, or in float64."
        )
    directions = K.jacobian_rmatmul(V.to(K.device, K.dtype))
    _check_match(directions, values, pairs.residual_norms.double().cpu())
    directions /= values.to(directions.device, directions.dtype)
    return Eigenfunctions(kernel=K, values=values, directions=directions)


@torch.no_grad()
def kernel_slice(K: FactoredKernel, x0: Any, x_new: Any) -> Block:
    """Evaluate the kernel between one point and many: what a step on that point does to all others.

    Args:
        K: A kernel; its parameters and its output mode are used, not its points.
        x0: One input, with or without its leading dimension; a few are fine too.
        x_new: Inputs to evaluate at, N' of them.

    Returns:
        ``K(x, x0)``, shape ``(N' · C, C)`` for one x0 with C outputs: row ``i * C + c``.

    Cost: for each column one reverse-mode sweep over x0 and one forward-mode sweep over x_new.

    Raises:
        ArgumentError: K cannot be had at other points.
        NonFiniteError: A value is not finite.
    """
    _check_factors(K)
    rectangle = K.at(x_new, x0)
    return multiply(rectangle, torch.eye(rectangle.shape[1], dtype=K.dtype, device=K.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class RadialSpectrum:
    """Power of an image over the radial frequency, in cycles per image width.

    Attributes:
        frequencies: Centres of the rings, 0, 1, 2, …, shape ``(rings,)``, float64 on the CPU.
        power: Mean square of the image that each ring holds; the rings sum to the mean square of the image, and
            ring 0 is the squared mean and whatever varies by less than half a cycle.
        mean_frequency: ``Σ |q| |F(q)|² / Σ |F(q)|²`` over all frequencies q but 0.
        constant_share: Share of the mean square that is the squared mean: ``F(0)``, left out above. Times
            ``1 − constant_share``, the mean frequency is the one with q = 0 included.
    """

    frequencies: Float64[Tensor, " rings"]
    power: Float64[Tensor, " rings"]
    mean_frequency: float
    constant_share: float


def radial_spectrum(image: Tensor) -> RadialSpectrum:
    """Measure which spatial frequencies a picture is made of.

    Pixels are taken as square: both directions count cycles over the *width*. The picture is not windowed, so one
    whose opposite edges differ has a tail that falls like ``1/|q|²`` in power.

    Args:
        image: Shape ``(height, width)``, on a regular grid.

    Cost: one two-dimensional FFT in float64.

    Raises:
        ArgumentError: The image is no tensor.
        ShapeError: Not a picture of at least two pixels.
        NonFiniteError: A pixel is not finite.
        DegenerateError: The picture is constant, so that it has no frequency.
    """
    check_tensor(image, name="image")
    if image.ndim != 2 or image.numel() < 2:
        raise ShapeError(f"an image of shape (height, width) is needed, not {tuple(image.shape)}.")
    if not image.isfinite().all():
        raise NonFiniteError("the image holds a NaN or an infinity.")
    pixels = image.detach().double().cpu()
    largest = pixels.abs().max()
    if not (pixels - pixels.mean()).abs().max() > largest * pixels.numel() ** 0.5 * torch.finfo(torch.float64).eps:
        raise DegenerateError("the image is constant, so that it has no frequency but 0.")
    height, width = pixels.shape
    squares = torch.fft.fft2(pixels / largest).abs().square() / pixels.numel() ** 2
    along_height = torch.fft.fftfreq(height, d=1 / width, dtype=torch.float64)
    along_width = torch.fft.fftfreq(width, d=1 / width, dtype=torch.float64)
    radius = torch.hypot(along_height[:, None], along_width[None, :])
    constant, total = squares[0, 0].item(), squares.sum().item()
    ring = radius.round().long().flatten()
    power = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring, squares.flatten())
    return RadialSpectrum(
        frequencies=torch.arange(len(power), dtype=torch.float64),
        power=power * largest.square(),
        mean_frequency=(radius * squares).sum().item() / (squares.flatten()[1:].sum().item()),
        constant_share=constant / total,
    )


def _check_factors(K: Any) -> None:
    """Refuse a matrix, and what linear_operator makes of a kernel: a sum has no factors."""
    if not isinstance(K, FactoredKernel):
        raise ArgumentError(
            f"K is of type {type(K).__name__}, which has no factors J and Jᵀ to evaluate elsewhere. Pass the "
            "NTKLinearOperator that ntk() made, and add jitter to it afterwards."
        )


def _check_match(images: ParameterBlock, values: Tensor, residual_norms: Tensor) -> None:
    """Raise unless ``‖Jᵀ v_i‖² = λ_i`` to what the residuals allow."""
    squares = torch.stack([column.double().square().sum() for column in images.unbind(1)]).cpu()
    if not squares.isfinite().all():
        raise NonFiniteError("Jᵀ v is not finite. Look for a NaN in the parameters and the inputs.")
    defect = (squares / values - 1).abs() - 2 * residual_norms / values
    if not defect.max() <= _MISMATCH:
        worst = int(defect.argmax())
        raise ArgumentError(
            f"‖Jᵀ v‖² is {squares[worst] / values[worst]:.3f} λ for pair {worst}, and 1 λ is needed: the pairs belong "
            "to another kernel, or the parameters have changed since. Solve again."
        )
