"""A table of wrong usages of the commands, with what is printed about each.

    python -m tests.usages [--only WORD] > table.md

Each usage runs in a folder with the files that it names, and ends before anything is listened to.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from tests.processes import start, write_rows
from tests.tiny import tiny_checkpoint

SIMULATE = "fedlora-simulate --model bert --data rows.jsonl --batch-size 8 --out o"
SERVER = "fedlora-server --model bert --labels routine,urgent --out o --address 127.0.0.1:0"
CLIENT = "fedlora-client --server 127.0.0.1:9 --connect-timeout 0.1 --yes --simulated-ledger l"

USAGES: dict[str, tuple[str, str]] = {
    # what is wrong → (the command line, words of the message)
    "no data": ("fedlora-simulate", "--data"),
    "data that is not there": ("fedlora-simulate --model bert --data nowhere.csv", "nowhere.csv"),
    "an empty folder as data": ("fedlora-simulate --model bert --data empty/ --out o", "empty"),
    "a picture as data": ("fedlora-simulate --model bert --data scan.png --out o", "scan.png"),
    "a Word file as data": ("fedlora-simulate --model bert --data letter.docx --out o", "letter.docx"),
    "a folder of a model as data": ("fedlora-simulate --model bert --data bert --out o", "bert"),
    "data without a text column": ("fedlora-simulate --model bert --data other.csv --out o", "text"),
    "one label only": ("fedlora-simulate --model bert --data one-label.jsonl --out o", "label"),
    "a model that is not there": ("fedlora-simulate --model no/such --data rows.jsonl", "no/such"),
    "a folder without a model": ("fedlora-simulate --model empty --data rows.jsonl", "empty"),
    "a file as model": ("fedlora-simulate --model rows.jsonl --data rows.jsonl", "rows.jsonl"),
    "an encoder for a language model's task": (f"{SIMULATE} --task causal-lm", "encoder"),
    "a strategy that is not there": (f"{SIMULATE} --strategy fedavg", "fedavg-lora"),
    "a start that is not there": (f"{SIMULATE} --init xavier", "xavier"),
    "a start that the strategy cannot have": (f"{SIMULATE} --strategy fed-sb --init kaiming", "kaiming"),
    "rank 0": (f"{SIMULATE} --rank 0", "--rank"),
    "a rank above the layer's size": (f"{SIMULATE} --rank 4000", "4000"),
    "a rank that is a word": (f"{SIMULATE} --rank eight", "eight"),
    "a negative ε": (f"{SIMULATE} --epsilon -1", "--epsilon"),
    "ε without privacy": (f"{SIMULATE} --privacy off --epsilon 3", "contradict"),
    "ε = inf with privacy": (f"{SIMULATE} --epsilon inf", "contradict"),
    "δ above 1": (f"{SIMULATE} --delta 2", "--delta"),
    "δ that is useless": (f"{SIMULATE} --delta 0.5", "delta is 0.5"),
    "a batch larger than the data": (f"{SIMULATE} --batch-size 100000", "batch"),
    "more clients than rows": (f"{SIMULATE} --clients 5000", "5000"),
    "more clients a round than clients": (f"{SIMULATE} --clients-per-round 9", "9"),
    "more replies than clients": (f"{SIMULATE} --min-replies 9", "9"),
    "no rounds": (f"{SIMULATE} --rounds 0", "--rounds"),
    "a learning rate of 0": (f"{SIMULATE} --lr 0", "--lr"),
    "a partition that is not there": (f"{SIMULATE} --partition random", "random"),
    "a partition without its number": (f"{SIMULATE} --partition dirichlet", "dirichlet"),
    "a seed given twice": (f"{SIMULATE} --seeds 1,1", "1"),
    "a sweep of an option that is not there": (f"{SIMULATE} --sweep rnk=2,8", "did you mean rank"),
    "a sweep of a wrong value": (f"{SIMULATE} --sweep rank=2,eight", "'eight'"),
    "a sweep of which one setting cannot run": (f"{SIMULATE} --sweep batch-size=8,90000", "batch-size=90000: "),
    "a sweep of strategies": (f"{SIMULATE} --sweep strategy=fedsvd,fed-sb", "--strategy"),
    "a tuning of ε": (f"{SIMULATE} --tune epsilon=1,8", "epsilon cannot be tuned"),
    "a budget without tuning": (f"{SIMULATE} --tune-budget 3", "--tune"),
    "a resumed simulation without a folder": ("fedlora-simulate --model bert --data rows.jsonl --resume", "--out"),
    "a resumed folder that holds no run": (f"{SIMULATE} --out bert --resume", "holds no run"),
    "published figures that are not there": (f"{SIMULATE} --reference no.toml", "no.toml"),
    "a comparison of a folder without runs": ("fedlora-simulate compare bert", "holds no run"),
    "a folder that another run has": (f"{SIMULATE} --out taken", "taken"),
    "a file as folder of the run": (f"{SIMULATE} --out rows.jsonl", "rows.jsonl"),
    "a folder that cannot be made": (f"{SIMULATE} --out /proc/runs", "/proc"),
    "labels that the data does not have": (f"{SIMULATE} --labels red,green", "red, green"),
    "one label in the list": (f"{SIMULATE} --labels urgent", "--labels"),
    "evaluation data with another label": (f"{SIMULATE} --eval-data third-label.jsonl", "third-label.jsonl"),
    "a target that no layer has": (f"{SIMULATE} --targets q_proj", "q_proj"),
    "a device that is not there": (f"{SIMULATE} --device cuda", "cuda"),
    "a reduction that is not there": (f"{SIMULATE} --reduction krum", "multi-krum"),
    "an option of a reduction without it": (f"{SIMULATE} --reduction-options trim=0.2", "trim"),
    "an underscore in an option": (f"{SIMULATE} --local_steps 3", "--local-steps"),
    "a client's option at the server": ("fedlora-server --data x", "fedlora-client"),
    "a value without quotes": ("fedlora-server --labels a, b", "quotes"),
    "a config file that is not there": ("fedlora-server --config none.toml", "none.toml"),
    "a config file that is no TOML": ("fedlora-server --config rows.jsonl", "rows.jsonl"),
    "a wrong name in a config file": ("fedlora-server --config wrong.toml", "rounds"),
    "a wrong type in a config file": ("fedlora-server --config type.toml", "type.toml"),
    "an address without a port": (f"{SERVER} --address here", "here"),
    "an address of another machine": (f"{SERVER} --address 192.0.2.1:9092 --insecure", "192.0.2.1"),
    "another machine without encryption": (f"{SERVER} --address 0.0.0.0:9092", "--tls"),
    "a folder of keys that is not there": (f"{SERVER} --tls nowhere", "nowhere"),
    "a run to resume that is not there": ("fedlora-server --resume nowhere", "nowhere"),
    "other options while resuming": ("fedlora-server --resume taken --rounds 9", "taken"),
    "status of what is no run": ("fedlora-server status empty", "empty"),
    "stop of what is no run": ("fedlora-server stop empty", "empty"),
    "a log that is not there": ("fedlora-server audit-log verify empty", "empty"),
    "an export of what is no run": ("fedlora-server export empty", "empty"),
    "predictions by what is no run": ("fedlora-server predict nowhere rows.jsonl", "nowhere"),
    "a certificate for nobody": ("fedlora-server pki sign --pki nowhere nobody.csr", "nowhere"),
    "a command that is not there": ("fedlora-server satus", "status"),
    "a client without data": (f"{CLIENT}", "--data"),
    "a client whose data is not there": (f"{CLIENT} --data nowhere", "nowhere"),
    "a kit that is not there": ("fedlora-client join nowhere.toml", "nowhere.toml"),
    "a kit that is none": ("fedlora-client join wrong.toml", "wrong.toml"),
    "a report that is none": ("fedlora-client verify rows.jsonl", "rows.jsonl"),
    "a report that is not there": ("fedlora-client verify nowhere.json", "nowhere.json"),
    "an empty name": (f"{CLIENT} --data rows.jsonl --declared-size 100 --name ''", "--name"),
    "a policy that is no TOML": (
        f"{CLIENT} --policy rows.jsonl --data rows.jsonl", "rows.jsonl"),
    "a policy that is not there": (f"{CLIENT} --policy none.toml --data rows.jsonl", "none.toml"),
    "a declared size of 0": (f"{CLIENT} --data rows.jsonl --declared-size 0", "--declared-size"),
    "more replies than a round's clients": (f"{SERVER} --clients-per-round 2 --min-replies 3", "--min-replies"),
    "a proxy without encryption": (f"{CLIENT} --data rows.jsonl --proxy p:1", "--tls"),
    "a server of another machine without encryption": (
        f"{CLIENT} --server hospital.example:9092 --data rows.jsonl", "--tls"),
    "a folder of a model as adapter": ("fedlora-adapter transfer bert --to bert --prompts rows.jsonl --out o",
                                       "adapter_config.json"),
    "a model that loses everything": ("fedlora-adapter prune-base bert --ratio 1 --out o", "0.95"),
    "a single adapter to choose from": ("fedlora-adapter route bert --out o", "two adapters"),
}


def prepare(folder: Path) -> None:
    """Write the files that the usages name."""
    tiny_checkpoint("bert", folder / "bert")
    write_rows(folder / "rows.jsonl", 0)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for name, label in (("one-label.jsonl", "urgent"), ("third-label.jsonl", "perhaps")):
        (folder / name).write_text("".join(json.dumps(row | {"label": label}) + "\n" for row in rows))
    (folder / "empty").mkdir()
    (folder / "scan.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "letter.docx").write_bytes(b"PK\x03\x04" + bytes(200))
    (folder / "other.csv").write_text("id,amount\n1,2\n3,4\n")
    (folder / "wrong.toml").write_text("roundz = 3\n")
    (folder / "type.toml").write_text('rounds = "many"\n')
    (folder / "taken").mkdir()
    (folder / "taken" / "report.json").write_text("{}")


def printed(line: str, folder: Path) -> tuple[int, str]:
    """Run a command in the folder; return its exit code and what it printed."""
    name, *argv = shlex.split(line)
    log = folder / "printed"
    code = start(name.removeprefix("fedlora-"), *argv, log=log, home=folder / "home", folder=folder).wait(60)
    return code, log.read_text()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only usages whose description has this word")
    only = parser.parse_args().only
    print("| wrong usage | exit code | printed |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        for what, (line, _) in USAGES.items():
            if only in what:
                code, told = printed(line, folder)
                told = "<br>".join(told.strip().splitlines()).replace("|", "\\|")
                print(f"| {what}: `{line}` | {code} | {told} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
