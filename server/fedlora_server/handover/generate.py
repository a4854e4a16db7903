"""The command fedlora-server generate: continues texts, or answers in conversations, by the adapter of a run."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Parser, faults_in_words
from fedlora.config import values as parse

from .arguments import add_device, add_model, offline_unless

if TYPE_CHECKING:  # imported late, so that --help is quick
    from .stored_run import StoredRun
    from .writing import Turns, Writer

AT_ONCE = 8
"""Prompts that are continued together unless --batch-size says otherwise."""

MOST_NEW = 128
"""Most new tokens unless --max-new-tokens says otherwise."""


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server generate",
        usage="fedlora-server generate RUN [--prompt TEXT | --prompts FILE] [options]",
        description="Continue texts by the adapter of a run after its last finished round. Without --prompt and "
        "--prompts, prompts are read from stdin, each a line: at a terminal until Ctrl-D. A single prompt's text is "
        "printed as it is; several are JSON lines of prompt and completion.",
        epilog="exit codes: 0 written; 2 wrong input, or a file cannot be read or written; 130 interrupted by Ctrl-C")
    made.add_argument("run", type=parse.path, metavar="RUN", help="the run's folder")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--prompt", type=parse.text, metavar="TEXT", help="the text to continue")
    what.add_argument("--prompts", type=parse.text, metavar="FILE", help="a .txt file with a prompt on each line; or a "
                      "file as for training, with a column prompt, text or messages (of which the last answer is "
                      "written anew)")
    made.add_argument("--out", type=parse.path, metavar="FILE", help="file for the JSON lines, which must be new "
                      "[stdout]")
    made.add_argument("--system", type=parse.text, metavar="TEXT", help="system text before each prompt, for a model "
                      "with a chat template")
    made.add_argument("--plain", action="store_true", help="continue the prompts as they are, without the model's chat "
                      "template")
    made.add_argument("--max-new-tokens", type=parse.count, default=MOST_NEW, metavar="N", help="most tokens to write "
                      f"for a prompt [{MOST_NEW}]")
    made.add_argument("--temperature", type=parse.finite, metavar="X", help="draw the tokens at random, the more "
                      "freely the higher [always the likeliest token]")
    made.add_argument("--seed", type=parse.natural, default=0, metavar="N", help="seed of the random draws [0]")
    add_model(made)
    add_device(made, f"prompts that are continued together [{AT_ONCE}]")
    return made


@faults_in_words("fedlora-server generate")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 written, 2 wrong input, 130 interrupted."""
    options = parser().parse_args(argv)
    offline_unless(options.allow_download)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        _generate(options)
    except KeyboardInterrupt:
        print("\nfedlora-server generate: interrupted", file=sys.stderr)
        return 130
    return 0


def _generate(options: argparse.Namespace) -> None:
    """Load the model, read the prompts, and write.

    Raises:
        ValueError: the run, the base model, a prompt or the file to write cannot be used.
    """
    from fedlora.tasks import task_named

    from .stored_run import stored_run

    run = stored_run(options.run)
    kind = task_named(run.plan.task)
    if kind.peft_type != "CAUSAL_LM":
        remedy = (f"fedlora-server predict {options.run} FILE labels rows" if kind.has_labels
                  else "load its adapter with the code in its README.md")
        raise ValueError(f"the run in {options.run} trained {kind.model_is}, which writes no texts; {remedy}")
    if options.out is not None and (options.out.exists() or not options.out.absolute().parent.is_dir()):
        raise ValueError(f"--out {options.out} exists; name another file, or remove it" if options.out.exists() else
                         f"--out {options.out}: there is no folder {options.out.parent}; make it, or name another one")
    given = _given(options, run)  # before the model is loaded, which takes longer
    writer = _writer(run, options)
    if given is None:
        _converse(writer)
    else:
        _write_all(writer, given, options)


