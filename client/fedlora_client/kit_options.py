"""The options of a client with what the coordinator's kit says, where its owner says nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TypeVar

from fedlora.config import ClientConfig
from fedlora.kit import Kit
from fedlora.plan import MOST_ANNOUNCED
from fedlora.privacy import DatasetPolicy

C = TypeVar("C", bound=ClientConfig)


def with_kit(options: C, given: Collection[str], kit: Kit) -> C:
    """Return the options with the kit's server, task and columns, where they are not given.

    Args:
        options: the options of fedlora-client; they name the kit.
        given: names of the options that are given.
        kit: the coordinator's kit.

    Raises:
        ValueError: --task is not the kit's.
    """
    assert options.kit is not None, "the caller has read it"
    if "task" in given and options.task != kit.plan.task:
        raise ValueError(f"--task {options.task} is not the kit's, {kit.plan.task}; leave the option out")
    return dataclasses.replace(
        options, kit=options.kit.absolute(), server=options.server if "server" in given else kit.address,
        task=kit.plan.task, column={**kit.columns, **options.column})


def labels_to_take(options: ClientConfig, known: DatasetPolicy | None, kit: Kit) -> tuple[str, ...]:
    """Return the kit's labels if this client may declare them: its owner declares none. () otherwise.

    Args:
        options: the options of fedlora-client.
        known: the policy's table of the data set; None if it has none.
        kit: the coordinator's kit.
    """
    labels = kit.plan.labels
    declared = options.labels or (known and known.labels)
    return labels if not declared and len(labels) <= MOST_ANNOUNCED else ()
