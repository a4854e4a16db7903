"""fedlora-client check says without a server what a client would say, tells all faults at once, and writes nothing."""

import csv
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedlora.config import ClientConfig, read_config
from fedlora.console import messages
from fedlora.privacy import Ledger, Policy, RunTerms
from fedlora.tasks import read
from fedlora_client import check_command, paths
from fedlora_client.cli import main
from fedlora_client.data_holder import DataHolder
from tests.client.test_join import Site
from tests.covering import few
from tests.inputs_data import INPUTS
from tests.processes import start, write_rows

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def site(tmp_path, checkpoint):
    return Site(tmp_path, checkpoint("bert"))


@pytest.fixture
def check(monkeypatch, capsys):
    """Return a function that checks, at a terminal or not, and returns the exit code and what was printed."""
    def check(*words, terminal=False, colours=None):
        out = StringIO()
        console = Console(file=out, width=200, force_terminal=terminal, color_system=colours, markup=False, emoji=False,
                          highlight=False, force_interactive=False)
        monkeypatch.setattr("fedlora.console.results", lambda **_: console)
        try:
            code = check_command.main([str(word) for word in words])
        except SystemExit as ended:  # the command line is wrong
            return ended.code, capsys.readouterr().err
        return code, out.getvalue()

    return check


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def line_of(told, words):
    """Return the words of the line that begins with these."""
    return next(line for line in told.splitlines() if line.strip().startswith(words)).split()


def test_a_site_that_is_ready_sees_all_that_its_client_will_use_and_nothing_is_written(site, check):
    kit = site.enrolled().kit()
    before = files(site.folder)
    code, told = check("--kit", kit, "--data", site.data, "--model", site.model, "--tls", site.tls, "--epsilon", 8,
                       "--declared-size", 120)
    assert code == 0 and told.rstrip().endswith("Ready. Nothing was written, and nobody was called."), told
    for section in ("Files", "Labels", "Duplicates", "Privacy, in the run of the kit", "2 rounds of 2 steps",
                    "What this run costs data set notes", "Tokens, of which the run keeps 16", "This machine (cpu"):
        assert section in told
    assert "✓ identity  north" in told and "weights, configuration and tokenizer are the kit's" in told
    assert line_of(told, "declared size")[2] == "120" and line_of(told, "sampling rate")[2] == "0.06667"
    assert line_of(told, "a round of 2")[5] == "s" and "a step of 8 fits" in told
    assert files(site.folder) == before and not (site.folder / "home").exists()


def test_everything_wrong_is_told_at_once_by_kind_and_counted(site, check, monkeypatch):
    kit = site.enrolled().kit()
    rows = site.data.read_text().splitlines()
    site.data.write_text("\n".join([*rows, '{"text": "", "label": "routine"}', '{"text": "x"', '{"text": 3}', "{"]))
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text("max-rounds = 'many'\n")
    (site.tls / "key.pem").chmod(0o644)
    monkeypatch.setenv("FEDLORA_INSECURE_NOISE_SEED", "1")
    code, told = check("--kit", kit, "--data", site.data, "--tls", site.tls, "--rounds", 9, "--model", "/no/model")
    assert code == 2
    for fault in ("✗ kit       --rounds 9 is not the kit's, 2", "✗ options   FEDLORA_INSECURE_NOISE_SEED is set",
                  "✗ policy    ", "✗ identity  ", "chmod 600", "✗ data      4 faults of 3 kinds",
                  "notes.jsonl:121: text is empty", "✗ model     --model /no/model is no folder",
                  "Left out: labels, duplicates"):
        assert fault in told, told
    assert told.rstrip().endswith("8 things must be mended (✗ above).")


