"""Real client processes for tests of the transport: they send back the trained tensors that they were sent.

As a program: `python federated_clients.py ADDRESS NAME [behaviour [STATE]]`. It never imports Flower or torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fedlora.plan import Refused, Upload
from fedlora_client.connection import Connection, Goodbye, RunChanged, ServerUnreachable
from fedlora_client.state import FolderState


class KeptSecrets(dict):
    """The secrets of a client's names, kept in memory for as long as the test lasts."""

    def secret(self, run_id: str, name: str) -> bytes:
        return self.get(name, b"")

    def save_secret(self, run_id: str, name: str, secret: bytes) -> None:
        self[name] = secret


def start_client(address: str, name: str, behaviour: str = "echo", state: Path | None = None,
                 **kwargs) -> subprocess.Popen:
    """Start this file as a client process. Without `state`, no later process can join the run under its name."""
    return subprocess.Popen([sys.executable, __file__, address, name, behaviour, *map(str, [state] if state else [])],
                            **kwargs)


def echo(address: str, name: str, behaviour: str, state: str | None = None) -> int:
    """Take part until the end, and return the exit code.

    Behaviours: "echo" answers at once; "hang" trains until it is cancelled, then echoes; "silent" is ready and answers
    nothing. The process prints one line per task and one for how it ended. Exit codes: 0 goodbye, 1 Flower or torch
    was imported in this process, 3 no server, 4 refused.
    """
    connection = Connection(address, name, private=False, connect_timeout_s=60.0,
                            report=lambda line: print(line, file=sys.stderr, flush=True),
                            secrets=FolderState(Path(state)) if state else None)
    signal.signal(signal.SIGTERM, lambda *_: connection.leave())
    done = set()
    try:
        connection.join()
        connection.ready()
        while True:
            try:
                plan, tensors = connection.next_request()
                assert plan.key not in done, "trained twice for one order"
                done.add(plan.key)
                print("task", *plan.key, flush=True)
                if behaviour == "silent":
                    continue
                while behaviour == "hang" and not connection.cancelled.is_set():
                    time.sleep(0.005)
                trained = {name: array for name, array in tensors.items() if not name.endswith(".A")}
                refusal = connection.send(Upload(*plan.key, tensors=trained, steps=plan.run.local_steps))
                print("sent", refusal, flush=True)
            except RunChanged as changed:
                print("run", changed.proposal.plan.run_id, flush=True)
                connection.ready()
    except Goodbye as goodbye:
        print("goodbye", goodbye, flush=True)
    except ServerUnreachable as error:
        print("unreachable", error, flush=True)
        return 3
    except Refused as refused:
        print("refused", refused, flush=True)
        return 4
    return int(any(module in sys.modules for module in ("flwr", "torch")))


if __name__ == "__main__":
    code = echo(*sys.argv[1:5])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as fedlora-client ends
