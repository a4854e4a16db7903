"""The encoding of a text file: UTF-8, UTF-16 or UTF-32 by their mark, Windows-1252, or what its owner says."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedlora.data.packing import opened
from fedlora.data.problems import Problems
from fedlora.data.rows import place, shown

LONGEST = 16 * 1024 * 1024
"""Most bytes of a line, and most characters of a field. Anything longer is an unclosed quotation, or not text."""

_MARKS = (("utf-32-le", codecs.BOM_UTF32_LE), ("utf-32-be", codecs.BOM_UTF32_BE), ("utf-8", codecs.BOM_UTF8),
          ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE))
"""Byte-order marks. That of UTF-32 begins with that of UTF-16, so it stands first."""

_NAMES = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32-le": "UTF-32", "utf-32-be": "UTF-32",
          "cp1252": "Windows-1252 (cp1252)"}

_NO_WINDOWS_TEXT = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]"  # no characters at all
    rb"|[\xc0-\xd6\xd8-\xf6\xf8-\xff]{3}"  # three accented letters in a row
    rb"|[\x80-\x84\x86-\x94\x98-\x9f\xa1-\xff]{4}"  # four characters beyond ASCII, except blanks, dashes and dots
    rb"|[A-Za-z][\x80\x82-\x84\x86-\x89\x8b\x93-\x95\x98\x99\x9b\xa1-\xac\xae\xaf\xb1-\xb3\xb6\xb8-\xbf\xd7\xf7][A-Za-z]"
    rb"|[a-z][\x8a\x8c\x8e\x9f][a-z]")  # a sign, or a capital, between two letters
"""Bytes that text in Windows-1252 does not have, and that text in cp850, Macintosh or Cyrillic encodings often has."""

_CHUNK = 1 << 20


def name_of(encoding: str) -> str:
    """Return an encoding's name as messages show it."""
    return _NAMES.get(encoding, encoding)


def width(encoding: str) -> int:
    """Return the number of bytes in which an encoding writes a line feed."""
    return {"utf-16": 2, "utf-32": 4}.get(encoding[:6], 1)


def encoding_of(file: Path, given: str | None, problems: Problems) -> tuple[str, str] | None:
    """Find the encoding of a text file, and note a fault if it cannot be told.

    UTF-8 is only given to files that are UTF-8 throughout, or that mix it with something else: each line that is not
    UTF-8 is then a fault. Nothing is held in memory but a line.

    Args:
        file: the file.
        given: the encoding that the owner names; None if they name none.
        problems: takes the faults.

    Returns:
        The encoding, and why it was taken, for the owner ("" if that needs no word); None if it cannot be told.
    """
    with opened(file) as stream:
        start = stream.read(4096)
    marked = next((name for name, mark in _MARKS if start.startswith(mark)), None)
    if given is not None:
        return _as_given(file, given, marked, start, problems)
    if marked is not None:
        return marked, "" if marked == "utf-8" else f"by its mark as {name_of(marked)} text"
    if wide := _by_zeros(start):
        return wide, f"by its zero bytes as {name_of(wide)} text"
    if _is_utf8(file):
        return "utf-8", ""
    return _windows(file, problems)


def _as_given(file: Path, given: str, marked: str | None, start: bytes, problems: Problems) -> tuple[str, str] | None:
    if marked is not None and not marked.startswith(given):
        problems.add(shown(file), f"the file begins with the mark of {name_of(marked)}, and --encoding is {given}",
                     "Leave the option out, or name files of one encoding")
        return None
    if given in ("utf-16", "utf-32"):
        return marked or (_by_zeros(start) if given == "utf-16" else None) or f"{given}-le", ""
    also = given != "utf-8" and width(given) == 1 and marked is None and not start.isascii() and _is_utf8(file)
    return given, f"as {name_of(given)} text, although it is valid UTF-8" if also else ""


def _by_zeros(start: bytes) -> str | None:
    """Return the encoding of UTF-16 without a mark, whose first line holds a zero in every second byte."""
    for name, at, feed in (("utf-16-le", 1, b"\n\0"), ("utf-16-be", 0, b"\0\n")):
        end = start.find(feed)
        line = start[:end if end > 0 else len(start) & ~1]
        if len(line) >= 8 and len(line) % 2 == 0 and not any(line[at::2]) and all(line[1 - at::2]):
            return name
    return None


def _is_utf8(file: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with opened(file) as stream:
            while chunk := stream.read(_CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _windows(file: Path, problems: Problems) -> tuple[str, str] | None:
    """Return Windows-1252 for a file that may be text in it; UTF-8 for one that has lines of both."""
    both = False
    strange: list[int] = []
    with opened(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), start=1):
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                if _NO_WINDOWS_TEXT.search(line):
                    strange.append(number)
            else:
                both = True
    if both:
        return "utf-8", ""
    for number in strange:
        problems.add(place(str(file), number), "the line is not UTF-8, and does not look like Windows-1252 text either",
                     "Save the file as UTF-8, or say what it is, as in --encoding cp850, mac-roman, cp1250 or cp1252")
    return None if strange else ("cp1252", f"as {name_of('cp1252')} text, because it is not UTF-8")


def raw_lines(stream: BinaryIO, encoding: str, *, small: bool) -> Iterator[bytes]:
    """Yield the lines of a stream as bytes, each with its line feed. A line longer than `LONGEST` is cut short.

    Args:
        stream: the file's bytes.
        encoding: its encoding.
        small: whether no line can be longer, which makes reading faster.
    """
    unit = width(encoding)
    if unit == 1:
        yield from stream if small else iter(lambda: stream.readline(LONGEST + 1), b"")
        return
    feed = "\n".encode(encoding)
    held = bytearray()
    searched = 0
    while chunk := stream.read(_CHUNK):
        held += chunk
        begin = 0
        while (at := held.find(feed, searched)) >= 0:
            searched = at + 1
            if at % unit == 0:
                yield bytes(held[begin:at + unit])
                begin = searched = at + unit
        del held[:begin]
        searched = max(0, len(held) - unit + 1)
        if len(held) > LONGEST:
            break
    if held:
        yield bytes(held)
