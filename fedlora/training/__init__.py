"""Training on private data: per-record gradients, clipping, noise."""

from fedlora.training.multi_client import MultiClientTrainer
from fedlora.training.precision import resolve_device, resolve_precision
from fedlora.training.trainer import Trainer, TrainingJob, TrainResult, check_computing

__all__ = ["MultiClientTrainer", "TrainResult", "Trainer", "TrainingJob", "check_computing", "resolve_device",
           "resolve_precision"]
