"""What a client keeps on its own disk about one run: what it spent, what it sent, and the shared tensors it holds.

Every file is replaced atomically and is on the disk (fsync) before the call returns: a charge is written before the
first record is read, an upload before it leaves. After a crash the stored bytes are sent again at no cost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from fedlora.plan import RoundPlan, Tensors, Upload, upload_metrics
from fedlora.privacy import Accountant, Spend


@dataclass(frozen=True)
class Account:
    """One client's spending in one run.

    Attributes:
        plan_sha256: digest of the run's plan; a run whose plan changes is refused.
        sampling_rate, noise_multiplier, delta, clip_norm: fixed at the run's start; None where privacy is off.
        started: (round, attempt) of every training that began, whether or not it was sent.
        history: what the trainings that began are charged with.
    """

    plan_sha256: str
    sampling_rate: float
    noise_multiplier: float | None
    delta: float | None
    clip_norm: float
    started: tuple[tuple[int, int], ...] = ()
    history: tuple[Spend, ...] = ()

    @property
    def terms(self) -> str:
        """What may not change within a run, for people and for comparison."""
        return (f"sampling rate {self.sampling_rate!r}, noise multiplier {self.noise_multiplier!r}, delta "
                f"{self.delta!r}, clip norm {self.clip_norm!r}")

    def charged(self, round: int, attempt: int, steps: int) -> Account:
        """The account after one more training began."""
        history = self.history
        if self.noise_multiplier is not None:
            accountant = Accountant(history)
            accountant.add(self.noise_multiplier, self.sampling_rate, steps)
            history = accountant.history
        return replace(self, started=(*self.started, (round, attempt)), history=history)

    def epsilon(self) -> float:
        """Spent so far; 0 before the first step, infinite without privacy."""
        if self.noise_multiplier is None or self.delta is None:
            return float("inf") if self.started else 0.0
        return Accountant(self.history).epsilon(self.delta)


class MemoryState:
    """Keeps a run's account and last upload in memory: for simulations, where the process is the world.

    Args:
        shared: the cache of frozen tensors, one for all simulated clients.
    """

    def __init__(self, shared: dict[str, Tensors]) -> None:
        self._accounts: dict[str, Account] = {}
        self._upload: Upload | None = None
        self._shared = shared

    def account(self, run_id: str) -> Account | None:
        return self._accounts.get(run_id)

    def save_account(self, run_id: str, account: Account) -> None:
        self._accounts[run_id] = account

    def stored_upload(self, plan: RoundPlan) -> Upload | None:
        """The upload made for exactly this (run, round, attempt), if it is the last one."""
        last = self._upload
        return last if last and (last.run_id, last.round, last.attempt) == plan.key else None

    def save_upload(self, upload: Upload) -> None:
        self._upload = upload

    def shared(self, sha256: str) -> Tensors | None:
        """The frozen tensors with this digest, if any client received them before."""
        return self._shared.get(sha256)

    def save_shared(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors under their digest, in place of the ones kept before."""
        if sha256 not in self._shared:
            self._shared.clear()
            self._shared[sha256] = tensors


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

    def account(self, run_id: str) -> Account | None:
        path = self._run(run_id) / "account.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text())
            raw["started"] = tuple((int(r), int(a)) for r, a in raw["started"])
            raw["history"] = tuple(Spend(**spend) for spend in raw["history"])
            return Account(**raw)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged. What this run spent is unknown, so it cannot go on; "
                             "restore the file, or take part in a new run") from None

    def save_account(self, run_id: str, account: Account) -> None:
        with _replacing(self._run(run_id) / "account.json") as temporary:
            temporary.write_text(json.dumps(asdict(account), indent=1))

    def stored_upload(self, plan: RoundPlan) -> Upload | None:
        """The upload made for exactly this (run, round, attempt), if it is the last one."""
        path = self._run(plan.run.run_id) / "upload.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="np") as stored:
            about = json.loads(stored.metadata()["upload"])
            if (plan.run.run_id, about.pop("round"), about.pop("attempt")) != plan.key:
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        return Upload(*plan.key, tensors=tensors, **about)

    def save_upload(self, upload: Upload) -> None:
        about = {"round": upload.round, "attempt": upload.attempt} | upload_metrics(upload)
        with _replacing(self._run(upload.run_id) / "upload.safetensors") as temporary:
            save_file(dict(upload.tensors), temporary, metadata={"upload": json.dumps(about)})

    def shared(self, sha256: str) -> Tensors | None:
        """The frozen tensors with this digest, if they were received before."""
        path = self.folder / "shared" / f"{sha256}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="np") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)

    def save_shared(self, sha256: str, tensors: Tensors) -> None:
        """Keep the tensors under their digest, in place of the ones kept before: a client needs only the latest."""
        folder = self.folder / "shared"
        with _replacing(folder / f"{sha256}.safetensors") as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary)
        for old in folder.glob("*.safetensors"):
            if old.stem != sha256:
                old.unlink()

    def _run(self, run_id: str) -> Path:
        return self.folder / run_id


State = MemoryState | FolderState


def _lock(path: Path):
    import fcntl  # Linux and macOS; Windows through WSL

    handle = path.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose content then takes the place of `path`, and is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    yield temporary
    _to_disk(temporary)
    os.replace(temporary, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
