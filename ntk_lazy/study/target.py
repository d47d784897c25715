"""The picture to be learned: a function on [-1, 1]^2, sampled at its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import image as mpl_image
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_sample_images
from torch import Tensor

from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.study.config import StudyConfig

Picture = NDArray[np.float64]

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_ANALYTIC_SHAPE = (192, 192)
_MIN_SIDE = 8


@final
@dataclass(frozen=True, eq=False)
class Target:
    """A standardised picture with its training points and its test points.

    Attributes:
        picture: Shape ``(height, width)``; zero mean and unit variance **over the training points**.
        train_x: Shape ``(N, 2)``: horizontal and vertical coordinate, both in [-1, 1], downwards positive.
        train_y: Shape ``(N, 1)``, as the network returns it.
        test_x: Shape ``(M, 2)``, pixels that are not among the training points.
        test_y: Shape ``(M, 1)``.
    """

    picture: Picture
    train_x: Float[Tensor, "n 2"]
    train_y: Float[Tensor, "n 1"]
    test_x: Float[Tensor, "m 2"]
    test_y: Float[Tensor, "m 1"]

    @classmethod
    def of(cls, config: StudyConfig) -> Target:
        """Load, blur and sample the picture that the settings name.

        Raises:
            ArgumentError: No such picture, or one with fewer pixels than points are asked for.
        """
        picture = load_picture(config.image)
        if config.blur and config.image != "analytic":
            picture = ndimage.gaussian_filter(picture, config.blur)
        wanted = config.num_points + config.num_test_points
        if picture.size < wanted:
            raise ArgumentError(
                f"the picture has {picture.size} pixels, but {wanted} different points are asked for. "
                "Lower num_points or num_test_points."
            )
        chosen = np.random.default_rng(config.seed).choice(picture.size, wanted, replace=False)
        values = picture.reshape(-1)[chosen]
        train = values[: config.num_points]
        spread = train.std()
        # A picture of one colour has a spread of rounding errors, eight digits below its values at the least.
        if spread <= 1e-8 * max(1.0, float(np.abs(train).max())):
            raise DegenerateError("the picture is constant at the training points, so that nothing can be learned.")
        picture = (picture - train.mean()) / spread
        points = grid_points(picture.shape)[chosen]
        x = torch.as_tensor(points, dtype=config.torch_dtype, device=config.device)
        y = torch.as_tensor(picture.reshape(-1, 1)[chosen], dtype=config.torch_dtype, device=config.device)
        split = config.num_points
        return cls(picture=picture, train_x=x[:split], train_y=y[:split], test_x=x[split:], test_y=y[split:])

    def coarse(self, shape: tuple[int, int]) -> Picture:
        """Average the picture over the cells of a coarser grid with the same borders."""
        height, width = self.picture.shape
        centres = grid_points(shape)
        rows = (centres[:, 1] + 1) / 2 * height - 0.5
        columns = (centres[:, 0] + 1) / 2 * width - 0.5
        blurred = ndimage.uniform_filter(self.picture, (max(height // shape[0], 1), max(width // shape[1], 1)))
        sampled: Picture = ndimage.map_coordinates(blurred, [rows, columns], order=1, mode="nearest")
        return sampled.reshape(shape)


def grid_points(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """List the centres of the pixels of a grid, row by row.

    Returns:
        Shape ``(height * width, 2)``: horizontal then vertical coordinate. The border of the picture is the border of
        [-1, 1]^2, so that the origin, where the initial kernel has its tip, is the centre of the picture.
    """
    height, width = shape
    vertical = (np.arange(height) + 0.5) / height * 2 - 1
    horizontal = (np.arange(width) + 0.5) / width * 2 - 1
    return np.stack([np.tile(horizontal, height), np.repeat(vertical, width)], axis=1)


def load_picture(name: str) -> Picture:
    """Load grey values, shape ``(height, width)``, of a sample photograph, of a file or of the analytic target.

    Raises:
        ArgumentError: The file is missing or cannot be read as a picture.
        ShapeError: It is not a grey or colour picture, or too small.
    """
    if name == "analytic":
        return _analytic(_ANALYTIC_SHAPE)
    if name in ("flower.jpg", "china.jpg"):
        samples = load_sample_images()
        index = [Path(f).name for f in samples.filenames].index(name)
        pixels = np.asarray(samples.images[index], dtype=np.float64) / 255
    else:
        pixels = _read_file(Path(name))
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        pixels = pixels[:, :, :3] @ _LUMINANCE
    if pixels.ndim != 2 or min(pixels.shape) < _MIN_SIDE:
        raise ShapeError(
            f"{name} has shape {pixels.shape}; a grey or colour picture of at least {_MIN_SIDE} x {_MIN_SIDE} pixels "
            "is needed."
        )
    if not np.isfinite(pixels).all():
        raise NonFiniteError(f"{name} holds a NaN or an infinity.")
    return pixels


def _read_file(path: Path) -> NDArray[np.float64]:
    try:
        is_file = path.is_file()
    except OSError:  # such as a name that is too long
        is_file = False
    if not is_file:
        raise ArgumentError(
            f"no picture {path}: neither a sample (flower.jpg, china.jpg, analytic) nor an existing file."
        )
    try:
        pixels = np.load(path, allow_pickle=False) if path.suffix == ".npy" else mpl_image.imread(path)
        return np.asarray(pixels, dtype=np.float64) / (255 if pixels.dtype == np.uint8 else 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise ArgumentError(f"{path} cannot be read as a picture: {error}") from error


def _analytic(shape: tuple[int, int]) -> Picture:
    """Evaluate sin(3 pi x) cos(2 pi y) plus the indicator of a disc: smooth parts and an edge."""
    x, y = grid_points(shape).T
    disc = (x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.25
    picture: Picture = np.sin(3 * np.pi * x) * np.cos(2 * np.pi * y) + disc
    return picture.reshape(shape)
