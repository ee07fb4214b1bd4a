"""The networks of the estimators: small perceptrons, drawn from a generator of their own."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn


def perceptron(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them, float32, on the CPU; torch's own seed has no say in it.

    Args:
        widths: Of the input, the hidden layers and the output.
        generator: Draws weights and biases uniformly within ±1/√inputs, as `nn.Linear` does.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
