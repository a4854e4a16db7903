"""TOML files and other tables of options, turned into command-line arguments.

One file can drive all three commands: a command skips the keys of other commands. A key that no command has is an
error. The server's `seed` is also the only seed of a simulation, unless `seeds` is given.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.commands import CONFIGS, keys, not_an_option
from fedlora.config.option import flag, options_of
from fedlora.config.shared import Config
from fedlora.config.values import settings

NOT_IN_A_FILE = ("config", "resume")
"""Options that a file cannot hold."""


def file_arguments(path: Path, config: type[Config]) -> list[str]:
    """Return a file's values as command-line arguments, so that the same code checks files and flags.

    Args:
        path: the TOML file.
        config: the command's config.

    Raises:
        ValueError: the file cannot be read, is not TOML, or has a key that no command knows.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        both = all(re.search(rf"(?m)^\s*{start}", text) for start in (r"server\s*=", r"\[server\]"))
        hint = "; next to a table [server], the client's option `server` belongs under [client]" if both else ""
        raise ValueError(f"--config {path} is not TOML: {error}{hint}") from None
    values = _of(table, config)
    if "config" in values:
        raise ValueError(f"--config {path}: 'config' cannot name another file")
    if "resume" in values:
        raise ValueError(f"--config {path}: 'resume' cannot stand in a file, because the resumed run brings its own "
                         "options; give --resume on the command line")
    return arguments(values, config, f"--config {path}")


def _of(table: dict[str, Any], config: type[Config]) -> dict[str, Any]:
    """Return a file's values for one command: its own table over the top level, without keys of other commands."""
    own = table.pop(config.command, {})
    for other in CONFIGS.keys() - {config.command}:
        table.pop(other, None) if isinstance(table.get(other), dict) else None
    if not isinstance(own, dict):  # `server = "host:port"` is the client's flag, not a table
        table[config.command], own = own, {}
    here = keys(config)
    others = {key for kind in CONFIGS.values() for key in keys(kind)} - set(here)
    values = {key: value for key, value in table.items() if key.replace("_", "-") not in others} | own
    if "seeds" in here and "seed" not in here and "seed" in table:
        values = {"seeds": table["seed"]} | values
    return values


def arguments(values: Mapping[str, Any], config: type[Config], source: str) -> list[str]:
    """Return keys and values as command-line arguments.

    Args:
        values: option → value. Lists and mappings are joined with commas.
        config: the command's config.
        source: where the values come from, for error messages.

    Raises:
        ValueError: a key is not an option of the command, or its value cannot be written on a command line.
    """
    here = {flag(name): option for name, option in options_of(config).items()}
    given: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in here:
            raise ValueError(f"{source}: "
                             + not_an_option(name, f"fedlora-{config.command}", here, repr(key), repr))
        if here[name].parse is None:
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {key} must be true or false, not {value!r}")
            given.append(f"--{name}" if value else f"--no-{name}")
        elif here[name].parse is settings and isinstance(value, dict):
            given += [f"--{name}={one}={_listed(found)}" for one, found in value.items()]
        else:
            if isinstance(value, dict):
                value = ",".join(f"{k}={v}" for k, v in value.items())
            elif isinstance(value, list | tuple) and all(isinstance(item, list | tuple) for item in value) and value:
                value = ",".join(f"{k}={v}" for k, v in value)
            elif isinstance(value, list):
                if split := [item for item in value if "," in str(item)]:
                    raise ValueError(f"{source}: {key} holds {split[0]!r}, and an item must not contain a comma")
                value = ",".join(map(str, value))
            given.append(f"--{name}={value}")
    return given


def _listed(value: object) -> str:
    """Return the values of an option that is swept as `fedlora.config.values.settings` reads them."""
    values = value if isinstance(value, list) else [value]
    found = [str(one).lower() if isinstance(one, bool) else ",".join(map(str, one)) if isinstance(one, list)
             else str(one) for one in values]
    return "".join(f"{one};" for one in found) if any("," in one for one in found) else ",".join(found)


def as_toml(value: object) -> str:
    """Return a value as it stands in a TOML file: a text, number, truth value, path, list or mapping."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{as_toml(key)} = {as_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return repr(value)
