"""The eager reference network. It reads top to bottom like the paper: `savl.network.savl` first."""

from savl.network.config import CONFIGS, SAVLConfig
from savl.network.decoder import LikelihoodDecoder
from savl.network.dsca import DSCA
from savl.network.estimator import AmortizedEstimator, DegradationField
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
    "SAVLConfig",
    "reflect_pad_to_multiple",
]
