"""What FedLoRA's training is measured beside: Opacus, by hooks and by ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from .subjects import Subject

MODES = ("hooks", "ghost")


def opacus_step(subject: Subject, mode: str) -> Callable[[int], None]:
    """A private step of Opacus on all of the subject's records at once; the subject's own trainer is of no use after.

    The model is the same, with its weights in the same precision and attention; only the clipping differs.

    Args:
        mode: "hooks" keeps every record's gradient; "ghost" finds their norms, then runs the backward pass again.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # it says so in every step
    adapted, run = subject.adapted, subject.plan
    parameters = [parameter for _, parameter in adapted.trained_parameters()]
    for leaf, _ in adapted.trained_leaves():
        leaf.__class__ = nn.Linear  # Opacus knows no subclasses,
        leaf.train()  # and sees layers in training mode alone; nothing else is in it, so dropout stays off
    inner = torch.optim.SGD(parameters, lr=run.lr)
    private = {"noise_multiplier": 1.0, "max_grad_norm": run.clip_norm, "expected_batch_size": len(subject.records)}
    loss = nn.CrossEntropyLoss()
    everything = np.arange(len(subject.records))
    batch = subject.trainer.task.collate(subject.records, everything, run.max_length, subject.trainer.device)
    module: GradSampleModule | GradSampleModuleFastGradientClipping
    optimizer: torch.optim.Optimizer
    criterion: Callable[..., torch.Tensor]
    if mode == "hooks":
        module, optimizer, criterion = GradSampleModule(adapted.model), DPOptimizer(inner, **private), loss
    else:
        module = GradSampleModuleFastGradientClipping(adapted.model, max_grad_norm=run.clip_norm)
        ghost = DPOptimizerFastGradientClipping(inner, **private)
        optimizer, criterion = ghost, DPLossFastGradientClipping(module, ghost, loss)

    def step(block: int) -> None:
        with subject.trainer.autocast():
            logits = module(**batch.inputs()).logits
        criterion(logits.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
