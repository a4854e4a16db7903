"""Lookup of extensions by name: each module of a registered package is one family, one start, one task, one tracker, …

A key is a module's name with hyphens in place of underscores. Its title is the first line of the module's docstring.
Both are read from the files without importing them, so that `--help` stays fast. A server sends only a key. Whoever
looks it up finds only what is installed on its own machine: no code travels.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType

_PARSING = Lock()
"""Held while a file is parsed. In CPython 3.11 two threads that make syntax trees at once can fail."""


@cache
def titles(package: str) -> Mapping[str, str]:
    """Return the title of every public module directly in a package, by key.

    Args:
        package: its full name, as in "fedlora.adapters.families".
    """
    folder = _folder(package)
    return {name.replace("_", "-"): _title(folder / f"{name}.py")
            for _, name, _ in pkgutil.iter_modules([str(folder)]) if not name.startswith("_")}


def keys(package: str) -> tuple[str, ...]:
    """Return the keys of a package's modules, in the order of their names."""
    return tuple(titles(package))


def load(package: str, key: str) -> ModuleType:
    """Import and return the module of a key.

    Raises:
        ValueError: no module has this key. The message lists the keys that exist.
    """
    if key not in titles(package):
        kind = package.rpartition(".")[2]
        raise ValueError(f"{key!r} is not among the {kind} installed here; choose one of {', '.join(keys(package))}")
    return importlib.import_module(f"{package}.{key.replace('-', '_')}")


@cache
def literals(package: str, key: str, name: str) -> Mapping[str, object]:
    """Return the class attributes that are written as literals in a module's registered class.

    They are read from the file without importing it, for callers that need a fact about the class but no instance.
    Inherited attributes are not included.

    Args:
        package: the package's full name.
        key: a key of `keys(package)`.
        name: the module's variable that holds the class, such as "TASK".

    Returns:
        Attribute → value; empty if `name` is not assigned a class of the module.
    """
    assert key in titles(package), "callers check the key first"
    module = _parsed(_folder(package) / f"{key.replace('-', '_')}.py")
    called = _assigned(module.body).get(name)
    found = [node for node in module.body if isinstance(node, ast.ClassDef)
             and isinstance(called, ast.Name) and node.name == called.id]
    return {attribute: value.value for node in found for attribute, value in _assigned(node.body).items()
            if isinstance(value, ast.Constant)}


def _assigned(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
            node, ast.AnnAssign) else []
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        found |= {target.id: value for target in targets if isinstance(target, ast.Name) and value is not None}
    return found


@cache
def source_sha256(package: str, key: str) -> str:
    """Return the SHA-256 of the source file behind a key."""
    return hashlib.sha256((_folder(package) / f"{key.replace('-', '_')}.py").read_bytes()).hexdigest()


def _folder(package: str) -> Path:
    top, *inner = package.split(".")
    found = importlib.util.find_spec(top)
    assert found is not None and found.submodule_search_locations, f"{top} is a package"
    return Path(next(iter(found.submodule_search_locations))).joinpath(*inner)


def _parsed(file: Path) -> ast.Module:
    with _PARSING:
        return ast.parse(file.read_text("utf-8"))


def _title(file: Path) -> str:
    text = ast.get_docstring(_parsed(file)) or ""
    return text.partition("\n")[0].rstrip(".")
