"""From a name to a strategy: a key of `recipes/`, or module:Class of whoever runs the server or the simulation.

Clients know no strategies. They are told a name, to show it, and an adapter family, which they look up in their own
package.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from fedlora import registry

from .base import FederatedLoRA
from .recipe import RECIPES, Recipe


@cache
def strategy_class(name: str) -> type[FederatedLoRA]:
    """The strategy behind --strategy.

    Args:
        name: a key of `recipes/`, or module:attribute of a subclass of `FederatedLoRA` or of a `Recipe`. The module is
            looked for in the working directory too.

    Raises:
        ValueError: there is none, its module cannot be imported, or what it names is neither.
    """
    if ":" not in name:
        module = registry.load(RECIPES, name)
        return _own(module) or _of(module.RECIPE, name)
    module_name, _, attribute = name.partition(":")
    module = _imported(name, module_name)
    found = getattr(module, attribute, None)
    if isinstance(found, Recipe):
        return _of(found, attribute)
    if not (isinstance(found, type) and issubclass(found, FederatedLoRA) and hasattr(found, "recipe")):
        what = "has no such name" if found is None else f"has a {type(found).__name__} there"
        raise ValueError(f"--strategy {name}: {module_name} {what}; name a Recipe, or a subclass of FederatedLoRA that "
                         "has a recipe")
    lacking = {"recipe", "seed"} - inspect.signature(found).parameters.keys()
    if lacking:
        raise ValueError(f"--strategy {name}: {attribute}.__init__ does not take {' and '.join(sorted(lacking))}; have "
                         "it take (plan, layout, *, min_nodes=1, recipe=None, seed=0) as FederatedLoRA does")
    return found


def _own(module: ModuleType) -> type[FederatedLoRA] | None:
    """The class of a recipe's module."""
    return next((value for value in vars(module).values() if isinstance(value, type)
                 and issubclass(value, FederatedLoRA) and value.__module__ == module.__name__), None)


def _of(recipe: Recipe, name: str) -> type[FederatedLoRA]:
    """A class for a recipe that has none."""
    return type(name, (FederatedLoRA,), {"recipe": recipe})


def _imported(name: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever its code does
        raise ValueError(f"--strategy {name}: {module_name!r} cannot be imported ({type(error).__name__}: {error}). "
                         "Run from the folder that holds it, or put that folder on PYTHONPATH; without a colon it is "
                         f"one of {', '.join(registry.keys(RECIPES))}") from error
