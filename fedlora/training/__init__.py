"""Training on private data: per-record gradients, clipping, noise."""

from fedlora.training.batched import BatchedTrainer
from fedlora.training.precision import resolve_device, resolve_precision
from fedlora.training.trainer import Trainer, Training, TrainResult, check_computing

__all__ = ["BatchedTrainer", "TrainResult", "Trainer", "Training", "check_computing", "resolve_device",
           "resolve_precision"]
