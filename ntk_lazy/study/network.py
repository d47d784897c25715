"""The network of the paper: fully connected, Leaky-ReLU, Xavier weights, zero biases."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from ntk_lazy.study.config import StudyConfig

_INPUTS = 2


def build_network(config: StudyConfig) -> nn.Sequential:
    """Build the network that maps a point of the plane to one grey value.

    The seed of the settings decides the weights; the global RNG is not touched. With zero biases and centred inputs the
    network is positively homogeneous at the start, which is why its first eigenfunctions are cones.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020): 6 weight layers of width 256.
    """
    generator = torch.Generator().manual_seed(config.seed)
    widths = [_INPUTS, *[config.width] * (config.num_layers - 1), 1]
    modules: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        # skip_init: the default initialisation would draw from the global RNG.
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        modules.append(layer)
        if index < config.num_layers - 1:
            modules.append(nn.LeakyReLU(config.negative_slope))
    return nn.Sequential(*modules).to(device=config.device, dtype=config.torch_dtype)
