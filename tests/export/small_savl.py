"""A small SAVL with random weights, for tests of the export."""

from __future__ import annotations

import dataclasses

from torch import nn

import savl


def small_savl() -> savl.SAVL:
    """Return a network with one block and a window of 4 pixels, in evaluation mode."""
    config = dataclasses.replace(
        savl.CONFIGS["savl-tiny"], channels=8, depths=(1,), heads=2, window=4, estimator_width=4, latent=4
    )
    model = savl.build(dataclasses.replace(config, upsample_features=8)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model
