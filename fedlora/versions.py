"""Which software a report speaks of."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import fedlora


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def environment(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of FedLoRA, these packages, Python and the operating system, as reports list them."""
    return {"fedlora": fedlora.__version__, **versions(packages), "python": platform.python_version(),
            "platform": platform.platform()}
