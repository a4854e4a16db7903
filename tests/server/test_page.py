"""report.html: one file that loads nothing, in which all that a client chose is text, written in bounded time."""

import errno
import io
import json
import logging
import time
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fedlora import style, svg
from fedlora_server import page
from fedlora_server.observer import RoundRecord
from fedlora_server.page import charts, html
from fedlora_server.page.account import MARKS, MOST_SPANS, Account
from fedlora_server.progress import Progress
from fedlora_server.report import disclosures
from fedlora_server.trackers import Trackers, Watched
from fedlora_server.trackers import page as tracker
from tests.federation import plan_of

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\u202egnp.exe", "x\x00\x1b[31m",
           "&lt;b&gt; </td></table>", "long" * 100)
JOINED = {"north": {"fedlora_version": "0.1.0", "private": True, "label_names": ["no", "yes"]}}
VOID = {"meta", "br"}


class Parsed(HTMLParser):
    """A page that was read back.

    Attributes:
        tags: (name, attributes) of every element, in order.
        text: the visible text of every element, in order.
        open: the elements that are not closed.
    """

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def figures(round, accuracy):
    return {"accuracy": accuracy, "accuracy/low": accuracy - 0.1, "accuracy/high": accuracy + 0.1,
            "accuracy/majority": 0.6, "loss": 1 - accuracy, "count": 40}


def record(round, names=("north", "south"), **values):
    return RoundRecord(round, **{"cohort": tuple(names), "uploaded": tuple(names), "update_norm": 0.5, "bytes_up": 1200,
                                 "bytes_down": 3400, "seconds": 10.0, **values})


class Run:
    """A run whose page is written to a folder; its round loop is the test."""

    def __init__(self, folder, **options):
        self.run = Watched("fedsvd, tiny", folder, Console(file=io.StringIO()), {"rank": 8, "data": None, **options},
                           "0123456789abcdef", progress=Progress(3600), joined=lambda: JOINED)
        self.trackers = Trackers(["page"], self.run)
        self.tracker = self.trackers._trackers["page"]
        self.file = folder / page.FILE

    def page(self):
        self.tracker._write()
        text = self.file.read_text()
        parsed = Parsed(text)
        assert parsed.open == []
        return text, parsed


def check_self_contained(text, parsed):
    """No element can load anything, run anything, or send anything; no reference leads out of the file."""
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use", "a"}
    for _, attributes in parsed.tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "action")}
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    [policy] = [meta for meta in parsed.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def refreshes(parsed):
    return any(meta.get("http-equiv") == "refresh" for meta in parsed.named("meta"))


def test_a_running_page_shows_who_replied_what_is_left_and_the_curves_with_interval_and_majority(tmp_path):
    run = Run(tmp_path)
    run.trackers.begin(plan_of("fedsvd", rounds=4), ())
    run.trackers.finished(RoundRecord(0, evaluation=figures(0, 0.5)))
    run.trackers.finished(record(1, evaluation=figures(1, 0.7)))
    run.trackers.asked(2, 0, ("north", "south", "east"))
    run.trackers.answered(2, "north", "uploaded")
    run.trackers.answered(2, "east", "lost")
    text, parsed = run.page()
    check_self_contained(text, parsed)
    assert refreshes(parsed)
    words = " ".join(parsed.text)
    assert "clients train" in words and "1 of 4" in words and "about 30 s" in words, "as `Progress` forecasts it"
    assert "1 of 3 clients have replied, 1 working, 1 lost or late, 1 h left for the clients asked so far" in words
    assert "accuracy after round 1 0.700 0.600 to 0.800; majority 0.600; 0.500 before" in words
    [accuracy, loss, *_] = [svg for svg in parsed.named("svg") if svg.get("role") == "img"]
    assert accuracy["aria-label"] == "accuracy: 0.500 before, 0.700 after; 95 % interval"
    assert loss["aria-label"] == "loss: 0.500 before, 0.300 after"
    assert "most frequent label alone: 0.600" in words
    rows = text[text.index("<h2>Round 2"):text.index("<h2>Noticed")]
    assert rows.index("south") < rows.index("east") < rows.index("north"), "who works comes first, who replied last"
    assert "round 2: east lost" in words


def test_the_page_says_how_many_secure_sums_were_opened_and_how_long_each_phase_took(tmp_path):
    account = Account()
    account.begin(plan_of("fedsvd"), ())
    for number in (1, 2, 3):
        account.finished(RoundRecord(number, cohort=("a", "b", "c"), uploaded=("a", "b", "c"), roster="ab" * 32,
                                     phases={"packages": 0.5 * number, "opening": 2.0}, unopened=int(number == 2)))
    text = " ".join(Parsed(html.page(account, Progress().now(), title="a run")).text)
    assert "3 sums were opened, with 1 roster; 1 attempt ended unopened" in text
    assert "Median of a round: packages 1.00 s, opening 2.00 s." in text and "in the sum" in text


def test_the_last_page_is_not_loaded_again_and_says_how_the_run_ended(tmp_path):
    for reason, told in (("finished", "finished"), ("diverged", "ended: training diverged"),
                         (None, "ended before its last round")):
        run = Run(tmp_path)
        with run.trackers as trackers:
            trackers.begin(plan_of("fedsvd", rounds=1), ())
            trackers.finished(record(1))
            if reason:
                trackers.ended(reason)
        parsed = Parsed(run.file.read_text())
        assert not refreshes(parsed) and told in parsed.text
    assert not list(tmp_path.glob("*.new"))


def test_all_that_a_client_chose_is_text(tmp_path):
    run = Run(tmp_path)
    run.run = run.tracker.run = Watched("fedsvd <b>", tmp_path, run.run.console, {"model": "<i>"}, "0" * 16,
                                        joined=lambda: {name: {"label_names": [name] * 3} for name in HOSTILE})
    trackers = run.tracker
    trackers.begin(plan_of("fedsvd", rounds=2), ())
    run.run.progress.asked(1, 0, HOSTILE)
    for name in HOSTILE:
        run.run.progress.answered(1, name, f"{name} [budget]")
        trackers.answered(1, name, f"{name} [budget]")
    trackers.finished(record(1, HOSTILE, uploaded=HOSTILE[:4], refused={HOSTILE[4]: "budget"},
                             rejected={name: name for name in HOSTILE[:2]}, disclosed={HOSTILE[0]: {"steps": 4}}))
    run.run.progress.asked(2, 0, HOSTILE)
    text, parsed = run.page()
    check_self_contained(text, parsed)
    assert "i" not in {tag for tag, _ in parsed.tags}
    assert text.count("<b>") == len(MARKS), "the legend of the marks"
    names = [word for word in parsed.text if word in HOSTILE]
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[4]} <= set(names)
    assert "\u202e" not in text and "\x00" not in text and "\x1b" not in text
    assert max(map(len, parsed.text)) < 1000, "a client does not decide how long the page is"


