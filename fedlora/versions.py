"""Which software a report speaks of."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import fedlora


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    return {name: _installed(name) for name in packages}


def environment(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of FedLoRA, these packages, Python and the operating system, as reports list them."""
    return {"fedlora": fedlora.__version__, **versions(packages), "python": platform.python_version(),
            "platform": platform.platform()}


@cache
def _installed(package: str) -> str | None:
    """Read once a process: reports are written in every round."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
