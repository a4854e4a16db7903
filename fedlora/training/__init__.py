"""Training on private data: per-record gradients, clipping, noise."""

from fedlora.training.precision import resolve_device, resolve_precision
from fedlora.training.trainer import Trainer, Training, TrainResult

__all__ = ["TrainResult", "Trainer", "Training", "resolve_device", "resolve_precision"]