def test_a_model_that_is_missing_hides_neither_the_data_nor_the_privacy(site, check):
    kit = site.enrolled().kit()
    code, told = check("--kit", kit, "--data", site.data, "--tls", site.tls)
    assert code == 2 and "✗ model     the base model is a folder of the coordinator's" in told
    assert "What this run costs data set notes" in told and "1 thing must be mended" in told
    code, told = check("--data", site.data, "--model", "/no/such/folder")
    assert code == 2 and "✗ model     --model /no/such/folder is no folder" in told and "Duplicates" in told


def test_without_model_and_kit_it_is_said_what_was_left_out(site, check):
    code, told = check("--data", site.data)
    assert code == 0 and "Left out: tokens, records as the model sees them, time and memory" in told
    assert "! an expected batch of 256 out of 120 declared records" in told and "usual run" in told
    assert "The labels are not declared" in told
    code, told = check("--data", site.data, "--batch-size", 256)
    assert code == 2 and "✗ privacy   an expected batch of 256" in told
    code, told = check("--data", site.data, "--delta", 0.5)
    assert code == 2 and "✗ privacy   delta is 0.5" in told
    code, told = check("--data", site.data, "--epsilon", "inf")
    assert code == 0 and "PRIVACY IS OFF" in told
    code, told = check("--data", site.data, "--batch-size", 12, "--rounds", 3, "--local-steps", 2, "--epsilon", 4)
    assert code == 0 and "3 rounds of 2 steps" in told and line_of(told, "ε of the run")[4] == "3.991"


def test_no_data_are_said_to_be_missing_as_a_client_says_it(check):
    code, told = check()
    assert code == 2 and "✗ data      --data is missing" in told and told.count("✗") == 2


def patients(path, rows=60):
    with path.open("w", newline="") as file:
        write = csv.writer(file, delimiter=";").writerow
        write(["note", "triage", "patient_id", "age"])
        for i in range(rows):
            write([f"secret note {i} of the day", ["urgent", "Urgent", " urgent", "routine"][i % 4], f"p{i % 11}", 5])
        write(["secret  NOTE 3 of the day", "urgent", "p2", 7])
    return path


COLUMNS = ("--column", "text=note,label=triage")


def test_spellings_units_duplicates_and_cut_tokens_are_counted(tmp_path, check, checkpoint):
    patients(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text().replace("of the day", "of the night")
                                    + "secret note 7 of the day;routine;p2;8\n")
    code, told = check("--data", tmp_path, *COLUMNS, "--labels", "urgent,routine", "--privacy-unit",
                       "column:patient_id", "--rows-per-unit", 11, "--model", checkpoint("bert"), "--max-length", 8,
                       "--batch-size", 2, "--rounds", 1, "--local-steps", 1, terminal=True)
    assert code == 0, told
    assert line_of(told, "urgent")[:3] == ["urgent", "92", "74.8%"]
    assert "also written ' urgent' 30 times, 'Urgent' 30 times" in told
    assert "text from note, label from triage, unit from patient_id; not read: age" in told
    assert line_of(told, "units ")[1] == "11" and line_of(told, "rows of a unit: fewest")[-1] == "10"
    assert line_of(told, "most")[1] == "15" and line_of(told, "units of more than 11 rows")[6] == "5"
    within, across = line_of(told, "within a file"), line_of(told, "across files")
    assert within[3] == "2" and within[4].endswith("a.csv:62") and within[6].endswith("a.csv:5,")
    assert across[2] == "1" and across[3].endswith("b.csv:63") and across[5].endswith("a.csv:9")
    assert line_of(told, "of these with another answer")[5] == "2"
    assert line_of(told, "records that are cut")[4] == "123" and "Tokens, of which the run keeps 8" in told
    assert told.count(", 8 tokens\n") == 3 and told.count("[CLS]") == told.count("[SEP]") == 3


