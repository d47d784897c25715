"""One target for each point, and several rows of the covariance: said before GPyTorch fails to broadcast."""

from __future__ import annotations

import inspect

from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from ntk_lazy.errors import ShapeError


def refuse_one_target(num_points: int, num_outputs: int) -> None:
    """Refuse a normal distribution of as many numbers as there are points, if it is what asks for the outputs.

    Its mean reaches no kernel, and the first that comes of the two is a sum with noise inside GPyTorch: whoever makes
    the distribution is looked up among the callers. Where it is not found there, GPyTorch's own error remains.

    Raises:
        ShapeError: The mean of the distribution has one number for each point.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not MultivariateNormal.__init__.__code__:
        frame = frame.f_back
    mean = None if frame is None else frame.f_locals.get("mean")
    if isinstance(mean, Tensor) and mean.shape[-1] == num_points:
        raise several_outputs(num_points, num_points * num_outputs)


def several_outputs(num_targets: int, num_rows: int) -> ShapeError:
    """What is wrong, and what to do."""
    return ShapeError(
        f"the covariance of {num_targets} targets has {num_rows} rows: a network with several outputs takes as many "
        "tasks (MultitaskMultivariateNormal, MultitaskGaussianLikelihood), or one output, NTKKernel(..., outputs=0)."
    )
