"""Evaluation: fidelity of upscaled images against their originals."""

from savl.evaluation.fidelity import Fidelity, fidelity
from savl.evaluation.pairs import Pair, PairScores, evaluate_pair, match_pairs
from savl.evaluation.perceptual import Lpips, LpipsUnavailable

__all__ = ["Fidelity", "Lpips", "LpipsUnavailable", "Pair", "PairScores", "evaluate_pair", "fidelity", "match_pairs"]
