"""The eager reference network. It reads top to bottom like the paper: `savl.network.savl` first."""

from savl.network.config import CONFIGS, SAVLConfig
from savl.network.decoder import LikelihoodDecoder
from savl.network.dsca import DSCA
from savl.network.estimator import AmortizedEstimator
from savl.network.field import DegradationField
from savl.network.hab import CAB, HAB
from savl.network.ocab import OCAB
from savl.network.padding import reflect_pad_to_multiple
from savl.network.rhag import DARHAG
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
