"""What commands say on stderr."""

import sys

from fedlora.console import messages


def test_a_message_in_a_file_is_one_line_and_says_what_it_was_given(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        messages().print("[red]" + "word " * 100)
    assert (tmp_path / "log").read_text() == "[red]" + "word " * 100 + "\n"
