"""The networks that are measured, by name, with their inputs; nothing here needs more than torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm encoder block with attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, tokens, width)`` to the same shape."""
        b, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(b, tokens, width))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """Two blocks and a mean over tokens."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(16, 64), nn.Sequential(Block(64, 4), Block(64, 4))
        self.head = nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, tokens, 16)`` to ``(b, C)``."""
        return self.head(self.blocks(self.embed(x)).mean(1))


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False),
                nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)])
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images."""
        h = torch.relu(self.norms[0](self.convs[0](x)))
        return torch.relu(self.skip(x) + self.norms[1](self.convs[1](h)))


class Sine(nn.Module):
    """The activation of a SIREN."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``sin(30 x)``."""
        return torch.sin(30 * x)


class Recurrent(nn.Module):
    """An LSTM and a readout of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, steps, 8)`` to ``(b, 1)``."""
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((2, 256, 256, 256, 256, 256, 1)):
        layers += [nn.Linear(d_in, d_out), nn.LeakyReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def cnn(num_outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for (c_in, c_out), stride in zip(itertools.pairwise((3, 32, 64, 64, 128)), (1, 2, 2, 2), strict=True):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, num_outputs))


def resnet(num_outputs: int) -> nn.Module:
    blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for c_in, c_out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)):
        blocks += [Residual(c_in, c_out, stride), Residual(c_out, c_out, 1)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_outputs))
    net(torch.randn(64, 3, 32, 32))  # gives the norms their statistics
    return net.eval()


def siren() -> nn.Module:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((2, 256, 256, 256, 256, 1)):
        layers += [nn.Linear(d_in, d_out), Sine()]
        bound = 1 / d_in if d_in == 2 else (6 / d_in) ** 0.5 / 30
        nn.init.uniform_(layers[-2].weight, -bound, bound)
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    """A network and the shape of one of its examples.

    Attributes:
        make: The network.
        example: Shape.
        num_outputs: C.
        batch: Examples in a batch of a library that asks for one.
    """

    make: Callable[[], nn.Module]
    example: tuple[int, ...]
    num_outputs: int
    batch: int

    def network(self) -> nn.Module:
        """Make it, always the same."""
        torch.manual_seed(0)
        return self.make()

    def inputs(self, n: int) -> Tensor:
        """Draw n examples, always the same."""
        generator = torch.Generator().manual_seed(1)
        if self.example == (2,):
            return torch.rand(n, 2, generator=generator) * 2 - 1
        return torch.randn(n, *self.example, generator=generator)


CASES = {
    "mlp": Case(mlp, (2,), 1, 1000),
    "cnn": Case(lambda: cnn(1), (3, 32, 32), 1, 64),
    "cnn, C=10": Case(lambda: cnn(10), (3, 32, 32), 10, 64),
    "transformer": Case(lambda: Encoder(1), (64, 16), 1, 64),
    "transformer, C=10": Case(lambda: Encoder(10), (64, 16), 10, 64),
    "resnet": Case(lambda: resnet(1), (3, 32, 32), 1, 32),
    "resnet, C=10": Case(lambda: resnet(10), (3, 32, 32), 10, 32),
    "siren": Case(siren, (2,), 1, 1000),
    "lstm": Case(Recurrent, (32, 8), 1, 64),
}
