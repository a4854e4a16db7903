"""The file that `init` writes: every option of a command as a line to uncomment, with its help text."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import registry
from fedlora.config.arguments import Parser
from fedlora.config.option import GROUPS, PRESET, Option, flag
from fedlora.config.shared import Config
from fedlora.config.toml import NOT_IN_A_FILE, as_toml
from fedlora.config.values import chosen

WIDTH = 100


def init_parser(config: type[Config]) -> Parser:
    """Return the parser of a command's sub-command `init`."""
    made = Parser(prog=f"fedlora-{config.command} init", description="Write a TOML file with every option of fedlora-"
                  f"{config.command} and its explanation, each commented out, for --config. No file is overwritten.")
    made.add_argument("--out", type=Path, default=Path(f"{config.command}.toml"), metavar="FILE",
                      help=f"the new file [{config.command}.toml]")
    return made


def write_template(config: type[Config], argv: Sequence[str],
                   presets: Callable[[], Mapping[str, object]] = dict) -> int:
    """Run a command's sub-command `init` and return its exit code.

    Args:
        config: the command's config.
        argv: the arguments.
        presets: returns the values of the default strategy's preset, by the option's field.
    """
    parser = init_parser(config)
    out: Path = parser.parse_args(argv).out
    text = template(config, presets(), out.name)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        print(f"{parser.prog}: {out} exists already; name a new file with --out", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: --out {out} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{out} has every option of fedlora-{config.command}. Uncomment what you want to change, then:\n"
          f"  fedlora-{config.command} --config {out}")
    return 0


def template(config: type[Config], presets: Mapping[str, object], name: str) -> str:
    """Return the file's text.

    Args:
        config: the command's config.
        presets: values of the default strategy's preset, by the option's field.
        name: the file's name.
    """
    head = (f"Options of fedlora-{config.command}, for: fedlora-{config.command} --config {name}",
            "Lines that begin with a # and a letter are options with their default, or with an example if there is "
            "none. Take the # away to set one. The command line overrides this file.",
            "One file can serve all three commands: each skips the options of the others, and a table [server], "
            "[client] or [simulate] holds options of one alone.")
    parts = ["\n#\n".join(map(_comment, head))]
    fields = sorted(dataclasses.fields(config), key=lambda field: field.metadata["option"].place)
    for group in GROUPS:
        parts.append(f"# {'─' * 4} {group} {'─' * (WIDTH - len(group) - 8)}")
        parts += [_entry(config, field, presets) for field in fields
                  if field.metadata["option"].group == group and field.name not in NOT_IN_A_FILE]
    return "\n\n".join(parts) + "\n"


def _entry(config: type[Config], field: dataclasses.Field[Any], presets: Mapping[str, object]) -> str:
    option: Option = field.metadata["option"]
    unset = option.unset[config.command] if isinstance(option.unset, Mapping) else option.unset
    words = registry.keys(option.keys) if option.keys else chosen(option.choices) if option.choices else ()
    texts = [option.help, f"one of: {', '.join(words)}" if words else ""]
    default = None if field.default is dataclasses.MISSING else field.default
    if unset == PRESET and field.name in presets:
        value = as_toml(presets[field.name])
        about = "  # the preset of the default strategy with privacy"
    elif default is None or default == ():
        value = option.example or _example(field, option)
        about = f"  # an example; if not set: {unset or 'none'}"
    else:
        value = as_toml(default)
        about = f"  # if not set: {unset}" if unset else ""
    text = "; ".join(filter(None, texts))
    line = f"#{flag(field.name)} = {value}"
    if len(line + about) > WIDTH:
        text, about = f"{text}; {about.removeprefix('  # ')}", ""
    return f"{_comment(text[0].upper() + text[1:] + '.')}\n{line}{about}"


def _example(field: dataclasses.Field[Any], option: Option) -> str:
    """Return a value that the option can have, from its words or its type."""
    if option.choices:
        return as_toml(chosen(option.choices)[0])
    kind = str(field.type).partition(" ")[0]
    return {"int": "1", "float": "1.0"}.get(kind, as_toml(option.metavar or kind.upper()))


def _comment(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
