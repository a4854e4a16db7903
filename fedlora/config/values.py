"""Parsers that turn the text of an option into its value. Their errors say what was expected."""

from __future__ import annotations

import argparse
import codecs
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import registry
from fedlora.places import expanded
from fedlora.plan import check_unit

STARTS, RECIPES = "fedlora.adapters.starts", "fedlora_strategies.recipes"
SCHEDULES = "fedlora_strategies.schedules"
"""Packages whose modules are the values of options.

The second may be missing on a client's machine, so it is only looked up when a strategy is parsed."""

Choices = Sequence[str] | Callable[[], Sequence[str]]
"""The words that a value can be, or a function that returns them."""


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, *,
           open_low: bool = False) -> Callable[[str], Any]:
    """Return a parser of numbers in [low, high], or in (low, high] if `open_low`.

    Args:
        kind: int or float.
        low: the lower bound.
        high: the upper bound.
        open_low: exclude the lower bound itself.
    """

    def parse(given: str) -> Any:
        try:
            value = kind(given)
        except ValueError:
            value = math.nan
        if not (low < value <= high if open_low else low <= value <= high):
            wanted = "whole number" if kind is int else "number"
            bound = f"above {low:g}" if open_low else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"{given!r} is not a {wanted} {bound}" + (f" and at most {high:g}" if high < math.inf else ""))
        return value

    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, open_low=True)
finite = number(float, 0, 1e300, open_low=True)
probability = number(float, 0, 1, open_low=True)


def text(given: str) -> str:
    """Return the text itself, unless it is blank or begins with an unknown home directory."""
    if not given.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave the option out")
    if given.startswith("~"):
        try:
            expanded(given)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return given


MOST_WORDS = 20_000
"""Most characters of a text that `words` reads from a file."""


def words(given: str) -> str:
    """Parse a text in somebody's own words: the text itself, or "@FILE" for the text in a UTF-8 file."""
    if not given.startswith("@"):
        return text(given).strip()
    try:
        found = expanded(given[1:]).read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{given[1:]} cannot be read: {error.strerror}") from None
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise argparse.ArgumentTypeError(f"{given[1:]} cannot be read: {why}") from None
    if not 0 < len(found) <= MOST_WORDS or found.startswith("@"):
        raise argparse.ArgumentTypeError(f"{given[1:]} holds {len(found):,} characters; it must hold a text of at most "
                                         f"{MOST_WORDS:,}, which does not begin with @")
    return found


def path(given: str) -> Path:
    """Parse a path, which need not exist."""
    return Path(text(given))


def endpoint(given: str) -> str:
    """Parse a port, or a host and a port, of this machine. Without a host it is 127.0.0.1."""
    host, _, port = given.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or host != host.strip():
        raise argparse.ArgumentTypeError(f"{given!r} is not a port, or host and port, as in 9464 or 0.0.0.0:9464")
    return f"{host or '127.0.0.1'}:{int(port)}"


def command(given: str) -> str:
    """Check that a text can be split into a command and its arguments, as a shell would."""
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given!r} cannot be split into words: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("it names no command; give one, or leave the option out")
    return given


def names(given: str) -> tuple[str, ...]:
    """Split a list at its commas; blank parts are dropped."""
    return tuple(part.strip() for part in given.split(",") if part.strip())


def distinct(given: str, each: Callable[[str], Any] = str) -> tuple[Any, ...]:
    """Parse a list of at least one value, each parsed by `each`. Two equal values are an error."""
    values = tuple(map(each, names(given)))
    if not values or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{given!r} must name at least one, and none twice")
    return values


def seeds(given: str) -> tuple[int, ...]:
    """Parse a list of different whole numbers of at least 0."""
    return distinct(given, natural)


def labels(given: str) -> tuple[str, ...]:
    """Parse a list of different label names, normalised as the labels of rows are."""
    from fedlora.data.rows import normalize_label  # imported late, so that --help needs no numpy

    return distinct(given, lambda name: normalize_label(name) or name)


