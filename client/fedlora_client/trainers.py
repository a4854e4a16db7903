"""The trainer of a client, and its trial on made-up records before a record is read or charged."""

from __future__ import annotations

import logging

from fedlora.adapters import attach_planned
from fedlora.config import ClientConfig
from fedlora.models import LoadedModel
from fedlora.plan import Refused, RunPlan
from fedlora.tasks import Task
from fedlora.training import Trainer
from fedlora.training.adjustments import check_adjustment
from fedlora.training.batch_invariance import Findings

log = logging.getLogger(__name__)


def make_trainer(options: ClientConfig, plan: RunPlan, loaded: LoadedModel, task: Task, findings: Findings) -> Trainer:
    """Attach the plan's adapter to a base model and return a trainer for it.

    Args:
        options: the options of fedlora-client, which say how to compute.
        plan: the plan.
        loaded: the base model, which is changed in place.
        task: makes micro-batches and computes losses.
        findings: the memory of what was shown about this machine's arithmetic.

    Raises:
        Refused: "policy": the plan does not fit the model; the log says why. The data play no part in it.
        ValueError: this machine cannot compute as the options say.
        MemoryError: the memory does not suffice. The message names the options that help.
    """
    try:
        adapted = attach_planned(loaded, plan)
        check_adjustment(plan.adjustment, adapted.layout)
    except ValueError as error:
        log.error("The server's plan does not fit the model: %s", error)
        raise Refused("policy") from None
    return Trainer(adapted, task, device=options.device, precision=options.precision, micro_batch=options.micro_batch,
                   threads=options.threads, compiled=options.compile, findings=findings)


def try_out(trainer: Trainer, plan: RunPlan, rows_per_unit: int) -> None:
    """Test on made-up records what a private plan needs of the model and of this machine; nothing for other plans.

    Args:
        trainer: the trainer.
        plan: the plan.
        rows_per_unit: the most records of one unit of privacy in a step; 1 if each record is a unit.

    Raises:
        ValueError: the model or this machine cannot train under privacy.
        MemoryError: the memory does not suffice. The message names the options that help.
    """
    if plan.private:
        trainer.rehearse()
        trainer.show_batch_invariance(plan, rows_per_unit)
