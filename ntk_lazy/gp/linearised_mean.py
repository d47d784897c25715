"""The mean of a trained network's linearisation whose weights are centred at zero before any data."""

from __future__ import annotations

from typing import final

import torch
from gpytorch.means import Mean
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.linearisation import outputs
from ntk_lazy.errors import ArgumentError
from ntk_lazy.gp.ntk_kernel import NTKKernel

_EXAMPLES = 1024  # that go through the network at once


@final
class LinearisedMean(Mean):  # type: ignore[misc]  # gpytorch has no types
    """``m(x) = f(x) − J(x) w0`` of the network that a kernel holds, with its parameters w0 of now.

    With ``ScaleKernel(kernel)`` as covariance the prior is ``f(x) + J(x) (w − w0)`` with ``w ~ N(0, s I)``: Bayesian
    regression with the linearised network. Its posterior mean is what the network returns, and a correction; scale s
    and noise can be had from the marginal likelihood of the very points that the network was trained on. With ``f(x)``
    alone as mean they cannot: residuals on these points are smaller than on any others.

    Args:
        kernel: Says which network, which parameters and which outputs; its network is not trained with it.

    Cost: a forward pass and half a product with one column, for each call.

    Raises:
        ArgumentError: A kernel whose network is trained, or one of traces, which is no kernel of a function.

    Source: Khan, Immer, Abedi and Korzepa, Approximate inference turns deep networks into Gaussian processes (NeurIPS
        2019); Immer, Korzepa and Bauer, Improving predictions of Bayesian neural nets via local linearization
        (AISTATS 2021).
    """

    def __init__(self, kernel: NTKKernel) -> None:
        super().__init__()
        if not isinstance(kernel, NTKKernel):
            raise ArgumentError(f"LinearisedMean takes the NTKKernel of the network, not {type(kernel).__name__}.")
        if kernel.trainable:
            raise ArgumentError("LinearisedMean is for a network that stays as it is; its kernel has trainable=True.")
        if kernel.outputs == "trace":
            raise ArgumentError("the kernel averages over outputs (outputs='trace'), of which no one function is left.")
        # Not as a submodule: parameters and state of the network are those of the kernel.
        self._kernel = (kernel,)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the mean at inputs of shape ``(*batch, N, D)``: ``(*batch, N)``, or ``(*batch, N, C)`` for C > 1."""
        (kernel,) = self._kernel
        flat = x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            K, network, points = kernel.linearised_at(flat)
            w0 = torch.cat([p.reshape(-1).to(K.dtype) for p in network.params.values()]).unsqueeze(1)
            pieces = [outputs(network, points[s]) for s in slices(points.shape[0], _EXAMPLES)]
            f = torch.cat(pieces)
            if kernel.outputs == "sum":
                f = f.sum(1, keepdim=True) / f.shape[1] ** 0.5
            elif kernel.outputs != "full":
                f = f[:, [int(kernel.outputs)]]
            mean: Tensor = f - K.jacobian_matmul(w0).reshape(f.shape)
        return mean.squeeze(-1).reshape(x.shape[:-1]) if f.shape[1] == 1 else mean.reshape(*x.shape[:-1], -1)
