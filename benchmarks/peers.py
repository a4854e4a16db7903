"""Peers to measure FedLoRA's training beside: Opacus with hooks, with ghost clipping, and in a published loop."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedlora.adapters import AdaptedModel

from .subjects import Subject

MODES = ("hooks", "ghost")


def opacus_round(subject: Subject, mode: str) -> Callable[[int], None]:
    """Return a function that trains one round's private steps with Opacus.

    Each step takes all of the subject's records at once. The model is the same, with the same weights, precision and
    attention; only the clipping differs.

    Args:
        subject: gives the model, the records and the plan. Its own trainer cannot be used any more.
        mode: "hooks" keeps every record's gradient; "ghost" computes their norms, then runs the backward pass again.
    """
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the warning comes in every step
    adapted, run = subject.adapted, subject.plan
    parameters = [parameter for _, parameter in adapted.trained_parameters()]
    for layer in plain_layers(adapted):  # Opacus knows no subclasses of Linear
        layer.train()  # Opacus handles layers in training mode only; all else stays in eval mode, without dropout
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

    def train(block: int) -> None:
        for _ in range(run.local_steps):
            with subject.trainer.autocast():
                logits = module(**batch.inputs()).logits
            criterion(logits.float(), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def plain_layers(adapted: AdaptedModel) -> list[nn.Linear]:
    """Replace each trained leaf by an ordinary linear layer with the same parameters; return the new layers."""
    trained, made = set(map(id, adapted.trained_leaves())), []
    for name, module in list(adapted.model.named_modules()):
        if id(module) in trained:
            assert isinstance(module, nn.Linear)
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            layer.weight, layer.bias = module.weight, module.bias
            adapted.model.set_submodule(name, layer)
            made.append(layer)
    return made


class PublishedLoop:
    """A round of private training as published federated code does it: with an Opacus engine made anew each round.

    Args:
        subject: gives the model, the records and the plan's batch and steps. Its own trainer cannot be used any more.
    """

    def __init__(self, subject: Subject) -> None:
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        self.run, self.records, self.adapted = subject.plan, subject.records, subject.adapted
        self.device = subject.trainer.device
        plain_layers(self.adapted)
        for module in self.adapted.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # as in our training; it would slow the loop a little
        self.adapted.model.train()
        everything = np.arange(len(self.records))
        batch = subject.trainer.task.collate(self.records, everything, int(self.records.lengths.max()))
        self.names = (*batch.inputs(), "labels")
        self.data = TensorDataset(*batch.inputs().values(), batch.labels)

    def __call__(self, block: int) -> int:
        """Train one round of the plan's steps; return the number of records drawn."""
        torch.manual_seed(block)
        parameters = [parameter for _, parameter in self.adapted.trained_parameters()]
        loader = DataLoader(self.data, batch_size=min(self.run.expected_batch, len(self.data)))
        module, optimizer, criterion, batches = PrivacyEngine().make_private(
            module=self.adapted.model, optimizer=torch.optim.SGD(parameters, lr=self.run.lr), data_loader=loader,
            criterion=nn.CrossEntropyLoss(), noise_multiplier=1.0, max_grad_norm=self.run.clip_norm,
            grad_sample_mode="ghost")
        drawn = 0
        for values in itertools.islice(batches, self.run.local_steps):
            given = {name: value.to(self.device) for name, value in zip(self.names, values, strict=True)}
            labels = given.pop("labels")
            optimizer.zero_grad()
            criterion(module(**given).logits, labels).backward()
            optimizer.step()
            drawn += len(labels)
        module.to_standard_module()
        return drawn
