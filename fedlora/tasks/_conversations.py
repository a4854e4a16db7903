"""A conversation as its chat template writes it, and which of the characters are the assistant's own.

A template is a program: it may write a system text of its own, drop the reasoning of earlier turns, or end only the
last turn. So where a turn's content stands is not assumed but seen, by writing the conversation again with a mark in
place of that content: what differs is the content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedlora.data.rows import Message

Render = Callable[[Sequence[Message], bool], str]
"""(turns, whether the assistant is to answer) → text."""


def written(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and [start, stop) of each assistant turn with the end mark that the template gives it there.

    Args:
        where: file and line.

    Raises:
        ValueError: the template fails, or writes what the assistant said otherwise than it was said.
    """
    def render(turns: Sequence[Message], answering: bool) -> str:
        try:
            return tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in turns],
                                                 tokenize=False, add_generation_prompt=answering)
        except Exception as error:  # its message may quote the conversation
            raise ValueError(f"{where}: the tokenizer's chat template cannot write this conversation "
                             f"({type(error).__name__}). Check the order of roles that the model's chat template "
                             "takes") from None

    text = render(messages, False)
    spans = [_span(render, text, messages, turn, tokenizer.eos_token, where)
             for turn, (role, _) in enumerate(messages) if role == "assistant"]
    return text, [span for span in spans if span is not None]


def _span(render: Render, text: str, messages: Sequence[Message], turn: int, end: str,
          where: str) -> tuple[int, int] | None:
    """Where one turn stands in the text; None where the template leaves it out."""
    mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)  # of no script
    marked = [*messages[:turn], ("assistant", mark), *messages[turn + 1:]]
    start, stop = _difference(text, render(marked, False))
    if start == len(text):
        return None
    said = _dense(messages[turn][1])
    if _dense(text[start:stop]) not in said:
        raise ValueError(f"{where}: the tokenizer's chat template writes turn {turn + 1} otherwise than it was said, "
                         "and the assistant is to learn nothing but its own words. Give prompt and completion instead "
                         "of messages")
    return _begin(render, text, messages[:turn], start, stop, said), _end(render, text, messages, turn, mark, stop, end)


def _begin(render: Render, text: str, before: Sequence[Message], start: int, stop: int, said: str) -> int:
    """Where the assistant is to answer, if nothing that it did not say comes after that; else where its content is."""
    prompt = render(before, True) if before else ""
    if before and text.startswith(prompt) and _dense(text[len(prompt):stop]) in said:
        return len(prompt)
    return start - text[:start].endswith(" ")  # which is part of the first token


def _end(render: Render, text: str, messages: Sequence[Message], turn: int, mark: str, stop: int, end: str) -> int:
    """Behind the end mark that stands after the content, as it does after a last turn's; some end that alone."""
    until = render(messages[:turn + 1], False)
    for whole in (until, until.removesuffix(end)):
        if len(whole) >= stop and text.startswith(whole):
            return len(whole)
    after = render([*messages[:turn], ("assistant", mark)], False).rpartition(mark)[2]
    return stop + next(len(tail) for tail in (after, after.removesuffix(end), "") if text.startswith(tail, stop))


def _difference(text: str, other: str) -> tuple[int, int]:
    """[start, stop) of what stands in the text where another has something else."""
    start = _common(text, other)
    return start, len(text) - _common(text[start:][::-1], other[start:][::-1])


def _common(text: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (one, another) in enumerate(zip(text, other, strict=False)) if one != another),
                min(len(text), len(other)))


def _dense(text: str) -> str:
    """Without white space, of which templates take away and add some."""
    return "".join(text.split())