def test_records_and_labels_that_are_not_declared_are_shown_on_a_terminal_alone(tmp_path, check, checkpoint, capsys):
    data = patients(tmp_path / "a.csv")
    words = ("--data", data, *COLUMNS, "--model", checkpoint("bert"), "--no-measure")
    code, told = check(*words)
    assert code == 0 and "secret" not in told.lower() and "urgent" not in told.lower() and "routine" not in told
    assert "are shown on a terminal alone" in told and line_of(told, "labels that are not declared")[5] == "3"
    assert "Left out: time and memory, by --no-measure" in told
    code, told = check(*words, "--labels", "urgent,routine")
    assert "routine" in told and "secret" not in told.lower() and "' urgent'" not in told
    code, told = check(*words, terminal=True)
    assert told.count("secret") == 3 and "also written" in told and "a column patient_id" in told
    code, told = check(*words, "--no-records", terminal=True)
    assert "secret" not in told and "as the model sees them" not in told
    assert "secret" not in "".join(capsys.readouterr())


def test_labels_that_have_to_be_declared_are_named_on_a_terminal_alone(site, check):
    words = ("--kit", site.kit(tls=False, labels=()), "--data", site.data, "--model", site.model, "--no-measure")
    code, told = check(*words)
    assert code == 2 and "✗ labels    the server will ask for the label names" in told and "routine" not in told
    assert "or give them with --labels" in told
    code, told = check(*words, terminal=True)
    assert code == 2 and 'The files hold labels = ["routine", "urgent"]' in told
    assert check(*words, "--labels", "routine,urgent")[0] == 0


def test_what_a_language_model_learns_to_write_is_underlined(tmp_path, check, checkpoint):
    (tmp_path / "a.jsonl").write_text('{"prompt": "what is it?", "completion": "a cold"}\n' * 4)
    code, told = check("--data", tmp_path, "--task", "causal-lm", "--model", checkpoint("llama"), "--no-measure",
                       terminal=True, colours="standard")
    assert code == 0 and "what is it?" in told and "\x1b[4ma cold</s>" in told, told


