"""The owner's own words about a data set's use, from policy.toml: who is responsible, for what, for how long.

They are printed on the privacy report for the one who signs it. They are never sent to a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

LONGEST = 300
"""Most characters of one statement."""


@dataclass(frozen=True)
class About:
    """Statements of the owner about one data set; None for each that policy.toml does not make.

    Attributes:
        controller: who decides why and how the data are used.
        processor: who trains on them for the controller.
        purpose: what the training is for.
        legal_basis: what permits it.
        retention: how long data, uploads and adapter are kept.
        recipient: who receives what leaves, and the adapter that is made from it.
    """

    controller: str | None = None
    processor: str | None = None
    purpose: str | None = None
    legal_basis: str | None = None
    retention: str | None = None
    recipient: str | None = None

    def __post_init__(self) -> None:
        for key, text in self.stated().items():
            if not text.strip() or not text.isprintable():
                raise ValueError(f"{key} is {text[:LONGEST]!r}; it must be one line of text")
            if len(text) > LONGEST:
                raise ValueError(f"{key} has {len(text)} characters; at most {LONGEST} fit on the report")

    def stated(self) -> dict[str, str]:
        """Return key in policy.toml → statement, of those that are made."""
        return {name.replace("_", "-"): text for name, text in asdict(self).items() if text is not None}


NOTHING = About()
"""No statement at all."""

KEYS: Mapping[str, str] = {field.name.replace("_", "-"): field.name for field in fields(About)}
"""Key in policy.toml → field of `About`."""
