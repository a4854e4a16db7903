"""What each tracker shows. No tracker's failure can end a run."""

import csv
import io
import logging
import shutil

from rich.console import Console

from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.trackers import Trackers, Watched
from tests.federation import plan_of


def watched(folder):
    return Watched("a run", folder, Console(file=io.StringIO(), width=200), {})


def lines(run):
    return run.console.file.getvalue().splitlines()


def table(folder):
    with (folder / "rounds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tracker_that_fails_is_named_once_and_the_others_hear_all(tmp_path, caplog):
    run = watched(tmp_path / "run")
    run.out.mkdir()
    with caplog.at_level(logging.ERROR), Trackers(("plots", "csv", "console"), run) as trackers:
        trackers.begin(plan_of("fedsvd"), ())
        shutil.rmtree(run.out)
        run.out.touch()  # a file in the folder's place: nothing can be written there
        trackers.finished(RoundRecord(1, cohort=("a",), uploaded=("a",)))
        trackers.finished(RoundRecord(2, cohort=("a",), uploaded=("a",)))
        trackers.ended("finished")
    failed = [message for message in caplog.messages if "failed" in message]
    assert [message.split()[2] for message in failed] == ["csv", "plots"]
    assert all("goes on without it" in message for message in failed)
    assert [line.partition(",")[0] for line in lines(run)] == ["round 1: 1 of 1 replied", "round 2: 1 of 1 replied"]


def test_a_client_that_comes_again_and_again_gets_one_line_a_minute(tmp_path):
    run = watched(tmp_path)
    with Trackers(["console"], run) as trackers:
        for _ in range(50):
            trackers.client(ClientEvent("joined", "north"))
            trackers.client(ClientEvent("lost", "north", "why"))
            trackers.client(ClientEvent("uploaded", "north"))  # the round loop tells it
    assert lines(run) == ["north joined", "north lost: why"]


def test_who_is_chosen_watches_whatever_the_order(tmp_path):
    for order in (("csv", "console"), ("console", "csv")):
        with Trackers(order, watched(tmp_path)) as trackers:
            trackers.begin(plan_of("fedsvd"), ())
            trackers.ended("finished")
    assert {file.name for file in tmp_path.iterdir()} == {"rounds.csv"}


def test_the_table_has_the_rounds_before_a_resumption_and_figures_as_they_come(tmp_path):
    with Trackers(["csv"], watched(tmp_path)) as trackers:
        trackers.begin(plan_of("fedsvd"), [RoundRecord(1, cohort=("a", "b"), uploaded=("b",), bytes_up=7)])
        assert [row["round"] for row in table(tmp_path)] == ["1"]
        trackers.finished(RoundRecord(2, evaluation={"accuracy": 0.75, "count": 4}, update_norm=0.25))
    first, second = table(tmp_path)
    assert (first["asked"], first["uploaded"], first["bytes_up"], first["accuracy"]) == ("2", "1", "7", "")
    assert (second["round"], second["accuracy"], second["update_norm"], second["train_loss"]) == (
        "2", "0.75", "0.25", "")


def test_curves_are_of_all_rounds_also_of_a_resumed_run(tmp_path):
    sizes = []
    for before in ([], [RoundRecord(1, evaluation={"perplexity": 3.0, "loss": 1.0})]):
        with Trackers(["plots"], watched(tmp_path)) as trackers:
            trackers.begin(plan_of("fedsvd"), before)
            trackers.finished(RoundRecord(2))
            trackers.ended("stopped")
        sizes.append((tmp_path / "curves.png").stat().st_size)
    assert sizes[1] > 1.3 * sizes[0], "two panels more"
