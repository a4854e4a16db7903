"""What the owner of data files says about them, where the files leave it open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReadOptions:
    """How data files are to be read.

    Attributes:
        delimiter: the character between the fields of a .csv or .tsv file; None to find it in the file's first line.
        encoding: the encoding of text files; None to find it in the file: UTF-8, UTF-16 or UTF-32 by their mark, or
            Windows-1252.
        sheet: name of the sheet of a workbook; None for the only one with the needed columns, or else the first.
        label_map: normalised label of the files → the run's name for it.
        skip_incomplete: leave out rows without a text, a label or an answer. Otherwise a row without a text is a fault.
    """

    delimiter: str | None = None
    encoding: str | None = None
    sheet: str | None = None
    label_map: Mapping[str, str] = field(default_factory=dict)
    skip_incomplete: bool = False
