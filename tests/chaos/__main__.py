"""The command `python -m tests.chaos`: runs the cases, shows how far it is, and ends with 1 if one fails."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.chaos import report
from tests.chaos.cases import QUIET, Case, cases
from tests.chaos.federation import Federation
from tests.chaos.keepers import Guarded
from tests.chaos.observed import Observed
from tests.chaos.score import Score, score
from tests.processes import PATIENCE

WARM_S, QUIET_S = 600, 6.0
"""Seconds that importing the libraries may take, and that a quiet run takes on an idle machine with two cores."""
QUIET_EVERY = 15
"""Cases between two quiet runs of their setting: their median is what a case's time is compared with."""


class Campaign:
    """Cases that are run with the same model, each compared with the quiet run of its setting.

    Args:
        folder: for all files of all cases.
        keep: keep the folders of cases that fail.

    Attributes:
        quiet: setting → the outcome of its first quiet run.
        stop: ends the cases that run, once it is set.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        from tests.tiny import tiny_checkpoint

        self.folder, self._keep = folder, keep
        self.checkpoint = tiny_checkpoint("bert", folder / "model")
        self.quiet: dict[str, Observed] = {}
        Guarded(time.sleep, 0).wait(WARM_S)  # the process that others are forked from imports the libraries
        self._with_updates: dict[tuple[tuple[int, tuple[str, ...]], ...], Observed] = {}
        self.stop = threading.Event()
        self._numbers, self._lock = iter(range(10**6)), threading.Lock()

    def run(self, case: Case) -> Score:
        """Run a case. The quiet run of its setting must have been run before."""
        if why := case.why_skipped or ("the campaign was stopped" if self.stop.is_set() else ""):
            return Score(case, skipped=why)
        with self._lock:
            folder = self.folder / f"case-{next(self._numbers)}"
        try:
            federation = Federation(folder, self.checkpoint, case)
        except OSError as error:
            return Score(case, wrong=(f"it could not be set up: {error}",))
        quiet = self.quiet.get(case.setting)
        slower = max(1.0, quiet.seconds / QUIET_S) if quiet else PATIENCE
        try:
            seen = federation.run(case.limit_s * slower, self.stop)
        except (OSError, ValueError) as error:
            return Score(case, wrong=(f"it could not be judged: {error}",))
        if case.kind == "quiet":
            quiet = self.quiet.setdefault(case.setting, seen)
        assert quiet is not None
        with self._lock:
            same = self._with_updates.setdefault(tuple(sorted(seen.rounds.items())), seen)
        judged = score(case, seen, quiet, same)
        if judged.wrong and self._keep:
            (folder / "wrong").write_text("\n".join([case.name, *judged.wrong]))
        else:
            shutil.rmtree(folder)
        return judged


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=["*"], help="run cases whose kind and name "
                        "hold one of these, as in kill: 'north*sending'")
    parser.add_argument("--list", action="store_true", help="show the cases and run none")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there: .json, else Markdown")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases that run at a time [2]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files of cases that fail there")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    console = Console()
    console.width = max(console.width, 0 if console.is_terminal else 180)
    chosen = [case for case in cases() if case.kind != "quiet" and any(map(case.matches, options.only))]
    if options.list:
        for case in chosen:
            console.print(f"{case.kind}: {case.name}" + (f" [SKIPPED: {case.why_skipped}]" if case.why_skipped else ""),
                          markup=False, soft_wrap=True)
        return 0
    if not chosen:
        console.print(f"no case is like {' or '.join(options.only)}; --list shows all", markup=False)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            scores = run_all(Campaign(folder, keep=options.keep is not None), chosen, options.jobs, console)
        except KeyboardInterrupt:
            console.print("stopped; every process, network and disk of the campaign is gone")
            return 130
    report.show(console, scores)
    if options.out:
        options.out.write_text(json.dumps([report.plain(one) for one in scores], indent=1)
                               if options.out.suffix == ".json" else report.markdown(scores))
    return int(any(one.wrong for one in scores))


def run_all(campaign: Campaign, chosen: Sequence[Case], jobs: int, console: Console) -> list[Score]:
    """Run the quiet runs that are needed, and then all cases, several at a time."""
    needed = [QUIET[setting] for setting in QUIET if setting == "plain" or any(
        case.setting == setting for case in chosen)]
    scores: list[Score] = []
    queue = list(with_quiet(chosen))
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("cases", total=len(needed) + len(queue))

        def note(one: Score) -> None:
            scores.append(one)
            progress.advance(task)
            if one.wrong:
                progress.console.print(f"FAILED {one.case.kind}: {one.case.name}: {'; '.join(one.wrong)}", markup=False)

        try:
            for case in needed:
                note(campaign.run(case))
            for future in as_completed([pool.submit(campaign.run, case) for case in queue]):
                note(future.result())
        except BaseException:
            campaign.stop.set()  # so that the pool's threads end, and kill what they started
            raise
    order = {case: number for number, case in enumerate([*needed, *chosen])}
    return with_lost_time(sorted(scores, key=lambda one: order[one.case]))


def with_quiet(chosen: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases, and now and then a quiet run of their setting."""
    for number, case in enumerate(chosen, 1):
        yield case
        if not number % QUIET_EVERY:
            yield QUIET[case.setting]


def with_lost_time(scores: Sequence[Score]) -> list[Score]:
    """Return the scores with how much longer each run took than the median of the quiet ones of its setting."""
    quiet = {setting: median(of_it) for setting in QUIET if (of_it := [
        one.seconds for one in scores if one.case == QUIET[setting] and not one.skipped])}
    return [replace(one, lost_s=one.seconds - quiet[one.case.setting]) if not one.skipped else one for one in scores]


if __name__ == "__main__":
    sys.exit(main())
