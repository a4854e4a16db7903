"""What a process holds while a run goes on: traced memory, mappings, descriptors and threads, written down by itself.

`watch` is called in the process that is to be measured, which a test has forked. It adds a thread and no code to the
product. A footprint is written each time the run has got some rounds further; `growth` and `left_over` judge them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import threading
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PAGES = 12
"""Stretches of the run whose smallest values make the slope: what is only held for a moment does not count."""


@dataclass(frozen=True)
class Footprint:
    """What a process holds at one moment.

    Attributes:
        round: rounds that the run has finished.
        traced: bytes of Python's and NumPy's allocations since the process began, after a collection of garbage.
        rss_kb: resident memory by kind of mapping (`mappings`).
        malloc_kb: the C library's own account: "in use", "free" (kept for later), "mapped".
        descriptors: open ones by kind.
        threads: threads by name; "native" are those of which Python knows nothing.
    """

    round: int
    traced: int
    rss_kb: dict[str, int]
    malloc_kb: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]

    @property
    def rss_mb(self) -> float:
        """All resident memory, in MB."""
        return sum(self.rss_kb.values()) / 1024


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def malloc_account() -> dict[str, int]:
    """Return what glibc's allocator holds, in KB; {} with another C library."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return {}
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return {"in use": found.uordblks >> 10, "free": found.fordblks >> 10, "mapped": found.hblkhd >> 10}


def mappings() -> dict[str, int]:
    """Return this process's resident memory in KB: heap, arenas and other anonymous memory, stacks, files."""
    found: dict[str, int] = defaultdict(int)
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(None, 5)[5:] or [""]
            kind = ("heap" if name[0] == "[heap]" else "stack" if name[0].startswith("[") else "files" if name[0]
                    else "anonymous")
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1])
    return dict(found)


def descriptors() -> dict[str, int]:
    """Return this process's open descriptors by kind."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one by which they are listed
            continue
        found[re.sub(r":?\[.*", "", target) if not target.startswith("/") else "file"] += 1
    return dict(found)


def threads() -> dict[str, int]:
    """Return this process's threads by name, without the numbers in the names."""
    found = Counter(re.sub(r"[\s\d_-]*(\(.*)?$", "", thread.name) for thread in threading.enumerate())
    found["native"] = len(os.listdir("/proc/self/task")) - found.total()
    return dict(found)


def footprint(round: int) -> Footprint:
    """Return what this process holds now."""
    gc.collect()
    return Footprint(round, tracemalloc.get_traced_memory()[0], mappings(), malloc_account(), descriptors(), threads())


def _tell_lines(file: Path, done: int) -> None:
    """Write the lines of code whose allocations have grown most since the first call, which is kept on the disk."""
    held = {str(stat.traceback): stat.size for stat in tracemalloc.take_snapshot().statistics("lineno")}
    first = file.with_suffix(".first")
    if not first.exists():
        first.write_text(json.dumps(held))
    before = json.loads(first.read_text())
    most = sorted(held, key=lambda line: before.get(line, 0) - held[line])[:20]
    file.with_suffix(".lines").write_text(f"after round {done}\n" + "".join(
        f"{held[line] - before.get(line, 0):+12,} B  {line}\n" for line in most))


def watch(file: Path, rounds_done: Callable[[], int], every: int, warm_up: int) -> None:
    """Have this process write down what it holds, a JSON line each time so many rounds are over.

    Beside it, `file` with the suffix .lines gets the lines of code whose allocations have grown most since the warm-up.

    Args:
        file: where the lines go.
        rounds_done: returns how many rounds the run has finished.
        every: rounds from one footprint to the next.
        warm_up: rounds after which growth counts.
    """
    tracemalloc.start()

    def look() -> None:
        last = -1
        while True:
            time.sleep(0.05)
            done = rounds_done()
            if done < 1 or done < last + every:
                continue
            last = done
            with file.open("a") as out:
                out.write(json.dumps(asdict(footprint(done))) + "\n")
            if done >= warm_up and (done < warm_up + every or done % (10 * every) < every):
                _tell_lines(file, done)

    threading.Thread(target=look, name="footprints", daemon=True).start()


def read(file: Path) -> list[Footprint]:
    """Read what `watch` has written; a line that is not complete is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(Footprint(**json.loads(line)))
        except ValueError:
            continue
    return found


def growth(found: Sequence[Footprint], value: Callable[[Footprint], float] = lambda one: one.traced) -> float:
    """Return by how much a value grows a round: the slope through the least values of the run's stretches."""
    if len(found) < 2:
        return 0.0
    pages = [page for page in np.array_split(np.arange(len(found)), min(PAGES, len(found))) if len(page)]
    least = [min((found[place] for place in page), key=value) for page in pages]
    return float(np.polyfit([one.round for one in least], [value(one) for one in least], 1)[0])


def left_over(found: Sequence[Footprint], value: Callable[[Footprint], dict[str, int]]) -> dict[str, int]:
    """Return of what kind there is more at the end than after the warm-up, whenever one looks, and how much more."""
    size = max(1, min(5, len(found) // 3))
    kinds = {kind for one in found for kind in value(one)}
    more = {kind: min(value(one).get(kind, 0) for one in found[-size:]) - max(value(one).get(kind, 0)
                                                                              for one in found[:size])
            for kind in kinds}
    return {kind: number for kind, number in more.items() if number > 0}
