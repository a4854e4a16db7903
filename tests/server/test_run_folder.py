"""A run whose folder is on a full disk, or is removed."""

import os
import shutil
import subprocess
import threading

import pytest

from fedlora_server import checkpoint
from fedlora_server.checkpoint import patiently
from fedlora_server.observer import Observer
from tests.server.test_rounds import Federation, same

pytestmark = pytest.mark.usefixtures("one_at_a_time")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MB, and give its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder],
                                      capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class Freeing(Observer):
    """Fills the disk once round 2 has asked, and makes room when it hears that the run waits."""

    def __init__(self, disk):
        self.ballast, self.reasons = disk / "ballast", []

    def asked(self, round, attempt, names):
        if round == 2:
            with self.ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

    def held_up(self, reason):
        self.reasons.append(reason)
        self.ballast.unlink()


def test_a_full_disk_is_waited_out_and_the_run_ends_as_on_an_empty_one(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOOK_AGAIN_S", 0.01)
    whole, broken = Federation(), Federation()
    plain = whole.run(out=_folder(tmp_path / "whole"))
    watching = Freeing(small_disk)
    result = broken.run(out=_folder(small_disk / "run"), observer=watching)
    assert result.ended == "finished" and same(result.state, plain.state)
    assert watching.reasons and "No space left" in watching.reasons[0]
    kept = [(folder / checkpoint.LINES).read_text().splitlines() for folder in (tmp_path / "whole", small_disk / "run")]
    assert [len(lines) for lines in kept] == [3, 3], "no line is cut, and none there twice"
    assert same(checkpoint.load(small_disk / "run").state, plain.state)


def test_whoever_stops_a_run_that_waits_for_room_is_told_of_the_disk(small_disk, tmp_path):
    stop = threading.Event()
    said = []

    def hear(reason):
        said.append(reason)
        stop.set()

    with pytest.raises(OSError, match="No space left"):
        patiently(lambda: (small_disk / "file").write_bytes(bytes(2 << 20)), small_disk, stop, hear)
    assert len(said) == 1


def test_a_removed_folder_ends_the_run_and_is_not_made_again(tmp_path):
    class Removing(Observer):
        def finished(self, record):
            shutil.rmtree(out)

    out = _folder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"folder .*run was removed while the run lasted"):
        Federation().run(out=out, observer=Removing())
    assert not out.exists()


def _folder(path):
    path.mkdir()
    return path
