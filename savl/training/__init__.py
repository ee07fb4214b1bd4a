"""Training: pairs of images (data), loss functions (objectives), and the training loop (trainer)."""

from savl.training.config import TrainingConfig, load_config
from savl.training.perceptual import PerceptualUnavailable
from savl.training.processes import TrainingUnavailable
from savl.training.trainer import Trainer

__all__ = ["PerceptualUnavailable", "Trainer", "TrainingConfig", "TrainingUnavailable", "load_config"]
