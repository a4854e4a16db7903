"""fedlora-simulate compare, and the tables and the page of every comparison."""

import csv
import dataclasses
import hashlib
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from pyarrow import parquet
from rich.console import Console
from scipy import stats

from fedlora_simulations import compare_page, outputs
from fedlora_simulations.cells import canonical
from fedlora_simulations.cli import main
from fedlora_simulations.compare import what_differs
from fedlora_simulations.latex import escaped, latex
from fedlora_simulations.pairing import best, columns, differences, grouped
from fedlora_simulations.reference import Published, read_published
from fedlora_simulations.results import Result, Round, kept_of
from fedlora_simulations.tables import lines, markdown, notes_on

ACCURACIES = {"fedavg-lora": (0.70, 0.74, 0.71), "fedsvd": (0.80, 0.83, 0.82), "fed-sb": (0.705, 0.73, 0.72)}


def result(method="fedsvd", seed=0, value=0.8, *, epsilon=4.0, clients=None, **more):
    rounds = tuple(Round(number, {"accuracy": 0.5 + (value - 0.5) * number / 2, "accuracy/majority": 0.6, "loss": 1.0},
                         400 * bool(number), 800 * bool(number), 1.0, 2 * bool(number)) for number in range(3))
    given = dict(swept={"epsilon": f"{epsilon:g}"}, given=("epsilon",),
                 options={"epsilon": epsilon, "rank": 2, "partition": "iid", "clients": 2, "lr": 0.1},
                 data={"rows": "a" * 64, "held_out": "b" * 64, "split": f"{seed}", "model": "c"},
                 folder=f"out/{method}-{seed}")
    return Result(f"{method}{seed}{epsilon}", method, seed, "finished", "accuracy", rounds, epsilon, 1e-5,
                  None if math.isinf(epsilon) else (0.8, 0.9), 10, 800, 1600, 3.0, clients=clients or {},
                  **given | more)


def several(epsilons=(1.0, math.inf), seeds=3):
    return [result(method, seed, value + 0.01 * at, epsilon=epsilon) for seed in range(seeds)
            for at, epsilon in enumerate(epsilons) for method, values in ACCURACIES.items()
            for value in values[seed:seed + 1]]


def write_cell(folder, one, **changes):
    """Write the folder of a finished cell, as a simulation leaves it."""
    folder.mkdir(parents=True)
    identity = {"format": 1, "method": one.method, "seed": one.seed, "options": one.options,
                "rows_sha256": one.data["rows"], "held_out_sha256": one.data["held_out"], "split_sha256": "s",
                "model": {"weights_sha256": "m"}} | changes
    plain = json.loads(canonical(identity))
    about = {"id": hashlib.sha256(canonical(plain)).hexdigest(), "status": one.status, "values": dict(one.swept),
             "tuned": {}, "given": list(one.given), "identity": plain, "computed": {}, "result": kept_of(one)}
    (folder / "cell.json").write_text(json.dumps(about).replace("Infinity", '"inf"'))


def test_differences_are_paired_over_seeds_with_the_t_interval():
    groups = grouped(several())
    assert [group.label for group in groups][:2] == ["fedavg-lora, epsilon=1", "fedsvd, epsilon=1"]
    found = {one.group.label: one for one in differences(groups)}
    assert set(found) == {"fedsvd, epsilon=1", "fed-sb, epsilon=1", "fedsvd, epsilon=inf", "fed-sb, epsilon=inf"}
    moved = np.subtract(ACCURACIES["fedsvd"], ACCURACIES["fedavg-lora"])
    half = stats.t.ppf(0.975, 2) * moved.std(ddof=1) / math.sqrt(3)
    one = found["fedsvd, epsilon=1"]
    assert one.seeds == (0, 1, 2) and one.mean == pytest.approx(moved.mean())
    assert one.interval == pytest.approx((moved.mean() - half, moved.mean() + half))
    assert one.is_clear and not found["fed-sb, epsilon=1"].is_clear
    alone = differences(grouped(several(seeds=1)), "fedsvd")
    assert {one.baseline.method for one in alone} == {"fedsvd"} and all(one.interval is None for one in alone)
    with pytest.raises(ValueError, match="no such method here; choose from fedavg-lora, fedsvd, fed-sb"):
        differences(groups, "fedprox")


def test_one_method_alone_is_compared_over_its_settings_and_equal_differences_have_an_interval():
    groups = grouped([result(value=value + 0.25 * (epsilon > 1), seed=seed, epsilon=epsilon) for epsilon in (1.0, 4.0)
                      for seed, value in enumerate((0.25, 0.5))])
    [one] = differences(groups)
    assert one.baseline.label == "fedsvd, epsilon=1" and one.interval == (0.25, 0.25) and one.is_clear