def test_what_was_disclosed_is_what_report_json_says(tmp_path):
    said = [{"north": {"steps": 4, "delta": 1e-5}}, {"north": {"steps": 4, "delta": 1e-5}},
            {"north": {"steps": 3, "delta": 1e-5}}]
    records = [record(number, ("north",), disclosed=one) for number, one in enumerate(said, 1)]
    run = Run(tmp_path)
    run.trackers.begin(plan_of("fedsvd", rounds=4), ())
    for one in records:
        run.trackers.finished(one)
    _, parsed = run.page()
    told = disclosures(records, JOINED)["north"]
    assert told["joined_with"] == JOINED["north"]
    assert "fedlora_version 0.1.0, private True, label_names no, yes" in parsed.text
    assert [word for word in parsed.text if word.startswith("round") and "steps" in word] == [
        f"rounds 1 to 2: steps {told['rounds']['2']['steps']}, delta 1e-05",
        f"round 3: steps {told['rounds']['3']['steps']}, delta 1e-05"]


def test_disclosures_that_change_in_every_round_stay_few(tmp_path):
    account = Account()
    for number in range(1, 51):
        account.finished(record(number, ("north",), disclosed={"north": {"train_loss": float(number)}}))
    north = account.members["north"]
    assert [span.first for span in north.spans] == list(range(51 - MOST_SPANS, 51))
    assert north.earlier + MOST_SPANS == 50


def test_a_resumed_run_shows_the_earlier_rounds(tmp_path):
    run = Run(tmp_path)
    run.trackers.begin(plan_of("fedsvd", rounds=4), [RoundRecord(0, evaluation=figures(0, 0.5)),
                                                     record(1, evaluation=figures(1, 0.625)), record(2)])
    run.trackers.finished(record(3, ("north",), lost=("south",), uploaded=("north",)))
    _, parsed = run.page()
    assert "resumed after round 2" in parsed.text and "3 of 3" in parsed.text
    assert parsed.text.index("accuracy: 0.500 before, 0.625 after round 1") > 0
    strips = [text for text in parsed.text if set(text) <= set("●◐–×·") and len(text) > 1]
    assert strips == ["●●●", "●●·"], "north in all three rounds, south not in the last"