def _given(options: argparse.Namespace, run: StoredRun) -> list[Turns] | None:
    """Return the prompts; None if a person types them at a terminal.

    Raises:
        ValueError: there is no prompt, or the file with them cannot be read.
    """
    if options.prompt is not None:
        return [(("user", options.prompt),)]
    if options.prompts is not None:
        return list(_prompts(options, run))
    if sys.stdin.isatty():
        return None
    found: list[Turns] = [(("user", line.rstrip("\r\n")),) for line in sys.stdin if line.strip()]
    if not found:
        raise ValueError("stdin holds no prompt; write each on a line of its own, or give --prompt TEXT")
    return found


def _writer(run: StoredRun, options: argparse.Namespace) -> Writer:
    from fedlora.training.precision import resolve_device

    from .writing import Writer

    device = resolve_device(options.device)
    adapted = run.adapted(options.model, allow_download=options.allow_download)
    writer = Writer(adapted, device=device, chat=not options.plain, system=options.system,
                    most_new=options.max_new_tokens, temperature=options.temperature, seed=options.seed)
    if writer.chat:
        print("Prompts are put into the model's chat template; --plain leaves it out.", file=sys.stderr)
    return writer


def _prompts(options: argparse.Namespace, run: StoredRun) -> Iterator[Turns]:
    """Yield the prompts of --prompts.

    Raises:
        ValueError: the file cannot be read, or holds no prompt.
    """
    from fedlora.data import ReadOptions, RowFormat, read_rows

    path = Path(options.prompts)
    if path.suffix.lower() == ".txt":
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {path} is not UTF-8; save it in that encoding") from None
        if not lines:
            raise ValueError(f"--prompts {path} holds no prompt")
        yield from ((("user", line),) for line in lines)
        return
    form = RowFormat((("messages", ("messages",)), ("text", ("prompt",)), ("text", ("text",))))
    columns = run.options.get("column")
    known = {str(name): str(column) for name, column in columns.items() if name in ("messages", "prompt", "text")
             } if isinstance(columns, Mapping) else {}
    rows = read_rows(options.prompts, run.plan.task, form, columns=known, held_out=True, options=ReadOptions(),
                     allow_download=options.allow_download)
    for row in range(len(rows)):
        if rows.messages is None:
            yield (("user", rows.texts[row]),)
            continue
        turns = rows.messages[row]
        last = max(place for place, (role, _) in enumerate(turns) if role == "assistant")
        if not last:
            raise ValueError(f"{rows.where(row)}: the conversation begins with the answer, so there is nothing to "
                             "answer; put the question before it")
        yield turns[:last]


def _write_all(writer: Writer, prompts: Sequence[Turns], options: argparse.Namespace) -> None:
    """Continue the prompts, in their order, and write each batch as it is done."""
    from fedlora.files import replace_file

    lines = []
    size = options.batch_size or AT_ONCE
    for start in range(0, len(prompts), size):
        some = prompts[start:start + size]
        for turns, text in zip(some, writer.write(some), strict=True):
            if options.prompt is not None and options.out is None:
                print(text)
                continue
            asked: object = turns[0][1] if len(turns) == 1 else [
                {"role": role, "content": content} for role, content in turns]
            line = json.dumps({"prompt": asked, "completion": text}, ensure_ascii=False)
            lines.append(line)
            if options.out is None:
                print(line, flush=True)
    if options.out is not None:
        replace_file(options.out, "".join(f"{line}\n" for line in lines).encode(), 0o666)
        print(f"{len(lines):,} {'completion is' if len(lines) == 1 else 'completions are'} in {options.out}.",
              file=sys.stderr)


def _converse(writer: Writer) -> None:
    """Ask for prompts at a terminal, and continue each by itself, until the end of input (Ctrl-D)."""
    print("Each line is a prompt of its own; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            try:
                print(writer.write([(("user", line),)])[0], flush=True)
            except ValueError as error:  # a prompt that is too long, say
                print(f"fedlora-server generate: {error}", file=sys.stderr)
