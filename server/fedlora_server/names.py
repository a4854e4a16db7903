"""Whose a name is: the SHA-256 of the secret that each client showed, or was given, when it first became ready.

Held for a run, each in a file of its own in the run's folder, so that a server that takes the run up again knows them
and `fedlora-server forget` can remove one while a server runs. The secrets themselves are with the clients alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
from pathlib import Path

from fedlora.files import replace_file

log = logging.getLogger(__name__)

FOLDER = "names"
"""Of a run's folder."""


def file_of(folder: Path, name: str) -> Path:
    """Where a name's digest is kept; a name can hold any printable character."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


class Names:
    """Any number of threads may use it.

    Args:
        folder: those that an earlier server of the run kept there hold on. None keeps them in memory alone, as
            everything is kept before `begin`.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._digests: dict[str, bytes] = {}
        self._written: set[str] = set()
        self._lock = threading.Lock()
        self._begun = folder is not None and folder.is_dir()
        for path in sorted(folder.glob("*.json")) if folder is not None and self._begun else ():
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
                name, digest = about["name"], bytes.fromhex(about["secret_sha256"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s cannot be read (%s); whoever joins next under the name that it held has the name",
                            path, error)
                continue
            self._digests[name] = digest
            self._written.add(name)

    @property
    def taken(self) -> tuple[str, ...]:
        """The names that somebody has."""
        with self._lock:
            return tuple(self._digests)

    def begin(self) -> None:
        """The run has begun: names are kept in the folder from now on."""
        with self._lock:
            self._begun = self._folder is not None
            for name in self._digests.keys() - self._written:
                self._write(name)

    def may_have(self, name: str, secret: bytes) -> bool:
        """Whether the name is free, or belongs to who shows this secret. One whose file was removed is free."""
        with self._lock:
            digest = self._digests.get(name)
            if digest is None or hmac.compare_digest(digest, _digest(secret)):
                return True
            try:
                if (self._folder is None or name not in self._written or not self._folder.is_dir()
                        or file_of(self._folder, name).exists()):
                    return False
            except OSError:
                return False
            self._drop(name)
            return True

    def is_own(self, name: str, secret: bytes) -> bool:
        """Whether the name belongs to who shows this secret."""
        with self._lock:
            digest = self._digests.get(name)
            return digest is not None and hmac.compare_digest(digest, _digest(secret))

    def keep(self, name: str, secret: bytes) -> None:
        """The name is theirs. Where it cannot be written, it is as long as this process lives."""
        with self._lock:
            if self._digests.get(name) != _digest(secret):
                self._digests[name] = _digest(secret)
                self._written.discard(name)
            if self._begun and name not in self._written:
                self._write(name)

    def forget(self, name: str) -> None:
        """The name is free. Where its file cannot be removed, it is as long as this process lives."""
        with self._lock:
            if self._folder is not None and name in self._written:
                try:
                    file_of(self._folder, name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s cannot be changed (%s): that the name %r is free is known only while this server "
                                "lives", self._folder, error, name, extra={"peer": "", "kind": "name not removed"})
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._digests.pop(name, None)
        self._written.discard(name)

    def _write(self, name: str) -> None:
        assert self._folder is not None
        about = {"name": name, "secret_sha256": self._digests[name].hex()}
        try:
            self._folder.mkdir(exist_ok=True)  # in the run's folder, which is not made anew where it was removed
            replace_file(file_of(self._folder, name), json.dumps(about).encode(), make_folder=False)
            self._written.add(name)
        except OSError as error:
            log.warning("%s cannot be written (%s): that the name %r is taken is known only while this server lives",
                        self._folder, error, name, extra={"peer": "", "kind": "name not written"})


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
