"""Training: what is learned from (data), what is asked for (objectives), and the loop that does it (trainer)."""

from savl.training.config import TrainingConfig, load_config
from savl.training.trainer import Trainer

__all__ = ["Trainer", "TrainingConfig", "load_config"]
