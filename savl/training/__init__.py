"""Training: what is learned from (data), what is asked for (objectives), and the loop that does it (trainer)."""

from savl.training.config import TrainingConfig, load_config
from savl.training.perceptual import PerceptualUnavailable
from savl.training.processes import TrainingUnavailable
from savl.training.trainer import Trainer

__all__ = ["PerceptualUnavailable", "Trainer", "TrainingConfig", "TrainingUnavailable", "load_config"]
