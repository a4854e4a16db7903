"""Reading of parquet files and hub datasets, both of which may store classes as numbers with a list of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown

Record = tuple[int, dict[str, Any]]


class NumberedClass(str):
    """The name of a class that the file stores as a number."""

    number: int

    @classmethod
    def of(cls, name: str, number: int) -> NumberedClass:
        """Return the name of a class together with its number."""
        made = cls(name)
        made.number = number
        return made


class _Names:
    """A translator of class numbers into class names. The number -1 means a missing label, as on the hub.

    Args:
        classes: column → names of its classes, in the order of their numbers.
        problems: takes the fault if a number has no name.
    """

    def __init__(self, classes: Mapping[str, list[str]], problems: Problems) -> None:
        self._problems = problems
        self._of: dict[str, dict[Any, Any]] = {
            column: {None: None, -1: None} | {i: NumberedClass.of(name, i) for i, name in enumerate(names)}
            for column, names in classes.items()}

    def put(self, file: str, number: int, row: dict[str, Any]) -> dict[str, Any]:
        for column, names in self._of.items():
            value = row[column]
            if isinstance(value, str):
                continue
            if value not in names:
                self._problems.add(place(file, number), f"the {shown(column)} is a number that has no name in the "
                                   "file's own list of classes (ClassLabel)", "Write the file again with all names")
            row[column] = names.get(value)
        return row


def parquet(file: Path, wanted: Callable[[str], bool], problems: Problems) -> Iterator[Record]:
    """Yield every readable row of a parquet file with its number, as `fedlora.data.formats.records` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    taken: list[str] = []
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                problems.add(place(str(file), 1), "two columns have the same name",
                             "Write the file with each name once")
                return
            taken = [name for name in names if wanted(name)]
            classes = _Names({column: each for column, each in _classes(table.schema_arrow.metadata).items()
                              if column in taken}, problems)
            others = dict.fromkeys(names)
            for batch in table.iter_batches(batch_size=4096, columns=taken):
                for row in batch.to_pylist():
                    number += 1
                    yield number, others | classes.put(str(file), number, row)
    except (pa.ArrowException, UnicodeDecodeError):
        problems.add(place(str(file), number + 1), "the row cannot be read: the file is damaged or not parquet",
                     "Write it again")
    except (ValueError, OverflowError):
        problems.add(place(str(file), number + 1), "this row or one after it holds a value that Python has no type "
                     f"for, like a date out of range, in one of the columns {', '.join(map(shown, taken))}",
                     "Write it as a string")


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of each column's numbered classes, which the library `datasets` stores in a file's metadata."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: feature["names"] for column, feature in features.items()
                 if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {column: names for column, names in found.items()
            if isinstance(names, list) and all(isinstance(name, str) for name in names)}


def hub_records(name: str, problems: Problems, *, allow_download: bool) -> Iterator[Record]:
    """Yield the rows of a dataset on the Hugging Face hub with their numbers, counted from 1.

    Only data files are read, never a loading script.

    Args:
        name: "org/dataset" or "org/dataset/config", with or without ":split". The split is "train" unless given.
        problems: collects what is wrong with the rows.
        allow_download: fetch a dataset that is not in the hub's cache on this machine. False makes no connection.

    Raises:
        ValueError: the hub or the dataset cannot be reached, or the package `datasets`, which nothing else needs, is
            not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name!r} is no file or folder here, and reading a dataset from the hub needs the package "
                         "datasets. Check the path, install that with pip install 'datasets>=3.0', or download the "
                         "dataset and name its folder") from None

    path, _, split = name.partition(":")
    organisation, dataset, *config = path.split("/")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not allow_download
    try:
        loaded = datasets.load_dataset(f"{organisation}/{dataset}", *config, split=split or "train")
    except Exception as error:
        found = (f"the hub did not give a dataset of that name ({type(error).__name__}). Check the path"
                 if allow_download else
                 "no such dataset is in the hub's cache. Check the path, add --allow-download")
        raise ValueError(f"{name!r} is no file or folder here, and {found}, or download the dataset and name its folder"
                         ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    classes = _Names({column: feature.names for column, feature in loaded.features.items()
                      if isinstance(feature, datasets.ClassLabel)}, problems)
    for number, row in enumerate(loaded, start=1):
        yield number, classes.put(name, number, row)