def test_memory_that_does_not_suffice_is_said_with_the_remedy(site, check, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    words = ("--data", site.data, "--model", site.model, "--batch-size", 8)
    monkeypatch.setattr("fedlora.training.trainer.run_steps", full)
    code, told = check(*words)
    assert code == 2 and "✗ machine   training ran out of memory: lower --micro-batch" in told

    def broken(*_, **__):
        raise RuntimeError("a layer without a kernel")

    monkeypatch.setattr("fedlora.training.trainer.run_steps", broken)
    code, told = check(*words)
    assert code == 2 and "failed (RuntimeError: a layer without a kernel)" in told


def test_a_budget_that_is_spent_is_seen_in_the_ledger_which_stays_as_it_is(site, check, home):
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text(f'[dataset.n]\ndata = "{site.data}"\nepsilon = 0.6\ndelta = 1e-5\ndeclared-size = 110\n')
    ledger = Ledger(paths.ledger())
    ledger.declare("n", epsilon=1.0, delta=1e-5)
    ledger.begin_run("n", RunTerms("ab" * 8, "a" * 64, "row", 110, 0.05, 2.8, 1e-5, 0.1, {"adapter": 1.0}, 4, 10))
    for number in range(1, 11):
        ledger.reserve("n", "ab" * 8, number, 0).begin()
    ledger.close()
    before = files(home)
    code, told = check("--data", site.data, "--kit", site.kit(tls=False), "--epsilon", 8, "--no-measure")
    assert code == 2 and "of ε 0.6 left" in told and "does not fit the lifetime of dataset 'n'" in told, told
    assert files(home) == before
    assert Policy.read(paths.policy()).dataset_at(str(site.data)).declared_size == 110


def test_a_file_of_options_for_all_commands_is_understood(site, check, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'rounds = 2\nlocal-steps = 1\nbatch-size = 8\nmax-length = 16\n[client]\ndata = "{site.data}"\n'
                    f'model = "{site.model}"\n[server]\nmin-clients = 3\n')
    code, told = check("--config", file)
    assert code == 0 and "2 rounds of 1 steps" in told and "keeps 16" in told
    assert check("--config", site.folder / "nothing.toml")[0] == 2


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Return a function that does what a client does before it calls a server, and returns why it ends, or ""."""
    found = {}

    def read_once(path, task, **options):
        """Read as the client and the check do, each path once."""
        if path not in found:
            try:
                found[path] = read(path, task, **options)
            except ValueError as error:
                found[path] = error
        if isinstance(found[path], ValueError):
            raise found[path]
        return found[path]

    monkeypatch.setattr("fedlora_client.data_holder.read", read_once)

    def client(data, given):
        try:
            options = read_config(ClientConfig, [f"--data={data}", f"--state={tmp_path / 'state'}", "--name=north",
                                                 f"--simulated-ledger={tmp_path / 'ledger'}", *given])
        except SystemExit:
            return "is not known here"
        try:
            DataHolder.of(options, messages()).close()
        except ValueError as error:
            return str(error)
        return ""

    return client


@pytest.mark.parametrize("part", few(*range(6)))
def test_every_input_of_the_table_is_judged_as_a_client_judges_it(part, tmp_path, check, client, monkeypatch):
    for number, (what, (make, given)) in enumerate(INPUTS.items()):
        if number % 6 != part:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        made = make(folder)
        data = made if isinstance(made, (Path, str)) else folder
        code, told = check("--data", data, "--simulated-ledger", tmp_path / "ledger", *given)
        why = client(data, given)
        assert (code, why in told) == (2 if why else 0, True), f"{what}: {why}\n{told}"


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="no shared cases here")
@pytest.mark.parametrize(("case", "options", "code", "words"), [
    ("na-labels/na.csv", (), 0, "empty label"),
    ("repeated-header/cat.csv", (), 2, "the row repeats the header"),
    ("glue-parquet", ("--column", "text=sentence"), 0, "held-out rows, by the name"),
    ("patient-id/zwu.csv", (), 0, "")])
def test_shared_cases(case, options, code, words, check):
    found, told = check("--data", SHARED / "cases" / case, *options)
    assert found == code and words in told, told


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="no shared cases here")
@pytest.mark.parametrize("case", ["leftover-adapter", "missing-norm", "quantised-base", "deberta-targets-all"])
def test_shared_models_are_tried_or_refused_in_words(case, site, check):
    task = "causal-lm" if case in ("missing-norm", "quantised-base") else "classification"
    code, told = check("--data", site.data, "--model", SHARED / "cases" / case, "--task", task, "--batch-size", 8,
                       "--max-length", 16, *(("--column", "text=text") if task == "causal-lm" else ()))
    assert code == (0 if case == "deberta-targets-all" else 2), told
    assert ("✗ model" in told) == (code == 2), told


@pytest.mark.skipif(not (SHARED / "data" / "sst2").exists(), reason="no shared data here")
def test_sst2_as_the_hub_has_it(check):
    code, told = check("--data", SHARED / "data" / "sst2", "--column", "text=sentence")
    assert code in (0, 2) and "Traceback" not in told


def test_the_command_ends_with_its_code_and_needs_neither_flower_nor_a_terminal(tmp_path, home):
    write_rows(tmp_path / "data" / "notes.jsonl", 0)
    (tmp_path / "data" / "more.csv").write_text("text,label\n,urgent\n")
    process = start("client", "check", "--data", tmp_path / "data", log=tmp_path / "log", home=home)
    assert process.wait(60) == 2
    told = (tmp_path / "log").read_text()
    assert "more.csv:2: text is missing or empty" in told and told.endswith("1 thing must be mended (✗ above).\n")
    assert "WARNING" not in told and not [*home.rglob("fedlora")]


def test_a_check_that_is_interrupted_says_so(site, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora_client.check.check", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["check", "--data", str(site.data)])
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err
