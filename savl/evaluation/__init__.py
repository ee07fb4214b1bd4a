"""Evaluation: fidelity of upscaled images, and tests of how much a representation encodes about a factor."""

from savl.evaluation.club import club
from savl.evaluation.comparison import Comparison, Method, OptionalMetrics, compare
from savl.evaluation.fidelity import Fidelity, fidelity
from savl.evaluation.geometry import ClassMeanGeometry, class_mean_geometry
from savl.evaluation.hsic import HSICResult, hsic
from savl.evaluation.intervals import AnalysisUnavailable, Interval
from savl.evaluation.mine import mine
from savl.evaluation.natural_scenes import Brisque, Niqe
from savl.evaluation.pairs import PairScores, evaluate_pair
from savl.evaluation.perceptual import Dists, Lpips, LpipsUnavailable, MetricUnavailable
from savl.evaluation.probe import ProbeResult, linear_probe
from savl.images.pairs import Pair, match_pairs

__all__ = [
    "AnalysisUnavailable",
    "Brisque",
    "ClassMeanGeometry",
    "Comparison",
    "Dists",
    "Fidelity",
    "HSICResult",
    "Interval",
    "Lpips",
    "LpipsUnavailable",
    "Method",
    "MetricUnavailable",
    "Niqe",
    "OptionalMetrics",
    "Pair",
    "PairScores",
    "ProbeResult",
    "class_mean_geometry",
    "club",
    "compare",
    "evaluate_pair",
    "fidelity",
    "hsic",
    "linear_probe",
    "match_pairs",
    "mine",
]