def start(given: str) -> str:
    """Check --init: a key of `fedlora.adapters.starts`, followed by a colon and a value if that start takes one."""
    takes = {key: registry.literals(STARTS, key, "START").get("takes") for key in registry.keys(STARTS)}
    key, colon, argument = given.partition(":")
    if key in takes and (bool(colon), bool(argument)) == (bool(takes[key]),) * 2:
        return given
    shown = ", ".join(f"{name}:{what}" if what else name for name, what in takes.items())
    reasons = {name: f"name the {what} after a colon: " for name, what in takes.items() if what}
    raise argparse.ArgumentTypeError(f"{given!r}: {reasons.get(key, 'there is no such start; ')}choose one of {shown}")


def head_start(given: str) -> str:
    """Check --init-head, which is public:FILE."""
    if given.startswith("public:") and given != "public:":
        return given
    raise argparse.ArgumentTypeError(f"{given!r}: a head can start from public rows; write public:FILE")


def method(given: str) -> tuple[str, str | None]:
    """Split a strategy from the start that may follow it: "fed-sb:weight", "my_module:MyStrategy:weight"."""
    parts = given.split(":")
    count = 1 if parts[0] in registry.keys(RECIPES) else 2
    chosen_one, init = ":".join(parts[:count]), ":".join(parts[count:]) or None
    if count == 2 and not (len(parts) > 1 and all(parts[:2])):
        raise argparse.ArgumentTypeError(f"{given!r} is not a strategy; choose from {', '.join(registry.keys(RECIPES))}"
                                         ", or name your own as module:Class")
    return chosen_one, None if init is None else start(init)


def strategy(given: str) -> str:
    """Parse one strategy. A start after a colon is an error, because the server has --init for it."""
    name, init = method(given)
    if init is not None:
        raise argparse.ArgumentTypeError(f"{given!r}: give the start with --init {init}")
    return name


def strategies(given: str) -> tuple[str, ...]:
    """Parse a list of different strategies, each with or without a start of its own."""
    for name in (found := distinct(given)):
        method(name)
    return found


