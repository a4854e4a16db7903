"""Versions of FedLoRA and of the packages it runs on, for reports."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import fedlora


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each package; None for one that is not installed."""
    return {name: _installed(name) for name in packages}


def environment(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of FedLoRA, these packages, Python and the operating system, as reports list them."""
    return {"fedlora": fedlora.__version__, **versions(packages), "python": platform.python_version(),
            "platform": platform.platform()}


@cache
def _installed(package: str) -> str | None:
    """Return a package's version. It is looked up once per process, because reports are written in every round."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
