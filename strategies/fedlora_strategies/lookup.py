"""The lookup of a strategy by the name given to --strategy: a key of `recipes/`, or the user's own module:Class.

Only servers and simulations look strategies up. A client is told the strategy's name, to show it, and an adapter
family, which it looks up in its own installation.
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
    """Return the strategy's class for a value of --strategy.

    Args:
        name: A key of `recipes/`, or module:attribute of a subclass of `FederatedLoRA` or of a `Recipe`. The module is
            looked for in the working directory too.

    Raises:
        ValueError: There is no such name, its module cannot be imported, or it is neither of the two.
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
    """Return the strategy's class that a module of `recipes/` defines, if any."""
    return next((value for value in vars(module).values() if isinstance(value, type)
                 and issubclass(value, FederatedLoRA) and value.__module__ == module.__name__), None)


def _of(recipe: Recipe, name: str) -> type[FederatedLoRA]:
    """Make a strategy's class for a recipe that has none."""
    return type(name, (FederatedLoRA,), {"recipe": recipe})


def _imported(name: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ValueError(f"--strategy {name}: {module_name!r} cannot be imported ({type(error).__name__}: {error}). "
                         "Run from the folder that holds it, or put that folder on PYTHONPATH; without a colon it is "
                         f"one of {', '.join(registry.keys(RECIPES))}") from error
