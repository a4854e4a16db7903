"""The state after the last finished round, as one safetensors file that is always whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fedlora.plan import Tensors

FILE = "checkpoint.safetensors"


def save(folder: Path, run_id: str, round: int, state: Tensors) -> Path:
    """Replace the folder's checkpoint: a reader, or a crash, finds the old one or the new one, nothing between."""
    path, unfinished = folder / FILE, folder / (FILE + ".new")
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(arrays, unfinished, metadata={"run_id": run_id, "round": str(round)})
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(unfinished, path)
    return path


def load(folder: Path) -> tuple[str, int, Tensors]:
    """The run's id, the last finished round, and the state after it.

    Raises:
        ValueError: there is no checkpoint in the folder.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {FILE}; no round of that run was finished")
    with safe_open(path, framework="np") as stored:
        about = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    return about["run_id"], int(about["round"]), tensors
