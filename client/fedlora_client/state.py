"""The client's own files beside the ledger: its last upload, the frozen tensors it holds, and its names' secrets.

Every file is replaced atomically and is on disk (fsync) when the call returns. In particular an upload is on disk
before it leaves: after a crash the stored bytes are sent again at no further cost.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from fedlora.files import replace_file
from fedlora.plan import Released, RoundPlan, Tensors, Upload, upload_metrics

SPARE_BYTES = 2**20
"""Bytes that must stay free beside an upload: for reports, and for the ledger if it is on the same disk."""

MOST_SECRETS = 100
"""Secrets that are kept, one for each run and name; the oldest are dropped."""


class MemoryState:
    """State of a simulated client: the frozen tensors are kept in memory, and uploads are not kept at all.

    A simulation never asks for an upload again, and the uploads of a thousand clients would take more memory than the
    base model.

    Args:
        frozen: the cache of frozen tensors, {digest: tensors}, shared by all simulated clients.
    """

    def __init__(self, frozen: dict[str, Tensors]) -> None:
        self._frozen = frozen

    def stored_upload(self, plan: RoundPlan) -> None:
        """Return None: no upload is kept."""

    def save_upload(self, upload: Upload) -> None:
        """Do nothing: no upload is kept."""

    def note_size(self, upload: Upload) -> None:
        """Do nothing: sizes are for the privacy report of a real client."""

    def sizes(self, run_id: str) -> dict[tuple[int, int], tuple[int, int | None]]:
        """Return {}: no sizes are kept."""
        return {}

    def revealed(self, run_id: str) -> list[tuple[int, int]]:
        """Return []: a simulated client masks nothing."""
        return []

    def check_room(self, upload_bytes: int) -> None:
        """Do nothing: what is not kept needs no room."""

    def frozen(self) -> tuple[str, Tensors]:
        """Return the digest of the frozen tensors that any client received last, and the tensors; ("", {}) if none."""
        return next(iter(self._frozen.items()), ("", {}))

    def save_frozen(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors, whose digest is `sha256`, in place of the former ones."""
        if sha256 not in self._frozen:
            self._frozen.clear()
            self._frozen[sha256] = tensors


