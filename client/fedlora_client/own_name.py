"""The secrets that prove, run by run, that a name at the server is this client's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fedlora.wire import SECRET_BYTES, WireError


class Secrets(Protocol):
    """Storage for the secrets of this client's names. It outlives the process."""

    def secret(self, run_id: str, name: str) -> bytes:
        """Return the secret that was saved last for the run and the name; b"" if there is none."""

    def save_secret(self, run_id: str, name: str, secret: bytes) -> None:
        """Keep the secret in place of the one before.

        Raises:
            OSError: it cannot be written.
        """


class OwnName:
    """This client's name at the server, with the secret of the run that was joined last.

    Args:
        name: the name.
        secrets: where the secrets are kept. None keeps them in memory, so that no later process can use the name in
            the same run.
        report: called with a line for the user if a secret cannot be written.
    """

    def __init__(self, name: str, secrets: Secrets | None, report: Callable[[str], None]) -> None:
        self._name, self._secrets, self._report = name, secrets, report
        self._held: dict[str, bytes] = {}  # {run id: secret} of the run that was joined last

    def secret(self, run_id: str) -> bytes:
        """Return the secret of this client's name in the run; b"" if there is none."""
        own = self._held.get(run_id)
        return own or (self._secrets.secret(run_id, self._name) if self._secrets is not None else b"")

    def keep(self, run_id: str, secret: bytes) -> None:
        """Save the secret that a Welcome brought. This happens before Ready, which makes the name this client's.

        Raises:
            WireError: it has the wrong length.
        """
        if len(secret) not in (0, SECRET_BYTES):
            raise WireError(f"the name's secret does not have {SECRET_BYTES} bytes")
        if secret and secret != self._held.get(run_id):
            self._held = {run_id: secret}
            try:
                if self._secrets is not None:
                    self._secrets.save_secret(run_id, self._name, secret)
            except OSError as error:
                self._report(f"The secret that proves that the name {self._name} is this client's cannot be written to "
                             f"--state ({error.strerror or error}). If this client is started again in the same run, "
                             "the coordinator has to free the name first (fedlora-server forget).")
