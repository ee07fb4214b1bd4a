"""The SAVL network in plain PyTorch, structured as in the paper.

Read in this order: `savl.network.savl` (the whole network and its upsamplers), `savl.network.estimator` (the amortized
estimator and the degradation field), `savl.network.rhag` (DA-RHAG, HAB, OCAB), `savl.network.dsca` (DSCA), and
`savl.network.decoder` (the likelihood decoder of training). Settings are in `savl.network.config`.
"""

from savl.network.config import CONFIGS, SAVLConfig
from savl.network.decoder import LikelihoodDecoder
from savl.network.dsca import DSCA
from savl.network.estimator import AmortizedEstimator, DegradationField, RestorationStrength
from savl.network.layers import reflect_pad_to_multiple
from savl.network.rhag import CAB, DARHAG, HAB, OCAB
from savl.network.savl import SAVL

__all__ = [
    "CAB",
    "CONFIGS",
    "DARHAG",
    "DSCA",
    "HAB",
    "OCAB",
    "SAVL",
    "AmortizedEstimator",
    "DegradationField",
    "LikelihoodDecoder",
    "RestorationStrength",
    "SAVLConfig",
    "reflect_pad_to_multiple",
]
