"""The folder of a command: no result is overwritten, and the leftovers of a kill block no later command."""

import multiprocessing
import os
import signal

import pytest

from fedlora_server.folders import claimed_folder


def work_and_die(folder):
    with claimed_folder(folder, "test") as out:
        (out / "half").write_text("of a result")
        os.kill(os.getpid(), signal.SIGKILL)


def killed_in(folder):
    killed = multiprocessing.get_context("fork").Process(target=work_and_die, args=(folder,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL


def test_what_a_killed_command_left_is_moved_aside_and_the_same_command_works_again(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        killed_in(out)
    assert (tmp_path / "out-interrupted-1" / "half").read_text() == "of a result"
    with claimed_folder(out, "test") as folder:
        (folder / "result").write_text("whole")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["half", "half", "result"]
    with pytest.raises(ValueError, match="is not empty"), claimed_folder(out, "test"):
        pass
    assert (out / "result").read_text() == "whole"


def test_two_commands_do_not_work_in_one_folder(tmp_path):
    with claimed_folder(tmp_path / "out", "test"), pytest.raises(ValueError, match="another command works in"), \
            claimed_folder(tmp_path / "out", "test"):
        pass


def test_a_folder_in_which_nothing_is_left_is_taken_away_also_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="wrong"), claimed_folder(tmp_path / "out", "test"):
        raise ValueError("wrong")
    assert not (tmp_path / "out").exists()
