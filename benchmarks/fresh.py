"""Functions in a process of their own: for peak memory, for what is imported, and for anything that leaves traces.

in_fresh_process("benchmarks.figures.memory:peak", strategy="fed-sb")
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


def child_environment() -> dict[str, str]:
    """Return this process's environment with the checkout on the Python path, as this package is not installed."""
    checkout = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (checkout, os.environ.get("PYTHONPATH"))))}


def in_fresh_process(function: str, **arguments: Any) -> Any:
    """Call `module:function` with keyword arguments in a new interpreter; both ways as JSON.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    done = subprocess.run([sys.executable, "-m", __spec__.name, function, json.dumps(arguments)],
                          capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise RuntimeError(f"{function} failed in a process of its own: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def call(function: str, arguments: str) -> str:
    """Call `module:function` here; keyword arguments and result as JSON."""
    module, _, name = function.partition(":")
    return json.dumps(getattr(importlib.import_module(module), name)(**json.loads(arguments)))


def peak_bytes() -> int:
    """The most memory that this process held resident at any one time, or since `forget_peak`."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Memory that this process holds resident now; where the system does not say, the peak."""
    try:
        return _status("VmRSS")
    except OSError:
        return peak_bytes()


def forget_peak() -> bool:
    """Let `peak_bytes` start anew from what is resident now; False where the system cannot (it is Linux that can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(call(*sys.argv[1:]))
