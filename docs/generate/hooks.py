"""The generated pages of the documentation site, made anew by each build and never committed.

    reference/commands.md   every option of every command, see `commands.py`
    reference/files.md      every source file with the first line of its docstring
    reference/api/*.md      the API, from the docstrings, one page for each package; extension points come first
    changelog.md, …         the files of that name at the top of the repository

mkdocs calls `on_config` and `on_files`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import commands_page, escaped
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedlora", "client/fedlora_client", "server/fedlora_server", "strategies/fedlora_strategies",
            "simulations/fedlora_simulations", "adapter/fedlora_adapter")
OTHERS = ("benchmarks", "examples", "tests")
"""Folders of the map of files that are in no wheel."""

TOP_LEVEL = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}

EXTENSION_POINTS = (
    "fedlora.registry", "fedlora.adapters.family", "fedlora.adapters.leaves", "fedlora.adapters.start", "fedlora.task",
    "fedlora.records", "fedlora.training.optimizers", "fedlora.training.adjustments", "fedlora.privacy.mechanisms",
    "fedlora_strategies.recipe", "fedlora_strategies.reductions", "fedlora_strategies.server_optimizers",
    "fedlora_strategies.refactorizations", "fedlora_strategies.schedules", "fedlora_server.trackers",
    "fedlora_server.observer", "fedlora_server.engine")
"""Modules that a new method is written against. They have a page of their own, and are on no other."""


def on_config(config: Any) -> Any:
    """Append the pages of the API to the navigation, under Reference."""
    [reference] = (entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"API": [{title: uri} for uri, (title, _) in _api().items()]})
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages to the site."""
    pages = {uri: text for uri, (_, text) in _api().items()}
    pages |= {"reference/commands.md": commands_page(), "reference/files.md": _files_page()}
    pages |= {uri: _moved((ROOT / name).read_text("utf-8")) for name, uri in TOP_LEVEL.items()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


# ---- the map of files ----


def _files_page() -> str:
    lines = ["# Map of files", "", "One line for each file: the first of its docstring. `ls` shows the same order."]
    for folder in PACKAGES:
        lines += _folder(ROOT / folder, level=2)
    lines += ["", "## Beside the packages", ""]
    for name in OTHERS:
        if (ROOT / name).is_dir():
            lines += _folder(ROOT / name, level=3)
    return "\n".join(lines) + "\n"


def _folder(folder: Path, level: int) -> Iterator[str]:
    sources = [file for file in sorted(folder.glob("*.py")) if not file.name.endswith("_pb2.py")]
    if not sources and not any(folder.glob("*/*.py")):
        return
    place = folder.relative_to(ROOT)
    yield from ("", f"{'#' * min(level, 4)} {place}/", "")
    if (init := folder / "__init__.py").exists() and (title := _title(init)):
        yield from (escaped(title), "")
    rows = [f"| `{file.name}` | {escaped(_title(file))} |" for file in sources if file.name != "__init__.py"]
    rows += [f"| `{file.name}` | {escaped(_comment(file))} |" for file in sorted(folder.glob("*.proto"))]
    if rows:
        yield from ("| file | what it is |", "|---|---|", *rows)
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith((".", "_")):
            yield from _folder(inner, level + 1)


def _title(file: Path) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _comment(file: Path) -> str:
    return file.read_text("utf-8").partition("\n")[0].lstrip("/ ")


# ---- the API ----


def _api() -> dict[str, tuple[str, str]]:
    """Return page → title and text."""
    pages = {"reference/api/extension-points.md": ("Extension points", _api_page(
        "Extension points", "What a new family, start, task, strategy, tracker … is written against. "
        "[Extending](../../extending.md) has a worked example of each.", EXTENSION_POINTS))}
    for package in PACKAGES:
        top = ROOT / package
        for folder in sorted({file.parent for file in top.rglob("*.py")}):
            name = ".".join(folder.relative_to(top.parent).parts)
            modules = [name, *(f"{name}.{file.stem}" for file in sorted(folder.glob("*.py"))
                               if not file.stem.startswith("_") and not file.stem.endswith("_pb2"))]
            modules = [module for module in modules if module not in EXTENSION_POINTS]
            if modules and modules != [name]:
                pages[f"reference/api/{name}.md"] = (name, _api_page(name, "", modules))
    return pages


def _api_page(title: str, about: str, modules: tuple[str, ...] | list[str]) -> str:
    lines = [f"# {title}", ""] + ([about, ""] if about else [])
    for module in modules:
        lines += [f"::: {module}", "    options:", "      show_submodules: false",
                  *([f"      members: {_own(init)}"] if (init := _init_of(module)) else []), ""]
    return "\n".join(lines)


def _init_of(module: str) -> Path | None:
    """Return the `__init__.py` behind a package's name; None for a module that is a file."""
    top, *inner = module.split(".")
    [folder] = (ROOT / package for package in PACKAGES if package.endswith(top))
    init = folder.joinpath(*inner) / "__init__.py"
    return init if init.exists() else None


def _own(init: Path) -> list[str] | str:
    """Return the names that an `__init__.py` defines: what it only imports is documented in its own module."""
    body = ast.parse(init.read_text("utf-8")).body
    names = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names += [target.id for node in body if isinstance(node, ast.Assign | ast.AnnAssign)
              for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
              if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")] or "false"


# ---- files of the top level ----


def _moved(text: str) -> str:
    """Point the links of a file of the repository's top level to the same pages as seen from docs/."""
    names = "|".join(map(re.escape, TOP_LEVEL))
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(rf"\]\(({names})([)#])", lambda match: f"]({TOP_LEVEL[match[1]]}{match[2]}", text)
