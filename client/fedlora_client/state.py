"""What a client keeps on its own disk beside the ledger: what it sent last, the frozen tensors it holds, and what
proves to servers that its name is its own.

Every file is replaced atomically and is on the disk (fsync) before the call returns: an upload before it leaves. After
a crash the stored bytes are sent again at no cost.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from fedlora.files import replace_file
from fedlora.plan import Released, RoundPlan, Tensors, Upload, upload_metrics

SPARE_BYTES = 2**20
"""Beside the upload: for reports, and for the ledger where it is on the same disk."""
MOST_SECRETS = 100
"""Of runs and names."""


class MemoryState:
    """Keeps the frozen tensors in memory, and no upload: for simulations, where the process is the world.

    Nothing that was sent is asked for again there, and the uploads of a thousand clients would take more memory than
    the base model.

    Args:
        frozen: the cache of frozen tensors, one for all simulated clients.
    """

    def __init__(self, frozen: dict[str, Tensors]) -> None:
        self._frozen = frozen

    def stored_upload(self, plan: RoundPlan) -> None:
        """None: a round that was trained before is not sent again."""

    def save_upload(self, upload: Upload) -> None:
        """Keeps nothing."""

    def note_size(self, upload: Upload) -> None:
        """Keeps nothing."""

    def sizes(self, run_id: str) -> dict[tuple[int, int], int]:
        """Of no upload."""
        return {}

    def check_room(self, upload_bytes: int) -> None:
        """Nothing is kept, so that there is always room."""

    def frozen(self) -> tuple[str, Tensors]:
        """The frozen tensors that were received last, by whichever client, and their digest; ("", {}) if none were."""
        return next(iter(self._frozen.items()), ("", {}))

    def save_frozen(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors in place of the ones kept before."""
        if sha256 not in self._frozen:
            self._frozen.clear()
            self._frozen[sha256] = tensors


class FolderState:
    """Keeps them as files below `folder`, one folder per run. Only one process at a time may hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
        except BlockingIOError:
            raise ValueError(f"--state {folder} is in use by another fedlora-client; "
                             "stop that one, or give each client its own --state") from None
        except OSError as error:
            raise ValueError(f"--state {folder} cannot be written: {error.strerror}; name another folder") from None

    def stored_upload(self, plan: RoundPlan) -> Upload | None:
        """The upload made for exactly this (run, round, attempt), if it is the last one."""
        path = self.run_folder(plan.run.run_id) / "upload.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="np") as stored:
            about = json.loads(stored.metadata()["upload"])
            if (plan.run.run_id, about.pop("round"), about.pop("attempt")) != plan.key:
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        return Upload(*plan.key, tensors=Released(tensors), **about)

    def check_room(self, upload_bytes: int) -> None:
        """Asked before a training is charged, that it need not end for want of room. The size is that of any upload.

        Raises:
            OSError: ENOSPC: the disk has no room for an upload of so many bytes beside the last one.
        """
        free = shutil.disk_usage(self.folder).free
        if free < upload_bytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"--state {self.folder} has room for {free:,} bytes, and an upload of "
                                        f"{upload_bytes:,} is to be kept there before it leaves; make room")

    def save_upload(self, upload: Upload) -> None:
        about = {"round": upload.round, "attempt": upload.attempt} | upload_metrics(upload)
        replace_file(self.run_folder(upload.run_id) / "upload.safetensors",
                     to_bytes(dict(upload.tensors), metadata={"upload": json.dumps(about)}))

    def note_size(self, upload: Upload) -> None:
        """Keep how many values the upload has: in a round that trains a part of the tensors they are fewer."""
        sizes = self.sizes(upload.run_id) | {
            (upload.round, upload.attempt): sum(array.size for array in upload.tensors.values())}
        replace_file(self.run_folder(upload.run_id) / "sizes.json",
                     json.dumps([[*key, size] for key, size in sizes.items()]).encode())

    def sizes(self, run_id: str) -> dict[tuple[int, int], int]:
        """(round, attempt) → the number of values of its upload, made by whatever process."""
        path = self.run_folder(run_id) / "sizes.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return {(round, attempt): size for round, attempt, size in kept}

    def frozen(self) -> tuple[str, Tensors]:
        """The frozen tensors that were received last, and their digest; ("", {}) if none were."""
        path = next((path for path in self._frozen_files if path.exists()), None)
        if path is None:
            return "", {}
        with safe_open(path, framework="np") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            return stored.metadata()["sha256"], tensors

    def save_frozen(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors in place of the ones kept before: a client needs only the latest."""
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        kept, former = self._frozen_files
        replace_file(kept, to_bytes(arrays, metadata={"sha256": sha256}))
        former.unlink(missing_ok=True)

    @property
    def _frozen_files(self) -> tuple[Path, Path]:
        """Where they are kept, and where versions before protocol 6 did."""
        return self.folder / "frozen.safetensors", self.folder / "shared.safetensors"

    def said(self, run_id: str) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
        """The label names announced in the run, and the (round, code) of each refusal sent, by whatever process."""
        path = self.run_folder(run_id) / "said.json"
        if not path.exists():
            return (), []
        about = json.loads(path.read_text(encoding="utf-8"))
        return tuple(about["labels"]), [(round, code) for round, code in about["refusals"]]

    def save_said(self, run_id: str, labels: Sequence[str], refusals: Sequence[tuple[int, str]]) -> None:
        """Keep what was announced and refused, for the run's privacy report."""
        replace_file(self.run_folder(run_id) / "said.json",
                     json.dumps({"labels": labels, "refusals": refusals}).encode())

    def unfinished(self, run_id: str) -> Path:
        """The mark of a round that is under way, or was never finished; see `Participation.answer_unattended`."""
        return self.run_folder(run_id) / "unfinished"

    def save_unfinished(self, run_id: str) -> None:
        """Set the mark."""
        replace_file(self.unfinished(run_id), b"")

    def secret(self, run_id: str, name: str) -> bytes:
        """What was last kept for the name in the run, at whatever address its server is; b"" if nothing was."""
        return next((bytes.fromhex(secret) for *whose, secret in self._secrets() if whose == [run_id, name]), b"")

    def save_secret(self, run_id: str, name: str, secret: bytes) -> None:
        """Keep it in place of the one before, for this user alone to read."""
        others = [kept for kept in self._secrets() if kept[:2] != [run_id, name]]
        kept = [*others[1 - MOST_SECRETS:], [run_id, name, secret.hex()]]
        replace_file(self.folder / "secrets.json", json.dumps(kept, indent=1).encode())

    def _secrets(self) -> list[list[str]]:
        """[run id, name, secret in hexadecimal] each, the newest last."""
        path = self.folder / "secrets.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def run_folder(self, run_id: str) -> Path:
        """Where what belongs to one run is kept."""
        return self.folder / run_id


State = MemoryState | FolderState


def _lock(path: Path):
    import fcntl  # Linux and macOS; Windows through WSL

    handle = path.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle
