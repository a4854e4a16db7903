"""From a path to the files that are read, and what is said of everything else that lies there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fedlora.data.formats import SUFFIXES, Record, records
from fedlora.data.parquet import hub_records
from fedlora.data.problems import FIRST, Problems
from fedlora.data.rows import shown
from fedlora.places import expanded

log = logging.getLogger(__name__)

ACCEPTED = ", ".join(SUFFIXES)

_REMEDIES = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"), "packed: unpack it"),
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), "a workbook: save its sheet as .csv in UTF-8"),
    **dict.fromkeys((".json", ".ndjson"), "not .jsonl: write one JSON object per line, and name it so")}

_TRAIN = frozenset(("train", "training"))
_HELD_OUT = frozenset(("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation", "heldout"))

_MOST_LOOKED_AT = 10_000
"""Entries of a folder's folders that are looked at for data: one may be the root of a disk."""


def sources(path: Path | str, wanted: Callable[[str], bool], problems: Problems, *, allow_download: bool = False,
            held_out: bool = False) -> Iterator[tuple[str, Iterator[Record]]]:
    """The files of a path in the order of their names, each with its rows; or a hub dataset.

    Args:
        wanted, problems: as `fedlora.data.formats.records`.
        held_out: whether rows to evaluate on are looked for, not to train on. Of a folder with files called as the
            splits of a published data set ("train", "test-00000-of-00001", "reviews_dev"), those of the other use are
            left out.

    Raises:
        ValueError: the path is neither a file or folder nor the name of a dataset, or there is nothing in it.
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
            raise ValueError(f"{shown(path)} is a folder without a file to read, which would end in {ACCEPTED}{said}. "
                             f"{remedy}, or name another folder")
        if left:
            log.warning("%s: left out: %s. Files are read that end in %s and lie in the folder itself", shown(path),
                        _told(left), ACCEPTED)
    elif not local.exists() and not local.is_symlink():
        yield str(path), hub_records(str(path), problems, allow_download=allow_download)
        return
    elif local.suffix.lower() not in SUFFIXES:
        why = _REMEDIES.get(local.suffix.lower())
        raise ValueError(f"{shown(path)} ends in {local.suffix or 'no suffix'!r}{f' ({why})' if why else ''}. "
                         f"Give a file that ends in {ACCEPTED}")
    elif not _can_be_read(local, problems):
        return
    yield from ((str(file), records(file, wanted, problems)) for file in files)


def check_there(path: Path | str) -> None:
    """Raises ValueError where `path` is neither a file or folder nor a name that the hub could know."""
    local = expanded(path)
    try:
        there = local.exists() or local.is_symlink()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered, a zero byte
        reason = error.strerror if isinstance(error, OSError) else "no path holds a zero byte"
        name = shown(path) if len(str(path)) < 300 else f"{shown(str(path)[:100])}…{shown(str(path)[-100:])}"
        raise ValueError(f"{name} cannot be looked for: {reason}. Check the path and its permissions") from None
    if not there and not _is_hub_name(str(path)):
        raise ValueError(f"{shown(path)} does not exist. Name a file that ends in {ACCEPTED}, or a folder of such "
                         "files")


def _is_hub_name(name: str) -> bool:
    """Whether a name that is no local path may be sent to the hub; a mistyped local path must not be."""
    part = r"[A-Za-z0-9][\w.-]*"
    return (re.fullmatch(rf"{part}/{part}(/{part})?(:\w+)?", name) is not None
            and not name.endswith(SUFFIXES) and not Path(name.split("/")[0]).exists())


Left = dict[str, list[str]]
"""Why → the names of what is left out for that."""


def _in_folder(folder: Path, problems: Problems, *, held_out: bool) -> tuple[list[Path], Left]:
    """The files to read, and what else there is that its owner may take for data."""
    left: Left = {}
    found: list[Path] = []
    for one in sorted(folder.iterdir()):
        data = one.suffix.lower() in SUFFIXES
        if one.name.startswith("."):
            if data:
                left.setdefault("hidden, as a dot before the name says", []).append(one.name)
        elif one.is_dir():
            if why := _why_folder_is_left(one):
                left.setdefault(why, []).append(f"{one.name}/")
        elif one.name.startswith("~$"):
            left.setdefault("the lock of a document that is open", []).append(one.name)
        elif not data and one.is_symlink() and not one.exists():
            left.setdefault("a link to where nothing is: mount the share that it leads to", []).append(one.name)
        elif not data:
            left.setdefault(_REMEDIES.get(one.suffix.lower(), ""), []).append(one.name)
        elif _can_be_read(one, problems):
            found.append(one)
    return _without_copies(_of_split(found, left, held_out=held_out), left), left


def _told(left: Left) -> str:
    parts = []
    for why, names in sorted(left.items()):
        first = ", ".join(shown(name) for name in names[:FIRST])
        parts.append(first + (f" and {len(names) - FIRST} more" if len(names) > FIRST else "")
                     + (f" ({why})" if why else ""))
    return "; ".join(parts)


def _can_be_read(file: Path, problems: Problems) -> bool:
    """Whether it is an ordinary file. Nothing else is opened: to open a named pipe waits for who writes into it."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if not file.is_symlink():
            problems.add(shown(file), f"the file cannot be read: {error.strerror}",
                         "Check the path and its permissions")
        elif isinstance(error, FileNotFoundError):
            problems.add(shown(file), f"the file is a link to {shown(os.readlink(file))}, where nothing is",
                         "Mount the share that it leads to, or take the link away")
        else:
            problems.add(shown(file), f"the file is a link that cannot be followed: {error.strerror}",
                         "Put the file itself there")
        return False
    if stat.S_ISREG(mode):
        return True
    kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    problems.add(shown(file), f"this is a {kind}, not a file", "Write what it gives into a file, or take it away")
    return False


def _why_folder_is_left(folder: Path) -> str:
    """"" where a folder in the folder holds no data, nor could."""
    shut: list[OSError] = []
    seen = 0
    for at, folders, names in os.walk(folder, onerror=shut.append):
        seen += len(folders) + len(names)
        if Path(at).suffix.lower() in SUFFIXES or any(Path(n).suffix.lower() in SUFFIXES for n in [*folders, *names]):
            return "folders are not searched: name the one with the data, or put the files together"
        if seen > _MOST_LOOKED_AT:
            return "too large a folder to look for data in"
    return f"cannot be looked into: {shut[0].strerror}" if shut else ""


def _of_split(files: list[Path], left: Left, *, held_out: bool) -> list[Path]:
    """Without the splits of a published data set that are not for this use."""
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
    """The split that a file's name says it is: the whole name, but for the number of a part; or its last word, where
    another file is called alike but for "train".
    """
    words = [word for word in re.split(r"[-_. ]+", file.stem.casefold()) if word]
    while len(words) > 1 and (words[-1].isdigit() or words[-1] == "of"):
        words.pop()
    whole = "".join(words)
    if whole in _TRAIN | _HELD_OUT or not words:
        return whole
    if words[-1] in _TRAIN | _HELD_OUT and any(
            other.stem.casefold().startswith(f"{file.stem.casefold()[:file.stem.casefold().rindex(words[-1])]}train")
            for other in files):
        return words[-1]
    return None


def _without_copies(files: list[Path], left: Left) -> list[Path]:
    """Each content once: a copy's rows would count twice, and ε is for one row."""
    sizes: dict[int, list[Path]] = {}
    for file in files:
        try:
            sizes.setdefault(file.stat().st_size, []).append(file)
        except OSError:
            sizes.setdefault(-1, []).append(file)  # gone since: reading it says so
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
