"""The owners of clients' names: for each name, the SHA-256 of the secret that proves it.

A client shows a secret when it joins, or is given one, and the name is its own from its first Ready on. Names are kept
for a run, each in its own file in the run's folder. So a server that resumes the run knows them, and `fedlora-server
forget` can remove one while a server runs. Only clients have the secrets themselves.
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
"""Name of the folder within a run's folder."""


def file_of(folder: Path, name: str) -> Path:
    """Return the file that holds a name's digest. It is named by a hash, since names hold any printable character."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


class Names:
    """The names that clients own. Any number of threads may use it.

    Args:
        folder: where names are kept from `begin` on. Names that an earlier server of the run kept there are read. None
            keeps names in memory.
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
                log.warning("%s cannot be read (%s): the next client that joins under the name in it will own that "
                            "name", path, error)
                continue
            self._digests[name] = digest
            self._written.add(name)

    @property
    def taken(self) -> tuple[str, ...]:
        """The names that clients own."""
        with self._lock:
            return tuple(self._digests)

    def begin(self) -> None:
        """Keep names in the folder from now on, including those known so far."""
        with self._lock:
            self._begun = self._folder is not None
            for name in self._digests.keys() - self._written:
                self._write(name)

    def may_have(self, name: str, secret: bytes) -> bool:
        """Return whether the name is free or this secret proves it. A name becomes free if its file is removed."""
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
        """Return whether the name is owned and this secret proves it."""
        with self._lock:
            digest = self._digests.get(name)
            return digest is not None and hmac.compare_digest(digest, _digest(secret))

    def keep(self, name: str, secret: bytes) -> None:
        """Record that this secret proves the name. If no file can be written, that holds while this process lives."""
        with self._lock:
            if self._digests.get(name) != _digest(secret):
                self._digests[name] = _digest(secret)
                self._written.discard(name)
            if self._begun and name not in self._written:
                self._write(name)

    def forget(self, name: str) -> None:
        """Free the name. If its file cannot be removed, that holds while this process lives."""
        with self._lock:
            if self._folder is not None and name in self._written:
                try:
                    file_of(self._folder, name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s cannot be changed (%s): the name %r is free only while this server runs",
                                self._folder, error, name, extra={"peer": "", "kind": "name not removed"})
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._digests.pop(name, None)
        self._written.discard(name)

    def _write(self, name: str) -> None:
        assert self._folder is not None
        about = {"name": name, "secret_sha256": self._digests[name].hex()}
        try:
            self._folder.mkdir(exist_ok=True)  # not its parents: if the run's folder was removed, it stays so
            replace_file(file_of(self._folder, name), json.dumps(about).encode(), make_folder=False)
            self._written.add(name)
        except OSError as error:
            log.warning("%s cannot be written to (%s): the name %r belongs to its client only while this server runs",
                        self._folder, error, name, extra={"peer": "", "kind": "name not written"})


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