def test_options_that_differ_between_folders_are_columns_but_not_those_that_were_tuned():
    one, other = result(swept={}), result(swept={}, seed=1)
    changed = dataclasses.replace(other, options={**other.options, "rank": 8, "lr": 0.5}, given=("rank", "lr"))
    assert columns([one, other]) == [] and columns([one, changed]) == ["rank", "lr"]
    assert columns([one, dataclasses.replace(changed, tuned={"lr": "0.5"})]) == ["rank"]


def test_the_best_is_bold_only_where_every_interval_excludes_nought():
    found = grouped(several(epsilons=(1.0,)))
    assert best(found)[0].method == "fedsvd" and best(found)[1]
    close = [group for group in found if group.method != "fedsvd"]
    assert best(close)[0].method == "fed-sb" and not best(close)[1]
    table = latex(found)
    assert table.count("\\mathbf") == 1 and re.search(r"fedsvd & \$\\mathbf\{0\.8", table)
    assert "\\mathbf" not in latex(grouped(several(epsilons=(1.0,), seeds=1)))


def test_latex_prints_any_text_unchanged_and_has_a_column_for_each_epsilon():
    assert escaped("a_b & 50% {x} \\y ~ ^ #1 $") == (
        r"a\_b \& 50\% \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{} \#1 \$")
    table = latex(grouped(several()), notes=["5 % of it_all"])
    assert "5 \\% of it\\_all." in table and "\\begin{tabular}{lrr}" in table
    assert "method & 1 & $\\infty$ \\\\" in table and table.count("\\\\\n") == 5


def test_markdown_and_the_terminal_show_every_group_with_its_difference():
    groups = grouped(several())
    text = markdown(groups, differences(groups), notes=notes_on(groups, differences(groups)))
    assert "| 1 | fedsvd | 3 | 0.500 | 0.817 ± 0.015 | +0.100 \\[" in text and "| none |  | 2 |" in text
    assert "paired over 3 seeds; 95 % t interval" in text
    console = Console(file=io.StringIO(), width=80)
    outputs.show(several(), console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "0.817 ± 0.015" in shown and "+0.100 [" in shown
    for width, there in ((70, False), (100, True)):
        console = Console(file=io.StringIO(), width=width)
        outputs.show(several(), console, published=[Published("fedsvd", {"epsilon": "1"}, 0.85, 0.01, "a paper")])
        shown = console.file.getvalue()
        assert ("+0.100 [" in shown) == there and "0.817 ± 0.015" in shown and "0.850 ± 0.010" in shown
    many = [result(seed=0, epsilon=float(epsilon)) for epsilon in range(1, 60)]
    console = Console(file=io.StringIO(), width=80)
    outputs.show(many, console)
    assert len(console.file.getvalue().splitlines()) < 50 and "the 19 last of 59 lines" in console.file.getvalue()


def test_csv_and_parquet_hold_a_line_for_each_run(tmp_path):
    found = [*several(), dataclasses.replace(result("fedsvd", 7, epsilon=1.0), status="diverged", resumed=(3,))]
    assert outputs.write(tmp_path, found, heading="all") == ""
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 19 == parquet.read_metadata(tmp_path / "results.parquet").num_rows
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert {row["epsilon"] for row in table} == {1.0, math.inf} and table[0]["accuracy"] == 0.7
    assert [row["status"] for row in rows].count("diverged") == 1
    assert {"method", "seed", "accuracy_before", "majority", "epsilon_spent", "sigma_low", "bytes_up",
            "continued_after_rounds"} <= rows[0].keys()
    assert lines(grouped(found))[0].keys() == rows[0].keys()
    assert "1 run ended early and is left out of the means" in (tmp_path / "results.md").read_text()


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.fetched, self.tags, self._inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_the_page_is_one_file_that_fetches_nothing_and_takes_names_for_text():
    pytest.importorskip("plotly")
    hostile = "</script><script>alert(1)</script>"
    found = [*several(), *(result(hostile, seed, 0.7, epsilon=math.inf,
                                  clients={hostile: ((1, 0.9), (2, 0.8)), "b": ((1, 0.7),)}) for seed in (0, 1))]
    groups = grouped(found)
    published = [Published("fedsvd", {"epsilon": "1.0"}, 0.85, None, "a paper")]
    page = Page(compare_page.page(groups, differences(groups), published, ["<b>note</b>"], "<i>runs</i>"))
    assert page.fetched == [] and len(page.scripts) == 3 and "b" not in page.tags and "i" not in page.tags
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    figures = json.loads(page.scripts[0])
    assert len(figures) == 5, "over ε, rounds and bytes, differences, clients"
    names = {trace.get("name") for trace in figures[0]["data"]}
    assert {"fedavg-lora", "fedsvd", "fedsvd (published)"} <= names
    assert figures[0]["layout"]["shapes"][0]["y0"] == 0.6, "the majority rate"
    assert figures[0]["data"][0]["x"] == ["1", "none"]
    assert {trace["line"]["dash"] for trace in figures[1]["data"][:4]} == {"solid", "dash", "dot", "dashdot"}
    assert figures[2]["data"][0]["x"] == pytest.approx([0, 0.0012, 0.0024])
    assert [trace["visible"] for trace in figures[4]["data"]] == [True, True, False, False]


def test_without_plotly_all_else_is_written_and_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_page, "available", lambda: False)
    assert "pip install 'fedlora[compare]'" in outputs.write(tmp_path, several(), heading="all")
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.csv", "results.parquet", "results.md", "results.tex", "comparison.json", "comparison.png"}


