"""The command fedlora-simulate compare: one comparison of the runs of several commands, or of one that still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.config import Parser, faults_in_words
from fedlora.console import messages, results
from fedlora.figures import title
from fedlora_server.folders import claimed_folder

from . import outputs
from .reference import read_published
from .results import Result, read_result


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-simulate compare", description="Compare the runs in several folders: those of "
                  "simulations, and those of servers. Runs that have not ended are left out, so a sweep can be looked "
                  "at while it lasts.", epilog="exit codes: 0 done; 2 wrong input.")
    made.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--out folder of a simulation or a server")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder for the comparison [runs/<time>-comparison]")
    made.add_argument("--baseline", metavar="METHOD", help="method that the others are compared with [the first one]")
    made.add_argument("--reference", type=Path, metavar="FILE.toml", help="published figures to show beside the runs'")
    made.add_argument("--anyway", action="store_true", help="compare runs on different data too; every output says so")
    return made


@faults_in_words("fedlora-simulate compare")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 when done, 2 for wrong input."""
    options = parser().parse_args(argv)
    console = messages()
    found = read_all(options.folders)
    published = read_published(options.reference) if options.reference else []
    doubts = what_differs(found)
    if doubts and not options.anyway:
        raise ValueError(f"these runs cannot be compared: {'; '.join(doubts)}. Leave one out, or give --anyway")
    for doubt in doubts:
        console.print(f"Compared anyway: {doubt}.")
    if servers := [one.folder for one in found if one.data.get("rows") is None]:
        doubts.append(f"{', '.join(servers)} hold{'s' * (len(servers) == 1)} a server's run, which knows neither ε nor "
                      "what its rows were; make sure that they are the same")
        console.print(f"{doubts[-1]}.")
    outputs.show(found, results(), baseline=options.baseline, published=published)
    with claimed_folder(options.out, "comparison") as out:
        said = outputs.write(out, found, heading="Comparison of " + ", ".join(map(str, options.folders)),
                             baseline=options.baseline, published=published, notes=doubts,
                             about={"folders": options.folders})
        if said:
            console.print(said)
        console.print(f"The comparison of {len(found)} runs is in {out}")
    return 0


def read_all(folders: Sequence[Path]) -> list[Result]:
    """Return the results of all runs in the folders, each run once.

    Raises:
        ValueError: a folder holds no run that has ended, or a damaged one.
    """
    found: dict[str, Result] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        places = (folder, *sorted(place for place in folder.iterdir() if place.is_dir() and place.name != "tuning"))
        here = [result for result in map(read_result, places) if result is not None]
        if not here:
            raise ValueError(f"{folder} holds no run that has ended; name the --out folder of a simulation or a server")
        for result in here:
            found.setdefault(result.id, result)
    swept = dict.fromkeys(name for result in found.values() for name in result.swept)
    order = sorted(found.values(), key=lambda result: result.seed)
    return [replace(result, swept={name: result.swept[name] for name in swept if name in result.swept})
            for result in order]


def what_differs(found: Sequence[Result]) -> list[str]:
    """Return in which respects the runs cannot be compared, each in words that name the folders.

    Args:
        found: the results.
    """
    swept = {name for result in found for name in result.swept}
    questions: list[tuple[str, Callable[[Result], object]]] = [
        ("the task's figure is another one", lambda one: title(one.metric or "nothing was evaluated")),
        ("the held-out rows are not the same", lambda one: one.data.get("held_out")),
        ("the training rows are not the same", lambda one: one.data.get("rows"))]
    if not swept & {"partition", "clients"}:
        questions.append(("the rows are dealt to other clients", lambda one: (
            f"{one.options['partition']} over {one.options['clients']}" if "partition" in one.options else None)))
    told = []
    for what, answer in questions:
        answers: dict[object, Result] = {}
        for one in found:
            if (given := answer(one)) is not None:
                answers.setdefault(given, one)
        if len(answers) > 1:
            named = [f"{one.folder}" + (f" ({given})" if len(str(given)) < 40 else "") for given, one in
                     list(answers.items())[:3]]
            told.append(f"{what} in {' and '.join(named)}")
    return told
