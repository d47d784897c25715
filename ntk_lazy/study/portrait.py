"""A network as pictures: its output, its eigenfunctions and their frequencies, on pixels it was never trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from scipy import ndimage, stats
from torch import Tensor, nn

from ntk_lazy.alignment import relative_energy
from ntk_lazy.eigen import EigenResult
from ntk_lazy.eigenfunctions import eigenfunctions, kernel_slice, radial_spectrum
from ntk_lazy.kernel import ntk
from ntk_lazy.operator import NTKLinearOperator
from ntk_lazy.precision import ieee_precision
from ntk_lazy.study.config import StudyConfig
from ntk_lazy.study.target import Target, grid_points
from ntk_lazy.study.training import read_tensors, write_tensors

COARSE = (64, 96)
_NUM_FREQUENCIES = 100
_NUM_EDGE_FUNCTIONS = 5
_NUM_CORRELATED = 20
_EDGE_SHARE = 0.1
SLICE_POINT = (0.5, 0.5)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Portrait:
    """One network, seen on the pixel grid. All tensors on the CPU.

    Attributes:
        step: Step of training.
        values: Eigenvalues of the eigenfunctions that are drawn, shape ``(p,)``.
        relative_residuals: ``‖K v − λ v‖ / λ`` of each, shape ``(p,)``.
        output: f on every pixel, ``(height, width)``.
        functions: Eigenfunctions on every pixel, mean square 1 over the training points, ``(p, height, width)``.
        kernel_slice: ``K(x0, ·)`` on the coarse grid, x0 half-way between centre and corner.
        gradient_norms: ``‖∇_θ f‖`` on the coarse grid.
        mean_frequencies: Mean radial frequency of the first eigenfunctions on the coarse grid, in cycles per width.
        spectra: Radial power of target, output, residual and drawn eigenfunctions, of sum 1 each; ``(3 + p, rings)``.
        test_energy: ``E(y, 1..k)`` of the extended eigenfunctions on the test points, ``(k,)``.
        null_energy: Energy in all pairs of a Gaussian function and of shuffled labels, ``(2,)``.
        scalars: target_frequency, residual_frequency, frequency_order, target_correlation, edge_auc and
            gradient_correlation, ``(6,)``; see the properties.
    """

    step: int
    values: Tensor
    relative_residuals: Tensor
    output: Tensor
    functions: Tensor
    kernel_slice: Tensor
    gradient_norms: Tensor
    mean_frequencies: Tensor
    spectra: Tensor
    test_energy: Tensor
    null_energy: Tensor
    scalars: Tensor

    @property
    def target_frequency(self) -> float:
        """Mean radial frequency of the target, in cycles per width."""
        return float(self.scalars[0])

    @property
    def residual_frequency(self) -> float:
        """Mean radial frequency of the residual."""
        return float(self.scalars[1])

    @property
    def frequency_order(self) -> float:
        """Spearman correlation of the index of an eigenfunction with its mean frequency."""
        return float(self.scalars[2])

    @property
    def target_correlation(self) -> float:
        """Largest |correlation| of one of the first 20 eigenfunctions with the target."""
        return float(self.scalars[3])

    @property
    def edge_auc(self) -> float:
        """Largest area under the ROC curve of one of the first five |eigenfunctions| as a detector of edges."""
        return float(self.scalars[4])

    @property
    def gradient_correlation(self) -> float:
        """Correlation of ``log ‖∇_θ f‖`` with the slope of the picture."""
        return float(self.scalars[5])

    def save(self, path: Path) -> None:
        """Write all tensors, atomically."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "step"}
        write_tensors(path, tensors, metadata={"step": str(self.step)})

    @classmethod
    def load(cls, path: Path) -> Portrait:
        """Read what ``save`` wrote."""
        tensors, metadata = read_tensors(path)
        return cls(step=int(metadata["step"]), **tensors)


@torch.no_grad()
def draw_portrait(model: nn.Module, pairs: EigenResult, target: Target, config: StudyConfig, *, step: int) -> Portrait:
    """Extend the eigenvectors of the training points to the picture, and measure what the claims ask of it.

    Cost: one gradient sweep over the training points and forward-mode sweeps over the pixels for each function drawn;
        sweeps over a coarse grid and over the test points for the first hundred.
    """
    K = ntk(model, target.train_x)
    pixels, coarse_points = _points(target.picture.shape, config), _points(COARSE, config)
    shape, scale = target.picture.shape, config.num_points**0.5
    leading = _Leading.of(pairs, max(_NUM_FREQUENCIES, config.num_pictures))
    extended = eigenfunctions(leading, K)
    few = slice(config.num_pictures)
    drawn = dataclasses.replace(extended, values=extended.values[few], directions=extended.directions[:, few])
    functions = drawn(pixels).mul_(scale).mT.reshape(-1, *shape).cpu()
    coarse = extended(coarse_points).mul_(scale).mT.reshape(-1, *COARSE).cpu()
    with ieee_precision():
        output = torch.cat([model(chunk) for chunk in pixels.split(65_536)]).reshape(shape).cpu()
        coarse_output = model(coarse_points).reshape(COARSE).cpu().double()
    picture = torch.from_numpy(target.coarse(COARSE))
    norms = K.at(coarse_points).diagonal().clamp(min=0).sqrt().reshape(COARSE).cpu()
    return Portrait(
        step=step,
        values=drawn.values,
        relative_residuals=(leading.residual_norms / leading.values)[few],
        output=output,
        functions=functions,
        kernel_slice=_slice_of_kernel(K, coarse_points),
        gradient_norms=norms,
        mean_frequencies=_mean_frequencies(coarse),
        spectra=_spectra([picture, coarse_output, coarse_output - picture, *coarse[few]]),
        test_energy=_test_energy(extended(target.test_x), target.test_y),
        null_energy=_null_energy(pairs, target.train_y, config.seed),
        scalars=torch.tensor(
            [
                radial_spectrum(picture).mean_frequency,
                radial_spectrum(coarse_output - picture).mean_frequency,
                _frequency_order(_mean_frequencies(coarse)),
                _largest_correlation(coarse[:_NUM_CORRELATED], picture),
                _edge_auc(coarse[:_NUM_EDGE_FUNCTIONS], picture),
                _gradient_correlation(norms, picture),
            ],
            dtype=torch.float64,
        ),
    )


