"""Calls of functions in a new process, to measure peak memory or imports, or to leave no traces in this process.

For example: `in_fresh_process("benchmarks.figures.aggregation:peak", layers=2, width=64, rank=4, clients=10)`.
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
    """Call a function in a new interpreter and return its result.

    Args:
        function: "module:function".
        arguments: keyword arguments. They travel as JSON, and so does the result.

    Raises:
        RuntimeError: the function failed; the message ends with the last of what it wrote to stderr.
    """
    done = subprocess.run([sys.executable, "-m", __spec__.name, function, json.dumps(arguments)],
                          capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise RuntimeError(f"{function} failed in a new process: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def call(function: str, arguments: str) -> str:
    """Call `module:function` in this process; keyword arguments and result are JSON."""
    module, _, name = function.partition(":")
    return json.dumps(getattr(importlib.import_module(module), name)(**json.loads(arguments)))


def peak_bytes() -> int:
    """Return the peak resident memory of this process: since `forget_peak`, or else since its start."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the resident memory of this process now, or its peak where the system does not tell."""
    try:
        return _status("VmRSS")
    except OSError:
        return peak_bytes()


def forget_peak() -> bool:
    """Reset `peak_bytes` to the memory that is resident now; return False where the system cannot (only Linux can)."""
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
