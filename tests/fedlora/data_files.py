"""Data files for tests, and the messages with which reading refuses them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.tasks import read

SECRET = "Mrs Zyxwv"


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def write(path: Path, columns: list[str], rows: list[tuple]) -> Path:
    if path.suffix == ".jsonl":
        return write_lines(path, *(dict(zip(columns, row, strict=True)) for row in rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([columns, *rows])
    return path


def refusal(path: Path | str, task: str = "classification", **options) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, task, **options)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert SECRET not in str(seen)
        seen = None if seen.__suppress_context__ else seen.__context__
    return str(caught.value)
