"""The summary at a run's end: the task's first figure before and after, and no line that says nothing."""

import io

from rich.console import Console

from fedlora_server.summary import summary

REPORT = {"plan": {"strategy": "fedsvd", "rank": 8, "rounds": 5}, "finished_rounds": 3, "seconds": 75.0,
          "bytes": {"up": 1_200_000, "down": 2_500_000}, "evaluation": None}


def shown(report, **options):
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(report, **options))
    return {line[:27].strip(): line[27:].strip() for line in console.file.getvalue().splitlines()}


def test_figures_have_their_interval_and_the_majority_rate():
    after = {"accuracy": 0.8125, "accuracy/low": 0.75, "accuracy/high": 0.875, "accuracy/majority": 0.625, "loss": 0.5}
    report = REPORT | {"evaluation": {"before": {"accuracy": 0.5}, "after": after, "after_round": 3}}
    assert shown(report, more={"ε of hospital-1": "3.21"}, seconds=100.0) == {
        "strategy": "fedsvd, rank 8, 3 of 5 rounds", "accuracy before": "0.500",
        "accuracy after": "0.812 (0.750 to 0.875)", "most frequent label alone": "0.625", "ε of hospital-1": "3.21",
        "bytes up, down": "1.2 MB, 2.5 MB", "time": "1 min 40 s"}


def test_a_run_without_evaluation_or_that_diverged_has_a_summary():
    plain = {line.partition("  ")[0]: line for line in _lines(REPORT)}
    assert set(plain) == {"strategy", "bytes up, down", "time of the rounds"}
    report = REPORT | {"evaluation": {"before": None, "after": {"loss": "nan"}, "after_round": 3}}
    assert any(line.split() == ["loss", "after", "nan"] for line in _lines(report))


def _lines(report):
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(report))
    return [line.strip() for line in console.file.getvalue().splitlines()]
