"""Conversations as a chat template writes them, and the parts of the text that the assistant said.

A template is a program. It may write a system text of its own, drop the reasoning of earlier turns, or end only the
last turn. So the place of a turn's content in the text is not assumed. It is found by writing the conversation again
with a mark in place of that content: where the two texts differ, the content is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedlora.data.rows import Message

Render = Callable[[Sequence[Message], bool], str]
"""(turns, whether to add the prompt for the assistant's answer) → text."""


def written(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
    """Write a conversation with the tokenizer's chat template, and find the assistant's turns in the text.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation.
        where: file and line, for error messages.

    Returns:
        The text, and [start, stop) of each assistant turn in it, with the end mark that the template puts there.

    Raises:
        ValueError: the template fails, or changes what the assistant said.
    """
    def render(turns: Sequence[Message], answering: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in turns],
                                                     tokenize=False, add_generation_prompt=answering))
        except Exception as error:  # not chained: its message may quote the conversation
            raise ValueError(f"{where}: the tokenizer's chat template cannot write this conversation "
                             f"({type(error).__name__}). Check which order of roles the model's chat template "
                             "accepts") from None

    text = render(messages, False)
    spans = [_span(render, text, messages, turn, tokenizer.eos_token, where)
             for turn, (role, _) in enumerate(messages) if role == "assistant"]
    return text, [span for span in spans if span is not None]


def _span(render: Render, text: str, messages: Sequence[Message], turn: int, end: str,
          where: str) -> tuple[int, int] | None:
    """Return where one turn is in the text, [start, stop); None if the template leaves it out."""
    # a character of Unicode's private use area that does not occur in the text
    mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
    marked = [*messages[:turn], ("assistant", mark), *messages[turn + 1:]]
    start, stop = _difference(text, render(marked, False))
    if start == len(text):
        return None
    said = _dense(messages[turn][1])
    if _dense(text[start:stop]) not in said:
        raise ValueError(f"{where}: the tokenizer's chat template changes the words of turn {turn + 1}, but the model "
                         "must learn nothing except the assistant's own words. Give prompt and completion instead of "
                         "messages")
    return _begin(render, text, messages[:turn], start, stop, said), _end(render, text, messages, turn, mark, stop, end)


def _begin(render: Render, text: str, before: Sequence[Message], start: int, stop: int, said: str) -> int:
    """Return where the assistant's turn begins in the text.

    That is right after the template's prompt for an answer, if only the assistant's words follow it; else where the
    turn's content begins.
    """
    prompt = render(before, True) if before else ""
    if before and text.startswith(prompt) and _dense(text[len(prompt):stop]) in said:
        return len(prompt)
    return start - text[:start].endswith(" ")  # a blank before the content is part of its first token


def _end(render: Render, text: str, messages: Sequence[Message], turn: int, mark: str, stop: int, end: str) -> int:
    """Return where the assistant's turn ends in the text, including the template's end mark if it is there.

    The end mark is known from how the template ends a last turn; some templates end only that one.
    """
    until = render(messages[:turn + 1], False)
    for whole in (until, until.removesuffix(end)):
        if len(whole) >= stop and text.startswith(whole):
            return len(whole)
    after = render([*messages[:turn], ("assistant", mark)], False).rpartition(mark)[2]
    return stop + next(len(tail) for tail in (after, after.removesuffix(end), "") if text.startswith(tail, stop))


def _difference(text: str, other: str) -> tuple[int, int]:
    """Return [start, stop) of the part of a text in which it differs from another."""
    start = _common(text, other)
    return start, len(text) - _common(text[start:][::-1], other[start:][::-1])


def _common(text: str, other: str) -> int:
    """Return the number of characters that two texts have in common at the beginning."""
    return next((i for i, (one, another) in enumerate(zip(text, other, strict=False)) if one != another),
                min(len(text), len(other)))


def _dense(text: str) -> str:
    """Return a text without white space, of which templates remove and add some."""
    return "".join(text.split())