def test_the_page_is_written_at_most_once_in_two_seconds(tmp_path, monkeypatch):
    run, written = Run(tmp_path), []
    monkeypatch.setattr(tracker.Page, "_write", lambda self: written.append(self._written))
    for tick in range(100):  # a tenth of a second each
        run.trackers.answered(1, "north", "uploaded")
        run.tracker.write_if_due(tick / 10)
    assert written == pytest.approx([0, 2, 4, 6, 8])
    written.clear()
    for tick in range(100, 400):  # nothing happens
        run.tracker.write_if_due(tick / 10)
    assert written == pytest.approx([10, 20, 30]), "now and then, for the time that is left"


def test_a_page_that_takes_long_is_written_more_seldom(tmp_path, monkeypatch):
    run, written = Run(tmp_path), []
    spent = iter(range(0, 10000, 1))  # each look at the clock is a second later, so that each page takes one
    monkeypatch.setattr(tracker.time, "perf_counter", lambda: next(spent))
    monkeypatch.setattr(tracker.Page, "_write", lambda self: written.append(self._written))
    for tick in range(1200):
        run.trackers.answered(1, "north", "uploaded")
        run.tracker.write_if_due(tick / 10)
    assert written == pytest.approx([0, 50, 100])


def test_a_full_disk_neither_ends_the_tracker_nor_the_run(tmp_path, monkeypatch, caplog):
    run, real = Run(tmp_path), tracker.replace_file
    full = [True]

    def replace_file(*arguments, **options):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr(tracker, "replace_file", replace_file)
    monkeypatch.setattr(tracker, "EVERY_S", 0.01)
    monkeypatch.setattr(tracker, "POLL_S", 0.01)
    with caplog.at_level(logging.WARNING), run.trackers as trackers:
        trackers.begin(plan_of("fedsvd", rounds=2), ())
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
        full[0] = False
        trackers.finished(record(1))
        while not run.file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.file.exists(), "it is tried again"
    assert [message for message in caplog.messages if "cannot be written" in message] == caplog.messages


def test_a_long_run_of_many_clients_has_a_page_of_bounded_size(tmp_path):
    run, names = Run(tmp_path), [f"clinic-{number:03}" for number in range(100)]
    said = {name: {"steps": 8} for name in names}
    records = [record(number, names, disclosed=said, evaluation=figures(number, 0.5)) for number in range(1, 1001)]
    run.trackers.begin(plan_of("fedsvd", rounds=2000), records)
    run.trackers.asked(1001, 0, tuple(names))
    began = time.perf_counter()
    text, parsed = run.page()
    assert time.perf_counter() - began < 2 and len(text) < 400_000
    assert "and 500 more rounds, which are in metrics.jsonl" in parsed.text
    assert text.count("L") < 40 * charts.MOST_POINTS


def test_figures_that_are_not_finite_leave_a_gap():
    records = [record(1, evaluation={"loss": 1.0}), record(2, evaluation={"loss": float("nan")}),
               record(3, evaluation={"loss": 1e30}), record(4, evaluation={"loss": float("inf")})]
    loss, *_ = charts.charts(records)
    assert "loss: inf after" in loss and "nan" not in loss and loss.count("M") >= 2 and "1e+30" in loss
    only, *_ = charts.charts([record(1, evaluation={"loss": float("nan")})])
    assert "loss: nan after" in only


def test_curves_that_coincide_differ_in_width_and_dashes():
    same = {"accuracy": 0.5, "balanced_accuracy": 0.75, "macro_f1": 0.75}
    _, both, *_ = charts.charts([record(number, evaluation=same) for number in (1, 2)])
    assert 'stroke-width="3"' in both and 'stroke-width="2.4"' in both
    assert both.index('stroke-width="3"') < both.index('stroke-dasharray="7 4"')


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.9), (0, 1e-7), (-3, 4), (0.59, 0.61), (1, 500), (0, 1e30)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = svg.ticks(low, high, 5)
    assert 2 <= len(ticks) <= 11 and ticks == sorted(ticks)
    assert low - 1e-9 * abs(high) <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)


def test_a_dark_page_has_every_colour_of_the_light_one():
    light, dark = html.STYLE.split("@media (prefers-color-scheme:dark)")[:2]
    names = {part.partition(":")[0] for part in light.partition("{")[2].partition("}")[0].split(";")}
    assert names == {part.partition(":")[0] for part in dark.partition("{")[2].partition("{")[2].partition("}")[0]
                     .split(";")}
    assert {f"--c{colour[1:]}" for colour in style.COLOURS} <= names


def test_options_and_plan_are_on_the_page(tmp_path):
    run = Run(tmp_path, lr=0.03, labels=("no", "yes"))
    run.trackers.begin(plan_of("fedsvd", rounds=4), ())
    _, parsed = run.page()
    at = parsed.text.index("--labels")
    assert parsed.text[at + 1] == "no,yes" and "--data" not in parsed.text
    assert "the plan, as clients are told" in parsed.text and json.dumps("rank 8; lr 0.03.")[1:-1] in parsed.text
