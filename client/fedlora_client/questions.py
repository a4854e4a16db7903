"""Questions at a terminal, asked again until the answer can be used."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

T = TypeVar("T")


def ask(console: Console, question: str, default: str | None, parse: Callable[[str], T]) -> T:
    """Ask until the answer can be parsed. An empty answer takes the default, if there is one.

    Args:
        console: where to ask.
        question: the question, without a colon.
        default: the text that an empty answer stands for; None to insist on an answer.
        parse: turns an answer into its value; raises ValueError or ArgumentTypeError with what was expected.

    Raises:
        ValueError: the input ended without an answer.
    """
    shown = question if default is None else f"{question} [{default}]"
    while True:
        try:
            answer = console.input(f"{shown}: ", markup=False).strip() or default
        except EOFError:
            raise ValueError("the input ended before all was answered; start the same command again") from None
        if answer is None:
            continue
        try:
            return parse(answer)
        except (ValueError, argparse.ArgumentTypeError) as error:
            console.print(f"{error}.", soft_wrap=True)
