"""A table of data files as users may have them, with what `fedlora-client` prints about each before it connects.

    python -m tests.inputs_data [--only WORD] > table.md

makes each input in a temporary folder and runs the client's command on it, with the address of a server that does not
exist. A client that can read the input ends with "no server" (exit code 3), one that refuses it with 2. After 20 s it
counts as hanging. The code that runs is the one on PYTHONPATH, so two versions can be compared.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.exports_data import EXPORTS

LIMIT_S = 20

ROWS = [("pain since noon", 1), ("no complaints at all", 0), ("fever for two days", 1), ("sleeps well again", 0)]

Make = Callable[[Path], Any]
INPUTS: dict[str, tuple[Make, tuple[str, ...]]] = {}
"""Description of an input → a function that makes it in a folder, and further options.

The function returns the value of --data if that is not the folder.
"""


def an_input(what: str, *options: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        INPUTS[what] = make, options
        return make

    return add


def text(name: str, content: str | bytes) -> Make:
    """Make one file with this content."""
    def make(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def jsonl(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def parquet(name: str, columns: dict[str, Any], classes: dict[str, list[str]] | None = None) -> Make:
    def make(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        made = pa.table(columns)
        if classes:
            features = {column: {"names": names, "_type": "ClassLabel"} for column, names in classes.items()}
            made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(made, folder / name)

    return make


def several(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def at(name: str, make: Make) -> Make:
    """Have --data name a file in the folder."""
    def made(folder: Path) -> Path:
        make(folder)
        return folder / name

    return made


def link(name: str, target: str) -> Make:
    return lambda folder: (folder / name).symlink_to(target)


TWENTY = ROWS * 5
GOOD = table(["text", "label"], TWENTY)
OTHER = table(["text", "label"], [(f"{note}, he says", label) for note, label in TWENTY])
TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cold."}]
NAMES = {"label": ["bad", "good"]}
PATIENT, CHAT = "--privacy-unit=column:patient", "--task=causal-lm"


def with_labels(labels: Sequence[Any]) -> str:
    return table(["text", "label"], [(f"note {i} of the day", label) for i, label in enumerate(labels)])


def with_ids(ids: Sequence[Any]) -> str:
    return table(["text", "label", "patient"], [(f"note {i} of the day", i % 2, one) for i, one in enumerate(ids)])


def many_faults() -> str:
    rows: list[Any] = [{"text": "fine", "label": 1}]
    for i in range(40):
        rows.append([{"text": "", "label": 1}, {"text": 3, "label": 1}, '{"text": "x", ', {"text": "x", "label": [1]}]
                    [i % 4])
    return jsonl(*rows)


for what, make, *options in [
        # values that are missing
        ("CSV: labels NaN, NA, null, None, N/A, empty", text("a.csv", with_labels(
            [1, 0, "NaN", "NA", "null", "None", "N/A", "", 1, 0])), "--epsilon=inf"),
        ("TSV: labels NaN, NA, null", text("a.tsv", with_labels([1, 0, "NaN", "NA", "null", 1]).replace(",", "\t"))),
        ("JSONL: labels null, NaN, \"NA\", \"\"", text("a.jsonl", jsonl(
            *({"text": f"note {i}", "label": one} for i, one in enumerate([1, 0, None, float("nan"), "NA", ""]))))),
        ("parquet: float labels with NaN", parquet("a.parquet", {
            "text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]})),
        ("labels none, mild, severe", text("a.csv", with_labels(["none", "mild", "severe"] * 4))),
        ("labels none, mild, severe, declared", text("a.csv", with_labels(["none", "mild", "severe"] * 4)),
         "--labels=none,mild,severe"),
        ("every label NA", text("a.csv", with_labels(["NA"] * 6))),
        ("a text that is the word None", text("a.csv", table(["text", "label"], [*ROWS, ("None", 1), ("NA", 0)]))),
        ("three texts empty or blank", text("a.csv", table(["text", "label"], [*ROWS, ("", 1), (" ", 0), ("", 1)]))),
        ("JSONL: text NaN", text("a.jsonl", '{"text": NaN, "label": 1}\n' + jsonl({"text": "x", "label": 0}))),
        ("parquet: text null", parquet("a.parquet", {"text": ["a", None, "c"], "label": [1, 0, 1]})),
        # labels
        ("parquet: ClassLabel with -1", parquet("a.parquet", {"text": ["a", "b", "c"], "label": [0, 1, -1]},
                                                NAMES)),
        ("parquet: ClassLabel, number without name", parquet("a.parquet", {"text": ["a", "b"], "label": [0, 5]},
                                                             NAMES)),
        ("ClassLabel in one file, numbers in another", several(
            parquet("a.parquet", {"text": ["a", "b"], "label": [0, 1]}, {"label": ["bad", "good"]}),
            text("b.csv", GOOD))),
        ("labels 1, 1.0, \"1\"", text("a.jsonl", jsonl({"text": "x", "label": 1}, {"text": "y", "label": 1.0},
                                                       {"text": "z", "label": "1"}, {"text": "w", "label": 0}))),
        ("labels of true and false", text("a.jsonl", jsonl({"text": "x", "label": True},
                                                           {"text": "y", "label": False}))),
        ("labels that are fractions", text("a.csv", with_labels([0.5, 1.5, 1, 0]))),
        ("JSONL: labels that are fractions", text("a.jsonl", jsonl(
            *({"text": "x", "label": i / 2} for i in range(5))))),
        ("labels Yes and yes", text("a.csv", with_labels(["Yes", "yes", "no"] * 3))),
        ("a label outside --labels, ten times", text("a.csv", with_labels([0, 1] + [2] * 10)), "--labels=0,1"),
        ("splits of a published data set", several(
            parquet("train-00000-of-00001.parquet", {"text": ["a b", "b c"], "label": [0, 1]}, NAMES),
            parquet("validation-00000-of-00001.parquet", {"text": ["c d"], "label": [0]}, NAMES),
            parquet("test-00000-of-00001.parquet", {"text": ["d e"], "label": [-1]}, NAMES))),
        ("train.csv, dev.csv and notes.csv", several(text("train.csv", GOOD), text("dev.csv", OTHER),
                                                     text("notes.csv", with_labels([0, 1])))),
        ("a folder with test.csv alone", text("test.csv", GOOD)),
        # the form of a file
        ("a header that comes again", text("a.csv", GOOD + GOOD)),
        ("a header that comes again, with a mark", text("a.csv", "\ufeff" + GOOD + "\ufeff" + OTHER)),
        ("a header that comes again in another order", text("a.csv", GOOD + "label,text\n1,x\n")),
        ("parquet: a row of the columns' names", parquet("a.parquet", {
            "text": ["a", "text"], "label": ["1", "label"]})),
        ("a name twice in the header", text("a.csv", "text,label,label\nx,1,0\n")),
        ("JSONL: a name twice in an object", text("a.jsonl", '{"text": "x", "text": "y", "label": 1}\n')),
        ("parquet: a name twice", lambda folder: _parquet_twice(folder / "a.parquet")),
        ("a header that ends in a comma", text("a.csv", "text,label,\nx,1,\n")),
        ("a header alone", text("a.csv", "text,label\n")),
        ("an empty file", text("a.csv", "")),
        ("an empty file beside a good one", several(text("a.csv", GOOD), text("b.csv", ""))),
        ("no header: texts and numbers", text("a.csv", "Mrs Zyxwv has had pain since noon,1\nanother,0\n")),
        ("no header: two words", text("a.csv", "Zyxwv,positive\nAbcde,negative\n")),
        ("CRLF and a byte-order mark", text("a.csv", ("\ufeff" + GOOD).replace("\n", "\r\n"))),
        ("Latin-1", text("a.csv", table(["text", "label"], [("schön", 1), ("ärgerlich", 0)]).encode("latin-1"))),
        ("UTF-16", text("a.csv", GOOD.encode("utf-16"))),
        ("a zero byte", text("a.csv", GOOD.replace("noon", "no\0on"))),
        ("semicolons", text("a.csv", GOOD.replace(",", ";"))),
        ("a quotation mark that never closes", text("a.csv", GOOD + '"so it goes,1\n' + GOOD.split("\n", 1)[1])),
        ("a quotation mark that closes three rows on", text(
            "a.csv", GOOD + '"so it goes,1\nfine,0\nanother,1\nshe said ",1\n')),
        ("a field of 17 MiB", text("a.csv", GOOD + '"' + "x" * (17 << 20) + '",1\n')),
        ("a mark that never closes, 40 MiB", text("a.csv", GOOD + '"x,1\n' + "fine text,1\n" * (40 << 16))),
        ("JSONL: a line of 17 MiB", text("a.jsonl", jsonl({"text": "x" * (17 << 20), "label": 1}))),
        ("parquet: a field of 17 MiB", parquet("a.parquet", {"text": ["a", "x" * (17 << 20)], "label": [1, 0]})),
        ("rows of two, three and four fields", text("a.csv", GOOD + "a,b,1\n" * 5 + "a,b,c,1\n")),
        ("forty faults of four kinds", text("a.jsonl", many_faults())),
        ("faults in three files", several(text("a.csv", "text,label\n,1\n"), text("b.csv", "text,label\n,1\nx,1,2\n"),
                                          text("c.jsonl", "{\n"))),
        ("a JSON array over lines", text("a.jsonl", json.dumps([{"text": "x", "label": 1}], indent=1))),
        ("JSON over lines", text("a.jsonl", json.dumps({"text": "x", "label": 1}, indent=1))),
        # columns
        ("columns note and klass", text("a.csv", table(["note", "klass"], ROWS))),
        ("columns review and sentiment", text("a.csv", table(["id", "review", "sentiment"],
                                                             [(i, *row) for i, row in enumerate(ROWS)]))),
        ("columns Befund and Kennung", text("a.csv", table(["Befund", "Kennung"], ROWS))),
        ("columns v1, v2", text("a.csv", table(["v1", "v2"], [(label, note) for note, label in TWENTY]))),
        ("columns sentence and label (parquet)", parquet("a.parquet", {"sentence": ["a b"], "label": [1], "idx": [0]})),
        ("columns TEXT and \"Label \"", text("a.csv", table(["TEXT", "Label "], ROWS))),
        ("columns Text, TEXT and label", text("a.csv", table(["Text", "TEXT", "label"], [("x", "y", 1)]))),
        ("--column for a column that is not there", text("a.csv", GOOD), "--column=text=note"),
        ("--column gives one column twice", text("a.csv", GOOD), "--column=text=text,label=text"),
        ("rows nested in an object", text("a.jsonl", jsonl({"data": {"text": "x", "label": 1}}))),
        # the folder
        ("notes.csv and \"notes (1).csv\"", several(text("notes.csv", GOOD), text("notes (1).csv", GOOD))),
        ("a.csv and a.csv.gz", several(text("a.csv", GOOD), text("a.csv.gz", gzip.compress(GOOD.encode())))),
        ("a parquet and its CSV", several(
            parquet("a.parquet", {"text": [f"{note} {i}" for i, (note, _) in enumerate(TWENTY)],
                                  "label": [label for _, label in TWENTY]}),
            text("b.csv", table(["text", "label"], [(f"{note} {i}", one) for i, (note, one) in enumerate(TWENTY)])))),
        ("a gzip file called .csv", text("a.csv", gzip.compress(GOOD.encode()))),
        ("a workbook called .csv", text("a.csv", b"PK\x03\x04 and so on")),
        ("a pointer of Git LFS", text("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
        ("a web page called .csv", text("a.csv", "<!DOCTYPE html><html><body>Sign in</body></html>")),
        ("a link to an unmounted share", several(text("a.csv", GOOD), link("b.csv", "/mnt/no/share/b.csv"))),
        ("a link that leads to itself", several(text("a.csv", GOOD), link("b.csv", "b.csv"))),
        ("--data is a link to an unmounted share", at("b.csv", link("b.csv", "/mnt/no/share/b.csv"))),
        ("a named pipe in the folder", several(text("a.csv", GOOD), lambda folder: os.mkfifo(folder / "b.csv"))),
        ("--data is a named pipe", at("b.csv", lambda folder: os.mkfifo(folder / "b.csv"))),
        ("a socket in the folder", several(text("a.csv", GOOD), lambda folder: _socket(folder / "b.csv"))),
        ("._a.csv, ~$a.csv, README.txt, a.xlsx, a.zip, a.json", several(
            text("a.csv", GOOD), *(text(name, "x") for name in ("._a.csv", "~$a.csv", "README.txt", "a.xlsx", "a.zip",
                                                                "a.json", ".DS_Store")))),
        ("data in a folder of the folder", lambda folder: ((folder / "sub").mkdir(), text("sub/a.csv", GOOD)(folder))),
        ("a folder called a.csv", lambda folder: ((folder / "a.csv").mkdir(), text("a.csv/part-0.csv", GOOD)(folder))),
        ("a name with a line break", text("a\n\x1b[31mb.csv", "text,label\n,1\n")),
        ("a name that is no UTF-8", lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/\xff.csv")
                                                        ).write_text("text,label\n,1\n")),
        ("a path of 5,000 characters", lambda folder: folder / ("x" * 5000)),
        ("~ of nobody", lambda folder: "~nobody-here/notes.csv"),
        ("--data is a .json", at("a.json", text("a.json", "[]"))),
        ("--data is a workbook", at("a.xlsx", text("a.xlsx", "x"))),
        # units
        ("ids with invisible characters", text("a.csv", with_ids(
            ["7", "7\u200b", "\ufeff7", "7\u00ad", "8"])), PATIENT),
        ("ids 7 (parquet) and 007 (CSV)", several(
            parquet("a.parquet", {"text": ["a", "b"], "label": [0, 1], "patient": [7, 8]}),
            text("b.csv", with_ids(["007", "008", "9"]))), PATIENT),
        ("ids 12.0 and 12", text("a.csv", with_ids(["12.0", "12", "13"])), PATIENT),
        ("ids P1 and p1", text("a.csv", with_ids(["P1", "p1", "P2"])), PATIENT),
        ("ids that a spreadsheet rounded", text("a.csv", with_ids(["1.23457E+11", "1.23457E+11", "9"])), PATIENT),
        ("ids missing in four rows", text("a.csv", with_ids(["1", "", "NA", "nan", "NULL", "2"])), PATIENT),
        ("ids that are dates", parquet("a.parquet", {"text": ["a"], "label": [1], "patient": [__import__(
            "datetime").date(2020, 1, 1)]}), PATIENT),
        ("a unit that is the text", text("a.csv", GOOD), "--privacy-unit=column:text"),
        ("a unit column Patient_ID", text("a.csv", with_ids([1, 2]).replace("patient", "Patient ")), PATIENT),
        # conversations
        ("messages under the default task", text("a.jsonl", jsonl({"messages": TURNS}))),
        ("prompt and completion under the default task", text("a.csv", table(["prompt", "completion"], [("a", "b")]))),
        ("messages as JSON in CSV", text("a.csv", table(["messages"], [(json.dumps(TURNS),)])), CHAT),
        ("messages as Python prints them", text("a.csv", table(["messages"], [(str(TURNS),)])), CHAT),
        ("roles human and gpt", text("a.jsonl", jsonl({"messages": [
            {"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]})), CHAT),
        ("from and value", text("a.jsonl", jsonl({"conversations": [{"from": "human", "value": "a"}]})), CHAT),
        ("instruction and output", text("a.jsonl", jsonl({"instruction": "a", "output": "b"})), CHAT),
        ("an empty list, an empty content, no assistant", text("a.jsonl", jsonl(
            {"messages": []}, {"messages": [{"role": "user", "content": ""}]}, {"messages": TURNS[:1]})), CHAT),
        ("content that is a list of parts", text("a.jsonl", jsonl({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]}, TURNS[1]]})), CHAT)]:
    INPUTS[what] = make, tuple(options)

INPUTS |= {f"export: {what}": (export.make, export.options) for what, export in EXPORTS.items()}


def _parquet_twice(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "label"]),
                   path)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # the path of a socket must be short
    socket.socket(socket.AF_UNIX).bind(path.name)


def printed(what: str, home: Path) -> tuple[int | None, str]:
    """Return the exit code of the client's command (None if it hangs) and its output."""
    make, options = INPUTS[what]
    folder = home / "data"
    folder.mkdir()
    data = make(folder)
    data = folder if not isinstance(data, (Path, str)) else data
    out = home / "out"
    process = os.fork()
    if process == 0:
        for number in (1, 2):
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.environ["HOME"] = os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_DATA_HOME"] = str(home)
        logging.getLogger().handlers.clear()  # set by a library that was imported before the client could decide
        from fedlora_client.cli import main

        try:
            main([f"--data={data}", f"--simulated-ledger={home / 'ledger'}", "--name=trial", "--yes",
                  f"--state={home / 'state'}", "--server=127.0.0.1:9", "--connect-timeout=0.1",
                  *options])
        except BaseException:  # prints what the interpreter would
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), _plain(out.read_text(errors="replace"), home)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, _plain(out.read_text(errors="replace"), home)


def _plain(said: str, home: Path) -> str:
    lines = [line for line in said.replace(f"{home}/data", "DATA").replace(str(home), "HOME").splitlines()
             if not re.match(r"The ledger is a simulated|PRIVACY IS OFF|No server at|.*127\.0\.0\.1:9", line)]
    return "<br>".join(re.sub(r"x{50,}", "xxx…", line)[:1500].replace("|", "\\|") for line in lines)


def verdict(code: int | None, said: str) -> str:
    if code is None:
        return "**hangs**"
    if "Traceback" in said:
        return "**traceback**"
    return {2: "refused", 3: "read", 4: "refused"}.get(code, f"**exit {code}**") + (
        ", remarks" if code == 3 and said else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="inputs that have this word")
    only = parser.parse_args().only
    from fedlora.tasks import task_named
    from fedlora_client import app  # noqa: F401 - once, for all children

    task_named("classification"), task_named("causal-lm")
    print("| input | printed | verdict |\n|---|---|---|")
    for what in INPUTS:
        if only in what:
            with tempfile.TemporaryDirectory() as home:
                code, said = printed(what, Path(home))
            print(f"| {what} | {said} | {verdict(code, said)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
