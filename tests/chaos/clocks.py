"""Clocks that jump: libfaketime, preloaded into the processes under test alone. The machine's clock is never touched.

A jump is a step of the wall clock, as when a machine's time is put right. The monotonic clock goes on undisturbed, as
it does then. libfaketime must be there when a process begins, so these processes are not forked but started anew.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from fedlora.files import replace_file

LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
             "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1",
             "/usr/lib64/faketime/libfaketimeMT.so.1", "/usr/local/lib/faketime/libfaketimeMT.so.1")
LOOKS_EVERY_S = 1
"""Seconds within which a process notices that its clock was set."""


def library() -> str | None:
    """Return the path of libfaketime, or None if it is not installed. FAKETIME_LIBRARY may name it."""
    return next((path for path in (os.environ.get("FAKETIME_LIBRARY", ""), *LIBRARIES)
                 if path and Path(path).exists()), None)


def why_none() -> str:
    """Return why no clock can jump; "" if one can."""
    return "" if library() else "libfaketime is not installed (apt-get install faketime)"


def environment(clock: Path) -> dict[str, str]:
    """Return the variables that have a new process read a clock of its own.

    Args:
        clock: file that `set_clock` writes.
    """
    return {"LD_PRELOAD": library() or "", "FAKETIME_TIMESTAMP_FILE": str(clock), "NO_FAKE_STAT": "1",
            "FAKETIME_CACHE_DURATION": str(LOOKS_EVERY_S), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def set_clock(clock: Path, ahead_s: float) -> None:
    """Set a clock so many seconds ahead of the machine's, or behind it if they are negative."""
    replace_file(clock, f"{ahead_s:+.0f}\n".encode())


def settle() -> None:
    """Set this process, which has a clock of its own, right: it sleeps as it should, and leaves no file behind.

    Python sleeps until a time of the monotonic clock, and libfaketime takes it for one of the wall clock. So
    `time.sleep` waits by select. The shared memory by which libfaketime would tell child processes the time is removed
    now, because the process may be killed at any moment.
    """
    time.sleep = lambda seconds: select.select([], [], [], seconds) and None  # type: ignore[assignment]
    for name in (f"faketime_shm_{os.getpid()}", f"sem.faketime_sem_{os.getpid()}"):
        Path("/dev/shm", name).unlink(missing_ok=True)