def several(known: Choices, what: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of lists of known words, none twice.

    Args:
        known: the words.
        what: what one of them is called in error messages.
    """

    def parse(given: str) -> tuple[str, ...]:
        for name in (found := distinct(given)):
            if name not in chosen(known):
                raise argparse.ArgumentTypeError(f"{name!r} is not a {what}; choose from {', '.join(chosen(known))}")
        return found

    return parse


def unit(given: str) -> str:
    """Check a unit of privacy: "row" or "column:NAME"."""
    try:
        check_unit(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return given


def numbers(given: str) -> tuple[tuple[str, float], ...]:
    """Parse a list of name=number into (name, number) pairs, in the order of the names."""
    return _by_name(given, _finite, "as in beta1=0,beta2=0.99")


def _finite(given: str) -> float:
    value = float(given)
    if not math.isfinite(value):
        raise ValueError(given)
    return value


def ranks(given: str) -> tuple[tuple[str, int], ...] | str:
    """Parse --ranks: (module, rank) pairs, or a schedule of `fedlora_strategies.schedules` that changes ranks."""
    if "=" in given:
        return whole_numbers(given)
    forms = [str(form) for key in registry.keys(SCHEDULES)
             if (form := registry.literals(SCHEDULES, key, "SCHEDULE").get("form"))]
    key, colon, total = given.partition(":")
    takes = {form.partition(":")[0]: ":" in form for form in forms}
    if key in takes and takes[key] == bool(colon) and (not colon or (total.isdecimal() and int(total))):
        return given
    shown = ", ".join(sorted(forms))
    raise argparse.ArgumentTypeError(f"{given!r} is neither of the form MODULE=R, as in "
                                     "encoder.layer.0.attention.self.query=4, with R a whole number, nor one of "
                                     f"{shown}, with TOTAL a whole number")


def whole_numbers(given: str) -> tuple[tuple[str, int], ...]:
    """Parse a list of name=number into (name, whole number of at least 1) pairs, in the order of the names."""
    return _by_name(given, count, "as in NAME=4, with whole numbers of at least 1")


def _by_name(given: str, each: Callable[[str], Any], example: str) -> tuple[tuple[str, Any], ...]:
    parts = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in names(given))]
    if len(dict(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{given!r} gives two numbers for the same name; give one for each")
    try:
        if parts and all(name for name, _ in parts):
            return tuple(sorted((name, each(value)) for name, value in parts))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{given!r} is not of the form name=number, {example}")


def columns(given: str) -> Mapping[str, str]:
    """Parse a list of name=column into a mapping from a field's name to the column that holds it."""
    parts = [(name.strip(), column.strip()) for name, _, column in (part.partition("=") for part in names(given))]
    if not parts or not all(name and column for name, column in parts):
        raise argparse.ArgumentTypeError(f"{given!r} is not of the form name=column, as in text=note")
    if len(pairs := dict(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{given!r} names two columns for the same field; name one for each")
    return pairs


def label_map(given: str) -> Mapping[str, str]:
    """Parse a list of label=name into a mapping from a label of the files to the run's name for it, both normalised."""
    from fedlora.data.rows import normalize_label  # imported late, so that --help needs no numpy

    parts = [tuple(normalize_label(side) for side in part.split("=")) for part in names(given)]
    if not parts or not all(len(part) == 2 and all(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{given!r} is not of the form label=name, as in dringend=urgent")
    pairs = {str(label): str(name) for label, name in parts}
    if len(pairs) < len(parts):
        raise argparse.ArgumentTypeError(f"{given!r} gives two names for the same label; give one for each")
    return pairs


def settings(given: str) -> Mapping[str, tuple[str, ...]]:
    """Parse NAME=VALUE,VALUE,… into {option's name: texts of its values}. Whoever uses them parses the values.

    Semicolons separate values that contain commas: targets=query,value;all.
    """
    name, _, rest = given.partition("=")
    name = name.strip().removeprefix("--").replace("_", "-")
    parts = tuple(part.strip() for part in rest.split(";" if ";" in rest else ",") if part.strip())
    if not name or not parts:
        raise argparse.ArgumentTypeError(f"{given!r} is not of the form NAME=VALUE,VALUE,…, as in rank=2,8")
    if twice := [part for at, part in enumerate(parts) if part in parts[:at]]:
        raise argparse.ArgumentTypeError(f"{given!r} names the value {twice[0]} twice; name each once")
    return {name: parts}


DELIMITERS: Mapping[str, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""Words for separators, which need no quotation marks on a command line."""


def delimiter(given: str) -> str:
    """Parse the character between the fields of a table: a word of `DELIMITERS`, or the character itself."""
    found = DELIMITERS.get(given, "\t" if given == "\\t" else given)
    if len(found) != 1 or found.isalnum() or found in "\"' \r\n\0" or not (found.isprintable() or found == "\t"):
        raise argparse.ArgumentTypeError(f"{given!r} cannot separate fields; give {', '.join(DELIMITERS)}, or another "
                                         "character that is neither a letter, a digit, a blank nor a quotation mark")
    return found


def encoding(given: str) -> str:
    """Parse the name of an encoding of text, into the name by which Python knows it."""
    plain = "".join(map(chr, range(32, 127))) + "\r\n\\u0041+AGE-"
    try:
        name = codecs.lookup(given).name.replace("_", "-").removesuffix("-sig")
        wide = name.startswith(("utf-16", "utf-32"))
        known = wide or (plain.encode("ascii").decode(name) == plain and name != "idna")  # which is for host names
    except (LookupError, UnicodeError, ValueError):
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{given!r} is no encoding of text files; give utf-8, utf-16, cp1252 "
                                         "(Windows, Western Europe), cp1250 (Central Europe), cp850 (DOS), mac-roman, "
                                         "latin-1 or another one that Python knows")
    return name


def chosen(choices: Choices) -> Sequence[str]:
    """Return the words that a value can be."""
    return choices() if callable(choices) else choices


ADD_UP = (columns, label_map, numbers, whole_numbers, settings)
"""Parsers of options that can be given several times; the values are then merged."""
