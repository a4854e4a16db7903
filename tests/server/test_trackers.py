"""What each tracker shows. No tracker's failure can end a run."""

import csv
import io
import logging
import shutil

from rich.console import Console

from fedlora.plan import AGGREGATE
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.progress import Progress
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


def test_a_secure_sum_is_told_by_how_many_opened_it_and_what_ended_unopened(tmp_path):
    run = watched(tmp_path)
    with Trackers(["console"], run) as trackers:
        trackers.begin(plan_of("fedsvd", private=True, mechanism=AGGREGATE, least_members=3, local_steps=1), ())
        trackers.rostered(1, ("a", "b", "c"), 3, "ab" * 32)
        trackers.left_out("d", "it does not say its noise")
        trackers.unopened(1, 0, "2 uploads are in the sum")
        trackers.asked(1, 1, ("a", "b", "c"))
        trackers.finished(RoundRecord(1, cohort=("a", "b", "c", "d"), uploaded=("a", "b", "c"), roster="ab" * 32))
    said = lines(run)
    assert said[0] == "round 1: a new roster of 3 (a, b, c), digest abababababab; a sum needs 3 of them"
    assert said[1] == "d can be in no roster: it does not say its noise"
    assert said[2].startswith("round 1: attempt 0 ended unopened: 2 uploads are in the sum.")
    assert said[3] == "round 1: asked again a, b, c"
    assert said[4].startswith("round 1: sum of 3 of 4 opened")


def test_the_phases_of_a_secure_sum_are_what_the_run_does_now():
    progress = Progress()
    progress.begin(plan_of("fedsvd"), ())
    progress.summing(1, "packages")
    assert (progress.now().phase, progress.now().why, progress.now().current) == ("summing", "packages", 1)
    progress.summing(1, "training")
    progress.asked(1, 0, ("a", "b"))
    assert progress.now().phase == "training"
    progress.summing(1, "closing")
    assert (progress.now().phase, progress.now().why, len(progress.now().asked)) == ("summing", "closing", 2)


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


def test_the_table_has_the_seconds_of_each_phase_of_a_secure_sum(tmp_path):
    with Trackers(["csv"], watched(tmp_path)) as trackers:
        trackers.begin(plan_of("fedsvd"), ())
        trackers.finished(RoundRecord(1, phases={"packages": 0.25, "opening": 0.5}, evaluation={"accuracy": 0.75}))
    [row] = table(tmp_path)
    assert (row["seconds_packages"], row["seconds_opening"], row["accuracy"]) == ("0.25", "0.5", "0.75")


def view(trackers, height=40):
    """Return the lines that a terminal would show now."""
    shown = Console(file=io.StringIO(), width=140, height=height)
    display = trackers._trackers["console"]
    display._console = shown
    shown.print(display._view())
    return [line.rstrip() for line in shown.file.getvalue().splitlines()]


def test_a_terminal_shows_who_has_replied_who_works_and_the_rounds_before_a_resumption(tmp_path):
    run = Watched("a run", tmp_path, Console(file=io.StringIO(), width=100), {}, progress=Progress(600))
    before = [RoundRecord(0, evaluation={"accuracy": 0.5, "accuracy/majority": 0.6}),
              RoundRecord(1, cohort=("a", "b"), uploaded=("a",), seconds=20.0, evaluation={"accuracy": 0.75})]
    trackers = Trackers(["console"], run)
    trackers.begin(plan_of("fedsvd", rounds=3), before)
    assert lines(run) == ["round 1 is done; before training: accuracy 0.500 (majority 0.600); after round 1: accuracy "
                          "0.750"]
    trackers.asked(2, 0, ("north", "south", "east", "[red]west"))
    for name, outcome in (("north", "uploaded"), ("east", "lost"), ("[red]west", "the budget is spent [budget]")):
        trackers.answered(2, name, outcome)
    shown = view(trackers)
    assert shown[2].split() == ["0", "0.500"] and shown[3].split()[:3] == ["1", "1/2", "0.750"]
    at = next(index for index, line in enumerate(shown) if line.startswith("round 2 of 3"))
    assert shown[at].startswith("round 2 of 3: 1 of 4 replied, 1 working, 1 lost, 1 declined, 10 min ")
    assert shown[at].endswith(" left for the round, about 40 s for the run")
    assert shown[at + 1].split()[:3] == ["south", "working", "since"]
    assert {line.split()[0]: line.split()[1] for line in shown[at + 2:]} == {
        "east": "lost", "[red]west": "declined", "north": "replied"}


def test_a_hundred_clients_leave_room_on_a_small_terminal(tmp_path):
    run = watched(tmp_path)
    trackers, names = Trackers(["console"], run), tuple(f"c{number:03}" for number in range(100))
    trackers.begin(plan_of("fedsvd", rounds=50), [RoundRecord(number, cohort=names, uploaded=names)
                                                  for number in range(1, 30)])
    trackers.asked(30, 0, names)
    for name in names[:98]:
        trackers.answered(30, name, "uploaded")
    shown = view(trackers, height=24)
    assert len(shown) < 24
    assert [line.split()[:2] for line in shown[-8:-6]] == [["c098", "working"], ["c099", "working"]]
    assert shown[-1].split() == ["and", "93", "more"]
    for height in (5, 24, 200):
        assert len(view(trackers, height)) <= max(height, 15)


def test_a_line_says_what_is_left_once_a_round_has_shown_how_long_it_takes(tmp_path):
    run = watched(tmp_path)
    with Trackers(["console"], run) as trackers:
        trackers.begin(plan_of("fedsvd", rounds=3), ())
        for number in (1, 2, 3):
            trackers.finished(RoundRecord(number, cohort=("a",), uploaded=("a",), seconds=45.0))
    assert [line.partition("45.0 s")[2] for line in lines(run)] == [", about 1 min 30 s left", ", about 45 s left", ""]


def test_a_client_that_returns_works_again_and_no_time_limit_is_no_time_left():
    progress = Progress()
    progress.begin(plan_of("fedsvd"), ())
    progress.asked(1, 0, ("a", "b"))
    progress.answered(1, "a", "lost")
    assert [one.outcome for one in progress.now().asked] == ["lost", ""]
    progress.client(ClientEvent("rejoined", "a"))
    assert [one.outcome for one in progress.now().asked] == ["", ""] and progress.now().round_left_s is None
    progress.overdue(1, ("a",), 0)
    progress.answered(1, "b", "uploaded")
    assert [one.outcome for one in progress.now().asked] == ["late", "uploaded"]
    progress.finished(RoundRecord(1, seconds=2.0))
    assert progress.now().asked == () and progress.now().run_left_s == 4.0


def test_curves_are_of_all_rounds_also_of_a_resumed_run(tmp_path):
    sizes = []
    for before in ([], [RoundRecord(1, evaluation={"perplexity": 3.0, "loss": 1.0})]):
        with Trackers(["plots"], watched(tmp_path)) as trackers:
            trackers.begin(plan_of("fedsvd"), before)
            trackers.finished(RoundRecord(2))
            trackers.ended("stopped")
        sizes.append((tmp_path / "curves.png").stat().st_size)
    assert sizes[1] > 1.3 * sizes[0], "two panels more"