def test_runs_of_several_folders_are_merged_each_once(tmp_path, capsys):
    for at, one in enumerate(several(epsilons=(1.0,))):
        write_cell(tmp_path / ("a" if one.seed < 2 else "b") / f"{at}", one)
    write_cell(tmp_path / "b" / "again", several(epsilons=(1.0,))[0])
    write_cell(tmp_path / "b" / "under-way", dataclasses.replace(result(seed=9), status="begun"))
    (tmp_path / "b" / "else").mkdir()
    out = tmp_path / "out"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={out}", "--baseline=fed-sb"]) == 0
    said = capsys.readouterr()
    assert "The comparison of 9 runs is in" in said.err and "difference from fed-sb, paired over 3 seeds" in said.out
    assert {row["method"] for row in csv.DictReader((out / "results.csv").open())} == set(ACCURACIES)
    assert main(["compare", str(tmp_path / "b" / "else"), f"--out={tmp_path / 'no'}"]) == 2
    assert "holds no run that has ended" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_runs_on_other_rows_are_refused_by_name_unless_they_are_to_be_compared_anyway(tmp_path, capsys):
    write_cell(tmp_path / "a" / "1", result())
    write_cell(tmp_path / "b" / "1", result(seed=1), held_out_sha256="d" * 64)
    given = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'out'}"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "the held-out rows are not the same in" in said and str(tmp_path / "b" / "1") in said
    assert main([*given, "--anyway"]) == 0
    assert "Compared anyway: the held-out rows are not the same" in capsys.readouterr().err
    assert "held-out rows are not the same" in (tmp_path / "out" / "results.md").read_text()
    one = result(swept={})
    dealt = dataclasses.replace(one, options={**one.options, "partition": "shards:2"})
    assert "dealt to other clients" in what_differs([one, dealt])[0]
    assert what_differs([one, dataclasses.replace(dealt, swept={"partition": "shards:2"})]) == []


def test_published_figures_stand_beside_those_of_the_runs(tmp_path):
    path = tmp_path / "published.toml"
    path.write_text('source = "A paper, table 1"\n[[figure]]\nmethod = "fedsvd"\nsettings = {epsilon = 1}\n'
                    'value = 0.881\ndeviation = 0.004\n[[figure]]\nmethod = "other"\nvalue = 0.5\nsource = "B"\n')
    published = read_published(path)
    groups = grouped(several())
    text = markdown(groups, [], published, notes_on(groups, [], published))
    assert "| 0.881 ± 0.004 | 1.00 |" in text and text.count("0.881") == 1
    assert "Published: A paper, table 1." in text and "No run has the setting of the published other 0.500" in text
    assert "fedsvd (published) & $0.881 \\pm 0.004$ &  \\\\" in latex(groups, published)


@pytest.mark.parametrize(("text", "said"), [
    ("", "has no [[figure]]"), ("[[figure]]\nmethod = 'a'\nvalue = 'b'\nsource = 'c'", "figure 1 needs a method"),
    ("[[figure]]\nmethod = 'a'\nvalue = 1", "has no source"), ("x", "is not TOML"),
    ("[[figure]]\nmethod = 'a'\nvalu = 1", "valu is not known")])
def test_a_wrong_file_of_published_figures_is_said(tmp_path, text, said):
    (tmp_path / "published.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_published(tmp_path / "published.toml")


def test_a_servers_run_can_be_compared_and_its_epsilon_is_not_known(tmp_path, capsys):
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"options": {"rounds": 1, "strategy": "fedsvd"}}))
    one = {"round": 1, "evaluation": {"accuracy": 0.7}, "bytes_up": 4, "bytes_down": 8, "seconds": 1.0,
           "uploaded": ["a", "b"], "update_norm": 0.1, "train_loss": None}
    (folder / "report.json").write_text(json.dumps({
        "ended": "finished", "options": {"seed": 0, "rounds": 1}, "rounds": [one], "values_per_client": {"up": 3},
        "plan": {"run_id": "0" * 16, "strategy": "fedsvd", "private": True, "model_weights_sha256": "m"},
        "bytes": {"up": 4, "down": 8}, "seconds": 1.0, "resumed_after_rounds": []}))
    write_cell(tmp_path / "simulated" / "1", result("ffa-lora", swept={}))
    assert main(["compare", str(folder), str(tmp_path / "simulated"), f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert "knows neither ε nor what its rows were" in said.err and "not known" in said.out
