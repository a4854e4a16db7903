"""The folder that a command leaves its results in."""

from __future__ import annotations

import itertools
import time
from pathlib import Path


def claim_folder(out: Path | None, name: str) -> Path:
    """--out, or runs/<time>-<name>, made and empty.

    Raises:
        ValueError: it is not empty, or cannot be made.
    """
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for number in itertools.count(1):
        folder = out or Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            taken = any(folder.iterdir())
        except OSError as error:
            if out is None and isinstance(error, FileExistsError):
                continue  # another command was given in the same second
            raise ValueError(f"--out {folder} cannot be used: {error.strerror}; name another folder") from None
        if taken:
            raise ValueError(f"--out {folder} is not empty; name another folder, so that no earlier result is lost")
        return folder
    raise AssertionError
