"""Recognition of lines of totals, which spreadsheets and databases put below the rows of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_LONGEST = 40
"""Most characters of a cell of such a line."""

_NUMBER = re.compile(r"[-+(]?[\d.,'\s\u00a0%€$£)]+")

_TOTAL = re.compile(
    r"((grand|sub|overall)[ -]?)?(totals?|sum|count|average|mean)|(zwischen|gesamt)?summe|gesamt(ergebnis|zahl)?"
    r"|insgesamt|anzahl|ergebnis|mittelwert|durchschnitt|total (général|generale|general)|totale|suma|somme|moyenne"
    r"|media|totaal|gemiddelde|aantal|razem|celkem|summa|összesen|toplam", re.IGNORECASE)

_WITH_NUMBER = re.compile(rf"({_TOTAL.pattern})\s*[:=]?\s*([\d.,' ]*\d)?( (rows?|records?|zeilen|datensätze))?\s*:?"
                          r"|n\s*[:=]\s*\d[\d.,']*", re.IGNORECASE)

_FOOTER = re.compile(r"\(?\d[\d.,]* (rows?|records?|zeilen?|lignes?|filas?|datensätze?)( (affected|selected|in set)"
                     r"|\s*\(?betroffen)?\)?\.?", re.IGNORECASE)
"""The last line of psql, sqlcmd and SQL*Plus."""


def may_be_totals(cells: Sequence[Any]) -> bool:
    """Return whether a row has one cell with a word like "Total" or "n = 20", and else only numbers and empty cells."""
    words = 0
    for cell in cells:
        if cell is None or cell == "" or (not isinstance(cell, str) and isinstance(cell, (int, float))):
            continue
        if not isinstance(cell, str) or len(cell) > _LONGEST:
            return False
        if _NUMBER.fullmatch(cell):
            continue
        words += 1
        if words > 1 or not (_WITH_NUMBER.fullmatch(cell.strip()) or _FOOTER.fullmatch(cell.strip())):
            return False
    return words == 1
