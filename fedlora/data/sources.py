"""Choice of the files to read at a path, with a warning about everything else that may be data there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fedlora.data.columns import Needs
from fedlora.data.formats import ACCEPTED, PACKED, SUFFIXES, WORKBOOK, opened_records, suffix_of
from fedlora.data.grid import Record
from fedlora.data.options import ReadOptions
from fedlora.data.parquet import hub_records
from fedlora.data.problems import FIRST, Problems
from fedlora.data.rows import shown
from fedlora.places import expanded

log = logging.getLogger(__name__)

_REMEDIES = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"), "packed: unpack it"),
    **dict.fromkeys((".xlsm", ".xlsb", ".xls", ".ods", ".numbers"), "a workbook: save it as .xlsx, or a sheet as .csv"),
    **dict.fromkeys((".json", ".ndjson"), "not .jsonl: write one JSON object per line, and name it so")}

_TEXT = "text: if it is a table, name it .csv, or .tsv if tabs separate its fields"

_TRAIN = frozenset(("train", "training"))
_HELD_OUT = frozenset(("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation", "heldout"))

_MOST_LOOKED_AT = 10_000
"""Most entries of a subfolder that are searched for data, because it may be the root of a disk."""


def sources(path: Path | str, needs: Needs, options: ReadOptions, problems: Problems, *, allow_download: bool = False,
            held_out: bool = False) -> Iterator[tuple[str, Iterator[Record]]]:
    """Yield the files at a path in the order of their names, each with a stream of its rows; or a hub dataset.

    Args:
        path: a file, a folder, or the name of a hub dataset.
        needs: the columns that are needed.
        options: what the owner says about the files.
        problems: collects what is wrong with the files.
        allow_download: fetch a hub dataset that is not in the hub's cache on this machine.
        held_out: whether the rows are for evaluation, not for training. If files of a folder are named like the splits
            of a published data set ("train", "test-00000-of-00001", "reviews_dev"), the splits for the other purpose
            are left out.

    Raises:
        ValueError: the path is neither a file, nor a folder, nor the name of a dataset; or nothing in it can be read.
    """
    check_there(path)
    local = expanded(path)
    try:
        folder = local.is_dir()
        if folder:
            files, left = _in_folder(local, problems, held_out=held_out)
        elif local.exists() or local.is_symlink():
            files = [local]
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read: {error.strerror}. Check the path and its permissions"
                         ) from None
    if folder:
        if not files and not problems:
            said = f": left out are {_told(left)}" if left else ""
            remedy = "Name the file that is meant" if left else "Put the data there"
            raise ValueError(f"{shown(path)} is a folder without a file to read, which must end in {ACCEPTED}{said}. "
                             f"{remedy}, or name another folder")
        if left:
            log.warning("%s: left out: %s. Only files that end in %s and lie in the folder itself are read",
                        shown(path), _told(left), ACCEPTED)
    elif not local.exists() and not local.is_symlink():
        yield str(path), hub_records(str(path), problems, allow_download=allow_download)
        return
    elif not suffix_of(local.name):
        why = _TEXT if local.suffix.lower() == ".txt" else _REMEDIES.get(local.suffix.lower())
        raise ValueError(f"{shown(path)} ends in {local.suffix or 'no suffix'!r}{f' ({why})' if why else ''}. "
                         f"Give a file that ends in {ACCEPTED}")
    elif not _can_be_read(local, problems):
        return
    for file in files:
        if (opened := opened_records(file, needs, options, problems)) is not None:
            yield opened


def check_there(path: Path | str) -> None:
    """Check that a path exists, or can be the name of a hub dataset.

    Raises:
        ValueError: it does not exist, and is not the name of a dataset; or it cannot be looked up.
    """
    local = expanded(path)
    try:
        there = local.exists() or local.is_symlink()
    except (OSError, ValueError) as error:  # a name too long, a folder without permission, a zero byte
        reason = error.strerror if isinstance(error, OSError) else "a path cannot hold a zero byte"
        name = shown(path) if len(str(path)) < 300 else f"{shown(str(path)[:100])}…{shown(str(path)[-100:])}"
        raise ValueError(f"{name} cannot be looked up: {reason}. Check the path and its permissions") from None
    if not there and not _is_hub_name(str(path)):
        raise ValueError(f"{shown(path)} does not exist. Name a file that ends in {ACCEPTED}, or a folder of such "
                         "files")


def _is_hub_name(name: str) -> bool:
    """Return whether a name that is not a local path may be sent to the hub. A mistyped local path must not be."""
    part = r"[A-Za-z0-9][\w.-]*"
    return (re.fullmatch(rf"{part}/{part}(/{part})?(:\w+)?", name) is not None
            and not name.endswith((*SUFFIXES, *PACKED)) and not Path(name.split("/")[0]).exists())


Left = dict[str, list[str]]
"""Reason → names of the files and folders that are left out for it."""


def _in_folder(folder: Path, problems: Problems, *, held_out: bool) -> tuple[list[Path], Left]:
    """Return the files of a folder to read, and everything else in it that its owner may take for data."""
    left: Left = {}
    found: list[Path] = []
    for one in sorted(folder.iterdir()):
        data = suffix_of(one.name) != ""
        if one.name.startswith("."):
            if data:
                left.setdefault("hidden, because the name begins with a dot", []).append(one.name)
        elif one.is_dir():
            if why := _why_folder_is_left(one):
                left.setdefault(why, []).append(f"{one.name}/")
        elif one.name.startswith("~$"):
            left.setdefault("the lock file of an open document", []).append(one.name)
        elif not data and one.is_symlink() and not one.exists():
            left.setdefault("a broken link: mount the share that it leads to", []).append(one.name)
        elif not data:
            left.setdefault(_REMEDIES.get(one.suffix.lower(), ""), []).append(one.name)
        elif _can_be_read(one, problems):
            found.append(one)
    found = _of_split(_without_forms(found, left), left, held_out=held_out)
    return _without_copies(found, left), left


def _without_forms(files: list[Path], left: Left) -> list[Path]:
    """Return the files without those that may hold the rows of another one in another form.

    That are a packed file beside the unpacked one, and workbooks beside files of other formats, which were probably
    exported from them. Their rows would count twice.
    """
    names = {file.name for file in files}
    tables = any(suffix_of(file.name) != WORKBOOK for file in files)
    kept = []
    for file in files:
        if file.name.lower().endswith(PACKED) and file.stem in names:
            left.setdefault(f"packed, and {shown(file.stem)} is read", []).append(file.name)
        elif tables and suffix_of(file.name) == WORKBOOK:
            left.setdefault("a workbook beside other data: to read it, name it, or put it in a folder of its own", []
                            ).append(file.name)
        else:
            kept.append(file)
    return kept


def _told(left: Left) -> str:
    parts = []
    for why, names in sorted(left.items()):
        first = ", ".join(shown(name) for name in names[:FIRST])
        parts.append(first + (f" and {len(names) - FIRST} more" if len(names) > FIRST else "")
                     + (f" ({why})" if why else ""))
    return "; ".join(parts)


def _can_be_read(file: Path, problems: Problems) -> bool:
    """Return whether a path is an ordinary file, and note a fault if not.

    Nothing else is opened. Opening a named pipe would wait until another process writes to it.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if not file.is_symlink():
            problems.add(shown(file), f"the file cannot be read: {error.strerror}",
                         "Check the path and its permissions")
        elif isinstance(error, FileNotFoundError):
            problems.add(shown(file), f"the file is a link to {shown(os.readlink(file))}, which does not exist",
                         "Mount the share that it leads to, or remove the link")
        else:
            problems.add(shown(file), f"the file is a link that cannot be followed: {error.strerror}",
                         "Put the file itself there")
        return False
    if stat.S_ISREG(mode):
        return True
    kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    problems.add(shown(file), f"this is a {kind}, not a file", "Write its content into a file, or remove it")
    return False


