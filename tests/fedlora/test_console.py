"""Console messages on stderr: a slow or absent reader never blocks a command."""

import os
import pty
import re
import select
import sys
import time

import pytest

from fedlora.console import MOST_WAITING, QueuedLines, messages, stderr_that_never_blocks


def test_a_message_in_a_file_is_one_line_and_says_what_it_was_given(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        messages().print("[red]" + "word " * 100)
    assert (tmp_path / "log").read_text() == "[red]" + "word " * 100 + "\n"


def test_a_pipe_that_nobody_reads_holds_nobody_up_and_the_reader_hears_how_much_was_left_out():
    reads, writes = os.pipe()
    with open(writes, "w") as pipe:
        lines = QueuedLines(pipe)
        began = time.monotonic()
        for number in range(100_000):
            print(f"line {number:06}", "x" * 50, file=lines)
        lines.end(0.1)
        assert time.monotonic() - began < 20, "100,000 lines of 60 characters are 6 MB, a pipe takes 64 kB"
        heard = b""
        while len(chunk := os.read(reads, 1 << 16)) and b"were left out" not in heard:
            heard += chunk
            if heard.endswith(b")\n"):
                break
    os.close(reads)
    said = heard.decode().splitlines()
    whole = [line for line in said if line.startswith("line ")]
    assert whole == sorted(whole) and MOST_WAITING < len(heard) < 3 * MOST_WAITING
    left_out = re.fullmatch(r"\(([\d,]+) lines were left out because nothing read this output\)", said[-1])[1]
    assert len(whole) + int(left_out.replace(",", "")) == 100_000 and {len(line) for line in whole} == {62}


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
@pytest.mark.parametrize("before", ["", "line\n" * 10], ids=["frames alone", "after lines"])
def test_of_what_never_ends_a_line_no_more_waits_either_and_it_goes_on_once_it_is_read(before, opened):
    reads, writes = opened()
    with open(writes, "w") as target:
        lines = QueuedLines(target)
        for _ in range(MOST_WAITING // 10 if before else 0):
            lines.write(before)
        for number in range(100_000):  # 6 MB
            lines.write(f"\rframe {number:06} " + "x" * 47)
        heard = b""
        while select.select([reads], [], [], 0.5)[0]:
            heard += os.read(reads, 1 << 16)
        assert MOST_WAITING < len(heard) < 3 * MOST_WAITING
        lines.write("\rthe last frame")
        lines.end(2)
        assert os.read(reads, 100) == b"\rthe last frame"
    os.close(reads)


def test_what_was_said_before_a_command_ends_is_all_there(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        with stderr_that_never_blocks():
            for number in range(1000):
                messages().print(number)
        assert sys.stderr is log
    assert (tmp_path / "log").read_text() == "".join(f"{number}\n" for number in range(1000))