@final
@dataclass(frozen=True, eq=False)
class _Leading:
    """The first pairs of a result that passed their test and lie above its noise floor."""

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    noise_floor: float

    @classmethod
    def of(cls, pairs: EigenResult, k: int) -> _Leading:
        good = pairs.converged & (pairs.values > pairs.noise_floor * pairs.values[0])
        k = min(k, int(good.int().cumprod(0).sum()))
        return cls(pairs.values[:k], pairs.vectors[:, :k], pairs.residual_norms[:k], pairs.noise_floor)


def _points(shape: tuple[int, ...], config: StudyConfig) -> Tensor:
    return torch.as_tensor(grid_points(shape), dtype=config.torch_dtype, device=config.device)


def _slice_of_kernel(K: NTKLinearOperator, points: Tensor) -> Tensor:
    """Evaluate ``K(x0, ·)``; x0 is off the centre, where a new network has its tip and nothing can be seen."""
    x0 = torch.tensor([SLICE_POINT], dtype=points.dtype, device=points.device)
    return kernel_slice(K, x0, points).reshape(COARSE).cpu()


def _spectra(pictures: list[Tensor]) -> Tensor:
    """Return the radial power of each picture, of sum 1 without the constant."""
    power = torch.stack([radial_spectrum(p - p.mean()).power for p in pictures])
    return power / power.sum(1, keepdim=True)


def _mean_frequencies(functions: Tensor) -> Tensor:
    return torch.tensor([radial_spectrum(f).mean_frequency for f in functions], dtype=torch.float64)


def _frequency_order(frequencies: Tensor) -> float:
    if len(frequencies) < 3:
        return float("nan")
    return float(stats.spearmanr(range(len(frequencies)), frequencies.numpy()).statistic)


def _test_energy(functions: Tensor, y: Tensor) -> Tensor:
    """Measure how much of the test target the extended functions hold; off the training points they are not orthogonal.

    QR keeps the order: its first j columns span the first j functions.
    """
    basis = torch.linalg.qr(functions.double()).Q
    return relative_energy(basis, y)


def _null_energy(pairs: EigenResult, y: Tensor, seed: int) -> Tensor:
    """Measure the energy of two functions that know nothing of the kernel: Gaussian, and the labels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(y.shape[0], generator=generator, dtype=torch.float64)
    shuffled = y.reshape(-1).cpu()[torch.randperm(y.shape[0], generator=generator)]
    energies = [relative_energy(pairs, f.to(pairs.vectors.device))[-1] for f in (gaussian, shuffled)]
    return torch.stack(energies)


def _largest_correlation(functions: Tensor, picture: Tensor) -> float:
    rows = torch.stack([picture, *functions.double()]).flatten(1)
    return float(torch.corrcoef(rows)[0, 1:].abs().max())


def _edge_auc(functions: Tensor, picture: Tensor) -> float:
    """Score |ψ_i| as a detector of the steepest tenth of the pixels: the best area under the ROC curve."""
    slope = _slope(picture)
    is_edge = slope > np.quantile(slope, 1 - _EDGE_SHARE)
    num_edges, num_others = int(is_edge.sum()), int((~is_edge).sum())
    best = 0.0
    for function in functions:
        ranks = stats.rankdata(function.abs().numpy().reshape(-1))
        wins = ranks[is_edge].sum() - num_edges * (num_edges + 1) / 2
        best = max(best, float(wins) / (num_edges * num_others))
    return best


def _gradient_correlation(norms: Tensor, picture: Tensor) -> float:
    logs = norms.double().clamp(min=torch.finfo(torch.float64).tiny).log().numpy().reshape(-1)
    return float(np.corrcoef(logs, _slope(picture))[0, 1])


def _slope(picture: Tensor) -> np.ndarray:
    """Return the length of the Sobel gradient of each pixel, flat."""
    pixels = picture.numpy()
    slope: np.ndarray = np.hypot(ndimage.sobel(pixels, axis=0), ndimage.sobel(pixels, axis=1))
    return slope.reshape(-1)
