"""Local training on one client's data: per-record gradients, clipping, noise and the optimizer."""

from fedlora.training.job import Encoding, TrainingJob, TrainResult
from fedlora.training.precision import resolve_device, resolve_precision
from fedlora.training.rehearsal import padding_counts
from fedlora.training.trainer import Trainer, check_computing

__all__ = ["Encoding", "TrainResult", "Trainer", "TrainingJob", "check_computing", "padding_counts", "resolve_device",
           "resolve_precision"]
