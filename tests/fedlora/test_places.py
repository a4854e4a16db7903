import argparse
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.config import values
from fedlora.data import check_there
from fedlora.places import expanded, user_folder

NOBODY = """
import pwd, runpy, sys
def unknown(uid):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
sys.argv[0] = "fedlora"
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
"""A script that runs a module as a user without an entry in the machine's user database."""


@pytest.fixture
def nobody(monkeypatch):
    """Pretend that HOME is not set and that the machine has no entry for the user."""
    def unknown(uid: int):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_place_below_a_home_that_is_not_known_is_refused_with_the_remedy(nobody, monkeypatch):
    with pytest.raises(ValueError, match=r"no home directory.* set HOME, or XDG_STATE_HOME"):
        user_folder("XDG_STATE_HOME", ".local", "state")
    for place in ("~/records.csv", "~no-such-user/records.csv"):
        for refused in (expanded, check_there):
            with pytest.raises(ValueError, match=r"~.* Write the full path"):
                refused(place)
        with pytest.raises(argparse.ArgumentTypeError, match="Write the full path"):
            values.text(place)
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/state")
    assert user_folder("XDG_STATE_HOME", ".local", "state") == Path("/srv/state/fedlora")
    monkeypatch.setenv("HOME", "/home/north")
    assert user_folder("XDG_CONFIG_HOME", ".config") == Path("/home/north/.config/fedlora")
    assert expanded("~/records.csv") == Path("/home/north/records.csv")


def test_a_server_without_a_home_keeps_anchors_while_it_runs_and_says_so(nobody, caplog):
    from fedlora_server.anchors import default_place

    assert default_place() is None and "anchors are kept while this server runs" in caplog.text


@pytest.mark.parametrize(("module", "arguments"), [
    ("fedlora_client.cli", ("budget",)),
    ("fedlora_client.cli", ("--data", "rows.csv", "--name", "north", "--yes", "--declared-size", "1300")),
    ("fedlora_client.cli", ("--data", "~/rows.csv", "--name", "north")),
    ("fedlora_server.cli", ("--labels", "a,b", "--eval-data", "~/rows.csv")),
    ("fedlora_simulations.cli", ("--data", "~/rows.csv"))], ids=["budget", "client", "data", "server", "simulate"])
def test_no_command_shows_a_traceback_where_home_and_passwd_entry_are_missing(module, arguments, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "warm,yes\ndull,no\n" * 20)
    done = subprocess.run([sys.executable, "-c", NOBODY, module, *arguments], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "home directory" in done.stderr.splitlines()[-1]