def _why_folder_is_left(folder: Path) -> str:
    """Return why a subfolder that may hold data is not read; "" if it holds none."""
    shut: list[OSError] = []
    seen = 0
    for at, folders, names in os.walk(folder, onerror=shut.append):
        seen += len(folders) + len(names)
        if suffix_of(at) or any(map(suffix_of, [*folders, *names])):
            return "folders are not searched: name the one with the data, or put the files together"
        if seen > _MOST_LOOKED_AT:
            return "a folder too large to search for data"
    return f"cannot be searched: {shut[0].strerror}" if shut else ""


def _of_split(files: list[Path], left: Left, *, held_out: bool) -> list[Path]:
    """Return the files without the splits of a published data set that are for the other purpose."""
    splits = {file: _split(file, files) for file in files}
    others = _TRAIN if held_out else _HELD_OUT
    if held_out and not any(split in _HELD_OUT for split in splits.values()):
        others = frozenset()
    why = "training rows, by the name" if held_out else "held-out rows, by the name; to train on them, name the file"
    for file, split in splits.items():
        if split in others:
            left.setdefault(why, []).append(file.name)
    return [file for file in files if splits[file] not in others]


def _split(file: Path, files: list[Path]) -> str | None:
    """Return the split that a file's name names; None if it names none.

    That is the whole name without the number of a part ("test-00000-of-00001"), or the last word of the name if
    another file has the same name with "train" in its place ("reviews_dev" next to "reviews_train").
    """
    stem = _stem(file)
    words = [word for word in re.split(r"[-_. ]+", stem) if word]
    while len(words) > 1 and (words[-1].isdigit() or words[-1] == "of"):
        words.pop()
    whole = "".join(words)
    if whole in _TRAIN | _HELD_OUT or not words:
        return whole
    if words[-1] in _TRAIN | _HELD_OUT and any(
            _stem(other).startswith(f"{stem[:stem.rindex(words[-1])]}train") for other in files):
        return words[-1]
    return None


def _stem(file: Path) -> str:
    return file.name[:len(file.name) - len(suffix_of(file.name))].casefold()


def _without_copies(files: list[Path], left: Left) -> list[Path]:
    """Return the files without exact copies. The rows of a copy would count twice, and ε protects only one of them."""
    sizes: dict[int, list[Path]] = {}
    for file in files:
        try:
            sizes.setdefault(file.stat().st_size, []).append(file)
        except OSError:
            sizes.setdefault(-1, []).append(file)  # it has disappeared; reading it will report that
    copies: set[Path] = set()
    for size, alike in sizes.items():
        first: dict[str, Path] = {}
        for file in sorted(alike, key=lambda one: len(one.name)) if size > 0 and len(alike) > 1 else []:
            try:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError:
                continue
            if first.setdefault(digest, file) != file:
                copies.add(file)
                left.setdefault(f"the same bytes as {shown(first[digest].name)}, which is read", []).append(file.name)
    return [file for file in files if file not in copies]
