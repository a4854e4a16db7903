"""What is found, not listed: each module of a seam's package is one family, one start, one task, one tracker, …

A package's keys are its modules' names with hyphens, and their titles the first lines of their docstrings. Both are
read from the files, so that `--help` imports nothing. A server names a key; whoever looks it up finds what is installed
beside it, and nothing else: no code travels.
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
from types import ModuleType


@cache
def titles(package: str) -> Mapping[str, str]:
    """Key → title of every module of a package, by name; nothing but the package's top level is looked at.

    Args:
        package: its full name, as in "fedlora.adapters.families".
    """
    folder = _folder(package)
    return {name.replace("_", "-"): _title(folder / f"{name}.py")
            for _, name, _ in pkgutil.iter_modules([str(folder)]) if not name.startswith("_")}


def keys(package: str) -> tuple[str, ...]:
    """The keys that `load` knows, by name."""
    return tuple(titles(package))


def load(package: str, key: str) -> ModuleType:
    """The module behind a key.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if key not in titles(package):
        kind = package.rpartition(".")[2]
        raise ValueError(f"{key!r} is none of the {kind} that are installed here; choose one of "
                         f"{', '.join(keys(package))}")
    return importlib.import_module(f"{package}.{key.replace('-', '_')}")


@cache
def literals(package: str, key: str, name: str) -> Mapping[str, object]:
    """What the class that a module calls `name` says of itself in literals: attribute → value.

    Read from the file as titles are, for whoever has to know it and makes nothing. What the class inherits is not
    there.
    """
    assert key in titles(package), "a key is looked up before"
    module = ast.parse((_folder(package) / f"{key.replace('-', '_')}.py").read_text("utf-8"))
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
    """Of a key's file."""
    return hashlib.sha256((_folder(package) / f"{key.replace('-', '_')}.py").read_bytes()).hexdigest()


def _folder(package: str) -> Path:
    top, *inner = package.split(".")
    found = importlib.util.find_spec(top)
    assert found is not None and found.submodule_search_locations, f"{top} is a package"
    return Path(next(iter(found.submodule_search_locations))).joinpath(*inner)


def _title(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".")
