"""A command at a terminal of its own, as a person uses it."""

import os
import pty
import time
from pathlib import Path

from tests.processes import PATIENCE, Forked


class Terminal:
    """A process whose stdin, stdout and stderr are a terminal.

    Args:
        command: "client" or "server".
        *words: the command's arguments.
        home: folder of the user's ledger, policy and key.
        cwd: the working directory; None for this process's.

    Attributes:
        text: what the process has written so far.
    """

    def __init__(self, command, *words, home, cwd=None):
        self._master, self._slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.text, self._seen = "", 0
        self.process = Forked(command, [str(word) for word in words], Path(os.ttyname(self._slave)), {
            "COLUMNS": "200", "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")},
            cwd or Path.cwd(), terminal=True)

    def expect(self, text, answer=""):
        """Wait until the process prints `text` after everything waited for before; then type the answer."""
        deadline = time.monotonic() + PATIENCE * 60
        while (found := self.text.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, self.text
            ended = self.process.poll() is not None
            try:
                self.text += os.read(self._master, 4096).decode(errors="replace")
            except BlockingIOError:
                assert not ended, self.text
                time.sleep(0.05)
        self._seen = found + len(text)
        if answer:
            os.write(self._master, answer.encode())

    def end(self):
        code = self.process.wait(PATIENCE * 60)
        os.close(self._slave)
        os.close(self._master)
        return code

    def kill(self):
        self.process.kill()
        self.end()