class FolderState:
    """State of a real client: files below `folder`, with one folder per run. Only one process at a time may use it.

    Raises:
        ValueError: another process uses the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
        except BlockingIOError:
            raise ValueError(f"--state {folder} is in use by another fedlora-client; stop that one, or give each "
                             "client a --state of its own") from None
        except OSError as error:
            raise ValueError(f"--state {folder} cannot be written: {error.strerror}; name another folder") from None

    def stored_upload(self, plan: RoundPlan) -> Upload | None:
        """Return the last upload if it was made for exactly this (run, round, attempt); else None."""
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
        """Check that the disk has room for one more upload beside the last one. Called before a training is charged.

        Args:
            upload_bytes: size of the upload. It follows from the plan, not from the data.

        Raises:
            OSError: ENOSPC: there is not enough room.
        """
        free = shutil.disk_usage(self.folder).free
        if free < upload_bytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, f"--state {self.folder} has room for {free:,} bytes, and an upload of "
                                        f"{upload_bytes:,} is to be kept there before it leaves; free some space")

    def save_upload(self, upload: Upload) -> None:
        """Keep the upload in place of the run's former one."""
        about = {"round": upload.round, "attempt": upload.attempt} | upload_metrics(upload)
        replace_file(self.run_folder(upload.run_id) / "upload.safetensors",
                     to_bytes(dict(upload.tensors), metadata={"upload": json.dumps(about)}))

    def note_size(self, upload: Upload) -> None:
        """Keep the number of values in the upload, for the privacy report.

        It differs from round to round where a round trains only a part of the tensors.
        """
        arrays = upload.tensors.values()
        width = next((array.dtype.itemsize for array in arrays if array.dtype.kind == "u"), None)
        sizes = self.sizes(upload.run_id) | {
            (upload.round, upload.attempt): (sum(array.size for array in arrays), width)}
        replace_file(self.run_folder(upload.run_id) / "sizes.json",
                     json.dumps([[*key, *filter(None, size)] for key, size in sizes.items()]).encode())

    def sizes(self, run_id: str) -> dict[tuple[int, int], tuple[int, int | None]]:
        """Return (round, attempt) → (number of values in the upload, bytes of each), also of earlier processes.

        The number of bytes is that of a masked vector's integers; None for an upload in the run's number format.
        """
        kept = _kept(self.run_folder(run_id) / "sizes.json") or []
        return {(round, attempt): (size, *width, None)[:2] for round, attempt, size, *width in kept}

    def save_revealed(self, run_id: str, round: int, attempt: int) -> None:
        """Keep that this client reveals its shares of an attempt at a round, for the privacy report."""
        replace_file(self.run_folder(run_id) / "revealed.json",
                     json.dumps([*self.revealed(run_id), (round, attempt)]).encode())

    def revealed(self, run_id: str) -> list[tuple[int, int]]:
        """Return (round, attempt) of each attempt of which shares were revealed, by earlier processes too."""
        kept = _kept(self.run_folder(run_id) / "revealed.json") or []
        return [(round, attempt) for round, attempt in kept]

    def frozen(self) -> tuple[str, Tensors]:
        """Return the digest of the frozen tensors that were received last, and the tensors; ("", {}) if none."""
        path = next((path for path in self._frozen_files if path.exists()), None)
        if path is None:
            return "", {}
        with safe_open(path, framework="np") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            return stored.metadata()["sha256"], tensors

    def save_frozen(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors, whose digest is `sha256`, in place of the former ones: only the latest are needed."""
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        kept, former = self._frozen_files
        replace_file(kept, to_bytes(arrays, metadata={"sha256": sha256}))
        former.unlink(missing_ok=True)

    @property
    def _frozen_files(self) -> tuple[Path, Path]:
        """The file of the frozen tensors, and the file in which versions before protocol 6 kept them."""
        return self.folder / "frozen.safetensors", self.folder / "shared.safetensors"

    def said(self, run_id: str) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
        """Return the label names that were announced in the run, and (round, code) of each refusal that was sent.

        Those of earlier processes are included.
        """
        about = _kept(self.run_folder(run_id) / "said.json")
        if about is None:
            return (), []
        return tuple(about["labels"]), [(round, code) for round, code in about["refusals"]]

    def save_said(self, run_id: str, labels: Sequence[str], refusals: Sequence[tuple[int, str]]) -> None:
        """Keep what was announced and refused, for the run's privacy report."""
        replace_file(self.run_folder(run_id) / "said.json",
                     json.dumps({"labels": labels, "refusals": refusals}).encode())

    def unfinished(self, run_id: str) -> Path:
        """Return the path of the mark that says that a round is being trained, or was never finished.

        See `Participation.answer_unattended`.
        """
        return self.run_folder(run_id) / "unfinished"

    def save_unfinished(self, run_id: str) -> None:
        """Create the mark of `unfinished`."""
        replace_file(self.unfinished(run_id), b"")

    def secret(self, run_id: str, name: str) -> bytes:
        """Return the secret that was saved last for the run and the name; b"" if there is none.

        The server's address plays no part: a run may move to another one.
        """
        return next((bytes.fromhex(secret) for *whose, secret in self._secrets() if whose == [run_id, name]), b"")

    def save_secret(self, run_id: str, name: str, secret: bytes) -> None:
        """Keep the secret in place of the one before, in a file that only this user can read."""
        others = [kept for kept in self._secrets() if kept[:2] != [run_id, name]]
        kept = [*others[1 - MOST_SECRETS:], [run_id, name, secret.hex()]]
        replace_file(self.folder / "secrets.json", json.dumps(kept, indent=1).encode())

    def _secrets(self) -> list[list[str]]:
        """Return [run id, name, secret in hexadecimal] of each secret, the newest last."""
        kept: list[list[str]] = _kept(self.folder / "secrets.json") or []
        return kept

    def close(self) -> None:
        """Release the folder, so that another process can use it."""
        self._lock.close()

    def run_folder(self, run_id: str) -> Path:
        """Return the folder of one run's files."""
        return self.folder / run_id


State = MemoryState | FolderState


def _kept(path: Path) -> Any:
    """Return what a JSON file of this client holds; None if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a backup, or remove it: a report or a proof of "
                         "this client's name may then lack what was in it") from None


def _lock(path: Path) -> TextIO:
    """Lock a file until it is closed; raise BlockingIOError if another process has locked it."""
    import fcntl  # Linux and macOS; Windows through WSL

    handle = path.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle
