"""Paths that depend on the user: the home directory, and FedLoRA's folders in the XDG base directories.

A service or a container may run as a user without HOME and without an entry in the machine's user database. Both
functions then raise an error that says what to set.
"""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: Path | str) -> Path:
    """Return the path with a leading ~ or ~user replaced by that user's home directory.

    Raises:
        ValueError: the home directory is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r} begins with a home directory that is not known here (HOME is not set, or "
                         "there is no such user). Write the full path") from None


def user_folder(variable: str, *below_home: str) -> Path:
    """Return FedLoRA's folder in one of the user's XDG base directories. The folder is not created.

    Args:
        variable: the XDG variable that names the base directory, such as XDG_STATE_HOME.
        *below_home: the base directory relative to the home directory, for use when the variable is not set.

    Raises:
        ValueError: neither the variable nor a home directory is known.
    """
    if given := os.environ.get(variable):
        return Path(given) / "fedlora"
    try:
        return Path.home().joinpath(*below_home, "fedlora")
    except RuntimeError:
        raise ValueError(f"user {os.getuid()} has no home directory (HOME is not set, and the machine has no entry "
                         f"for this user), so there is no place for FedLoRA's files; set HOME, or {variable} and the "
                         "other XDG variables, to folders that last") from None
