"""Implicit networks: from coordinates to values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .architecture import Built, architecture


def _points(count: int = 6) -> Tensor:
    return torch.rand(count, 2) * 2 - 1


@architecture("SIREN", "siren-pytorch")
def siren():
    from siren_pytorch import SirenNet

    return Built(SirenNet(dim_in=2, dim_hidden=32, dim_out=3, num_layers=3, w0_initial=30.0).eval(), _points())


class Modulated(nn.Module):
    """A SIREN whose layers are scaled by a network of a latent vector that comes with each point."""

    def __init__(self) -> None:
        super().__init__()
        from siren_pytorch.siren_pytorch import Modulator, SirenNet

        self.net = SirenNet(dim_in=2, dim_hidden=16, dim_out=3, num_layers=2)
        self.modulator = Modulator(dim_in=4, dim_hidden=16, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        """Two coordinates and four entries of the latent vector."""
        return torch.stack([self._one(row[:2], row[2:]) for row in x])

    def _one(self, point: Tensor, latent: Tensor) -> Tensor:
        return self.net(point[None], mods=self.modulator(latent))[0]


@architecture("modulated SIREN", "siren-pytorch")
def modulated():
    return Built(Modulated().eval(), torch.cat([_points(), torch.randn(6, 4)], dim=1))


class Fourier(nn.Module):
    """Random Fourier features before a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, 16) * 3)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Sines and cosines of random frequencies, then the network."""
        angles = 2 * torch.pi * x @ self.frequencies
        return self.net(torch.cat([angles.sin(), angles.cos()], dim=-1))


@architecture("Fourier features", "torch")
def fourier():
    return Built(Fourier().eval(), _points())


@architecture("KAN", "pykan")
def kan():
    from kan import KAN

    return Built(KAN(width=[2, 4, 2], grid=3, k=3, auto_save=False).eval(), _points())


@architecture("KAN, fast", "pykan")
def kan_fast():
    from kan import KAN

    return Built(KAN(width=[2, 4, 2], grid=3, k=3, auto_save=False).speed().eval(), _points())


@architecture("KAN, multiplications", "pykan")
def kan_mult():
    from kan import KAN

    return Built(KAN(width=[2, [3, 2], 2], grid=3, k=3, auto_save=False).eval(), _points())


@architecture("KAN layer", "pykan")
def kan_layer():
    from kan.KANLayer import KANLayer

    class First(nn.Module):
        """The outputs of one layer, without its activations."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLayer(in_dim=2, out_dim=3, num=4, k=3)

        def forward(self, x: Tensor) -> Tensor:
            """Return the first of what the layer returns."""
            return self.layer(x)[0]

    return Built(First().eval(), _points())
