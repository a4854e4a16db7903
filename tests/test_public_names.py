"""The names that other people's code may rely on are listed, and the list is kept.

`python -m tests.test_public_names > tests/public_names.txt` writes the list anew. Read its diff before you commit it: a
name that goes away or changes its meaning is a line in CHANGELOG.md (docs/versioning.md).
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("public_names.txt")

ROOTS = {"fedlora": ROOT / "fedlora", "fedlora_client": ROOT / "client/fedlora_client",
         "fedlora_server": ROOT / "server/fedlora_server", "fedlora_strategies": ROOT / "strategies/fedlora_strategies",
         "fedlora_simulations": ROOT / "simulations/fedlora_simulations",
         "fedlora_adapter": ROOT / "adapter/fedlora_adapter"}

EXTENDED = ("fedlora.adapters.family", "fedlora.adapters.leaves", "fedlora.adapters.start", "fedlora.records",
            "fedlora.registry", "fedlora.task", "fedlora.training.adjustments", "fedlora.training.optimizers",
            "fedlora_client.flower_app", "fedlora_server.flower_app", "fedlora_server.observer",
            "fedlora_server.trackers", "fedlora_strategies.recipe", "fedlora_strategies.reductions",
            "fedlora_strategies.refactorizations", "fedlora_strategies.schedules",
            "fedlora_strategies.server_optimizers", "fedlora_strategies.step")
"""Modules from which methods, trackers and Flower apps import, beside the packages that have an `__all__`."""

FOUND = ("fedlora.adapters.families", "fedlora.adapters.starts", "fedlora.tasks", "fedlora.training.adjustments",
         "fedlora.training.optimizers", "fedlora_server.trackers", "fedlora_strategies.recipes",
         "fedlora_strategies.reductions", "fedlora_strategies.refactorizations", "fedlora_strategies.schedules",
         "fedlora_strategies.server_optimizers")
"""Packages whose modules are methods. A method is public under its key, so a new one is no change of the list."""


def file_of(module: str) -> Path:
    package, *rest = module.split(".")
    path = ROOTS[package].joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(file: Path) -> str:
    package, root = next((name, root) for name, root in ROOTS.items() if file.is_relative_to(root))
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def names_of(module: str) -> tuple[str, ...]:
    """Return the public names of a module: its `__all__`, or else what it defines without an underscore."""
    defined: set[str] = set()
    for node in ast.parse(file_of(module).read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Assign(targets=[ast.Name(id="__all__")], value=listed):
                return tuple(sorted(ast.literal_eval(listed)))
            case ast.Assign(targets=targets):
                defined |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                defined.add(name)
    return tuple(sorted(name for name in defined if not name.startswith("_")))


def public_names() -> list[str]:
    """Return `module: name, name, …` for every public module, sorted by module."""
    packages = (file for root in ROOTS.values() for file in root.rglob("__init__.py") if "__all__" in file.read_text())
    modules = sorted({*EXTENDED, *(module_of(file) for file in packages)})
    return [f"{module}: {', '.join(names_of(module))}" for module in modules]


def imports_of(source: str) -> set[tuple[str, str]]:
    """Return (module, name) of every import from FedLoRA's packages in a source text."""
    return {(node.module, alias.name) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ROOTS
            for alias in node.names}


def test_the_public_names_are_those_of_the_list():
    assert LIST.read_text().splitlines() == public_names(), (
        "The public names have changed. If that is meant, run `python -m tests.test_public_names > "
        "tests/public_names.txt` and say in CHANGELOG.md what went away.")


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.py")), ids=lambda file: file.stem)
def test_the_examples_use_public_names_alone(file):
    listed = {(module, name) for line in LIST.read_text().splitlines() for module, _, names in [line.partition(": ")]
              for name in names.split(", ")}
    others = {(module, name) for module, name in imports_of(file.read_text())
              if module.rpartition(".")[0] not in FOUND or module.rpartition(".")[2].startswith("_")}
    assert others <= listed


if __name__ == "__main__":
    print("\n".join(public_names()))
