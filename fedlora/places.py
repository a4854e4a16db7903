"""Places that depend on who the user is: their home, and what the XDG base directories put below it.

A service or a container may have neither HOME nor an entry among the machine's users.
"""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: Path | str) -> Path:
    """The path with a leading ~ or ~user resolved.

    Raises:
        ValueError: that home directory is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r} begins with a home directory that is not known here (no HOME is set, or there "
                         "is no such user). Write the whole path") from None


def user_folder(variable: str, *below_home: str) -> Path:
    """FedLoRA's folder of one kind.

    Args:
        variable: the XDG variable that names its parent, as in XDG_STATE_HOME.
        below_home: where the parent is if the variable is not set.

    Raises:
        ValueError: neither the variable nor a home directory tells it.
    """
    if given := os.environ.get(variable):
        return Path(given) / "fedlora"
    try:
        return Path.home().joinpath(*below_home, "fedlora")
    except RuntimeError:
        raise ValueError(f"user {os.getuid()} has no home directory (HOME is not set, nor has this machine an entry "
                         f"for it), so that there is no place for FedLoRA's files; set HOME, or {variable} and the "
                         "other XDG variables, to folders that last") from None
