"""The commands fedlora-server status and fedlora-server stop: ask the server that runs in a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedlora.config import Parser
from fedlora.config.values import positive
from fedlora_server.folders import UNFINISHED

from .control import FILE, ask

MOST_SHOWN = 40
"""Largest number of clients that are listed. --json has them all."""
TIDYING_S = 5.0
"""Seconds that a server may take from the end of its connections to the release of its folder."""

STATUS_CODES = ("exit codes: 0 a server answered; 1 no server runs in this folder, or it gave no answer; 2 the folder "
                "is none, holds no run, or its server belongs to another user.")
STOP_CODES = ("exit codes: 0 the server has ended; 1 no server runs in this folder, or it had not ended after "
              "--timeout; 2 the folder is none, holds no run, or its server belongs to another user.")


def status_parser() -> Parser:
    """Return the parser of fedlora-server status."""
    made = Parser(
        prog="fedlora-server status", description="Show what the server of a run does now: its round, its clients, "
        "what it waits for, and when it may end. If none runs, show what can be done with the run.",
        epilog=STATUS_CODES)
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON, for other programs")
    return made


def status(argv: Sequence[str]) -> int:
    """Run fedlora-server status and return its exit code."""
    options = status_parser().parse_args(argv)
    code, answer = _asked(options.run, {"ask": "status"}, "status")
    if options.as_json and answer is not None:
        print(json.dumps(answer, indent=1))
    elif code == 0 and answer is not None:
        print("\n".join(_lines(answer, time.time())))
    elif answer is not None:
        print(_left(options.run, answer))
    return code


def stop_parser() -> Parser:
    """Return the parser of fedlora-server stop."""
    made = Parser(
        prog="fedlora-server stop", description="Stop the server of a run, as Ctrl-C does, and wait until it has "
        "ended. The last finished round is kept, and the run can be resumed.", epilog=STOP_CODES)
    made.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    made.add_argument("--suspend", action="store_true", help="let clients wait for the server to return, as SIGTERM "
                        "does; otherwise they are told that the run was stopped, and end")
    made.add_argument("--timeout", type=positive, default=120.0, metavar="S", help="seconds to wait for the "
                        "server's end [120]")
    return made


def stop(argv: Sequence[str]) -> int:
    """Run fedlora-server stop and return its exit code."""
    options = stop_parser().parse_args(argv)
    deadline = time.monotonic() + options.timeout
    code, answer = _asked(options.run, {"ask": "stop", "suspend": options.suspend}, "stop", deadline)
    if answer is None:
        return code
    if code == 1:
        print(_left(options.run, answer), file=sys.stderr)
        return code
    if not answer["first"]:
        print("The server was stopping already; " + ("clients wait for it." if answer["goes_on"] else
                                                     "clients are told that the run was stopped."), file=sys.stderr)
    if not answer["ended"]:
        print(f"fedlora-server stop: the server has not ended after {options.timeout:g} s; it finishes what it "
              "computes first. fedlora-server status shows when it is gone", file=sys.stderr)
        return 1
    print(_left(options.run, _of_files(options.run) or {}))
    return 0


def _asked(folder: Path, request: Mapping[str, object], command: str, until: float | None = None
           ) -> tuple[int, dict[str, Any] | None]:
    """Ask the server of a folder.

    Args:
        folder: the run's folder.
        request: what to ask.
        command: the sub-command, for messages.
        until: wait for the server's end until then (monotonic seconds), and put into the answer whether it has `ended`.

    Returns:
        0 and the server's answer; 1 and what the files say if no server runs; 2 and None after saying what is wrong.
    """
    if not folder.is_dir():
        return _wrong(command, f"{folder} is not a folder; give the run's folder, which fedlora-server names when it "
                               "starts")
    try:
        answer, connection = ask(folder, request)
    except (FileNotFoundError, ConnectionRefusedError):
        files = _of_files(folder)
        return (1, files) if files is not None else _wrong(command, f"{folder} holds no run; give the run's folder, "
                                                           "which fedlora-server names when it starts")
    except PermissionError:
        return _wrong(command, f"{folder / FILE} belongs to another user; ask as the user that runs the server")
    except (OSError, ValueError) as error:
        return _wrong(command, f"the server at {folder / FILE} gave no answer: {error}", 1)
    with connection:
        if until is None:
            return 0, answer
        with suppress(OSError):
            connection.settimeout(max(0.0, until - time.monotonic()) or 0.001)
            connection.recv(1)
        tidied = min(until, time.monotonic() + TIDYING_S)
        while (folder / UNFINISHED).exists() and time.monotonic() < tidied:
            time.sleep(0.02)
    return 0, {**answer, "ended": time.monotonic() < until}


def _wrong(command: str, why: str, code: int = 2) -> tuple[int, None]:
    print(f"fedlora-server {command}: {why}", file=sys.stderr)
    return code, None


def _of_files(folder: Path) -> dict[str, Any] | None:
    """Return what the files of a folder say about its run; None if it holds no run."""
    from fedlora_server import checkpoint  # imported late: a server that answers needs none of it

    try:
        found = checkpoint.summary(folder)
    except ValueError:
        return {"running": False, "begun": False} if (folder / UNFINISHED).exists() else None
    return {"running": False, "begun": True, **found}


def _left(folder: Path, about: Mapping[str, Any]) -> str:
    """Return what the files of a run without a server allow."""
    if not about.get("begun"):
        return (f"No server answers in {folder}, and no run was begun there. Either it starts just now, or it ended "
                "before it listened for clients; then start it again.")
    done = f"{about['finished']} of {about['planned']} rounds are finished"
    if not about["resumable"]:
        return f"No server runs in {folder}: its run is over, {done}."
    return f"No server runs in {folder}: {done}. fedlora-server --resume {folder} goes on."


def _lines(now: Mapping[str, Any], clock: float) -> list[str]:
    """Return the lines that show a server's answer.

    Args:
        now: the answer.
        clock: Unix time.
    """
    from fedlora.quantities import duration, quantity
    from fedlora_server.phases import DOING

    def at(moment: float) -> str:
        return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}"

    clients, rounds = now["clients"], now["rounds"]
    lines = [f"run        {now['run']}, {now['strategy']}, in {now['folder']}",
             f"server     {now['address']}, process {now['process']}, FedLoRA {now['version']}"
             f"{', stopping' if now['stopping'] else ''}",
             f"round      {rounds['current']} of {rounds['planned']}; {rounds['finished']} finished"
             if rounds["planned"] else "round      none yet",
             f"now        {DOING.get(now['phase'], now['phase'])}{': ' + now['why'] if now['why'] else ''}, since "
             f"{at(now['since'])} ({duration(clock - now['since'])})"]
    if now["round_left_s"] is not None:
        lines.append(f"round ends in {duration(now['round_left_s'])} at the latest, for the clients asked so far")
    if now["run_left_s"] is not None:
        lines.append(f"run ends   in about {duration(now['run_left_s'])}, if rounds go on as they did")
    lines.append(f"bytes      {quantity(now['bytes']['up'])} up, {quantity(now['bytes']['down'])} down")
    for title, counts in (("refusals", now["refusals"]), ("turned away", now["turned_away"])):
        if counts:
            lines.append(f"{title:<10} {', '.join(f'{code} {number}' for code, number in counts.items())}")
    here = [client for client in clients if client["state"] != "away"]
    lines.append(f"clients    {len(here)} connected, {sum(c['state'] in ('ready', 'working') for c in here)} ready, "
                 f"{sum(c['state'] == 'working' for c in here)} working, {len(clients) - len(here)} away")
    order = ("working", "ready", "connected", "away")
    shown = sorted(clients, key=lambda client: (order.index(client["state"]), client["name"]))[:MOST_SHOWN]
    width = max((len(client["name"]) for client in shown), default=0)
    for client in shown:
        state = client["state"] + (f" on round {client['round']}" if client["round"] is not None else "")
        upload = f"last upload {at(client['uploaded_at'])}" if client["uploaded_at"] is not None else "no upload"
        lines.append(f"  {client['name']:<{width}}  {state} for {duration(clock - client['since'])}, {upload}, "
                     f"{quantity(client['bytes_up'])} up, {quantity(client['bytes_down'])} down")
    if len(clients) > len(shown):
        lines.append(f"  and {len(clients) - len(shown)} more (--json lists them all)")
    return lines
