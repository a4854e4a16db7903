"""A client's files beside the ledger are whole on disk, and read back as they were written."""

import numpy as np
import pytest

from fedlora.plan import Upload
from fedlora_client.state import FolderState, MemoryState

RUN = "0123456789abcdef"


class Asked:
    """The part of a RoundPlan that the state looks at."""

    def __init__(self, round, attempt):
        self.key, self.run = (RUN, round, attempt), type("Run", (), {"run_id": RUN})


@pytest.fixture(params=["memory", "folder"])
def state(request, tmp_path):
    return MemoryState({}) if request.param == "memory" else FolderState(tmp_path / "state")


def test_an_upload_is_given_back_for_its_own_round_and_attempt_only(tmp_path):
    state = FolderState(tmp_path)
    tensors = {"a.B": np.arange(6, dtype=np.float32).reshape(2, 3)}
    state.save_upload(Upload(RUN, 3, 1, tensors, steps=4, delta=1e-5, noise_multiplier=1.0))
    again = state.stored_upload(Asked(3, 1))
    assert again.steps == 4 and again.delta == 1e-5 and again.num_examples is None
    assert again.tensors["a.B"].tobytes() == tensors["a.B"].tobytes()
    assert state.stored_upload(Asked(3, 0)) is None and state.stored_upload(Asked(2, 1)) is None


def test_only_the_latest_frozen_tensors_are_kept(state):
    assert state.frozen() == ("", {})
    for value in (1, 2):
        tensors = {"a.A": np.full((2, 2), value, np.float32)}
        state.save_frozen(str(value) * 64, tensors)
        sha256, held = state.frozen()
        assert sha256 == str(value) * 64 and np.array_equal(held["a.A"], tensors["a.A"])


def test_a_new_process_finds_what_the_old_one_left_and_nothing_unfinished_is_there(tmp_path):
    old = FolderState(tmp_path)
    old.save_upload(Upload(RUN, 1, 0, {"a.B": np.ones((1, 2), np.float32)}, steps=4))
    del old
    assert FolderState(tmp_path).stored_upload(Asked(1, 0)).steps == 4
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["upload.safetensors"]


def test_two_clients_cannot_share_a_state_folder(tmp_path):
    first = FolderState(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        FolderState(tmp_path)
    del first
    FolderState(tmp_path)


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path):
    state = FolderState(tmp_path)
    state.save_frozen("a" * 64, {"x": np.ones(3, np.float32)})
    (tmp_path / "frozen.safetensors.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*frozen\.safetensors"):
        state.save_frozen("b" * 64, {"x": np.zeros(3, np.float32)})
    assert state.frozen()[0] == "a" * 64 and not (tmp_path / "frozen.safetensors.new").exists()


def test_frozen_tensors_that_the_version_before_kept_are_held_until_newer_ones_come(tmp_path):
    state, array = FolderState(tmp_path), np.ones((2, 2), np.float32)
    state.save_frozen("1" * 64, {"a.A": array})
    former = (tmp_path / "frozen.safetensors").rename(tmp_path / "shared.safetensors")
    assert state.frozen()[0] == "1" * 64
    state.save_frozen("2" * 64, {"a.A": 2 * array})
    assert state.frozen()[0] == "2" * 64 and not former.exists()


def test_sizes_of_uploads_are_kept_for_any_later_process(tmp_path):
    state = FolderState(tmp_path)
    for round, values in ((1, 6), (2, 2)):
        state.note_size(Upload(RUN, round, 0, {"a.B": np.zeros(values, np.float32)}, steps=1))
    state.close()
    assert FolderState(tmp_path).sizes(RUN) == {(1, 0): (6, None), (2, 0): (2, None)}
    state.note_size(Upload(RUN, 3, 1, {"sum": np.zeros(5, np.uint64)}, steps=1))
    assert FolderState(tmp_path).sizes(RUN)[3, 1] == (5, 8), "a masked vector's integers have a width of their own"
    assert FolderState(tmp_path).sizes(RUN)[1, 0] == (6, None)


@pytest.mark.parametrize("name", ["secrets.json", f"{RUN}/sizes.json", f"{RUN}/said.json"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name):
    state = FolderState(tmp_path)
    (tmp_path / RUN).mkdir()
    (tmp_path / name).write_text('[["half a')
    with pytest.raises(ValueError, match=f"{name} is damaged .* restore it from a backup"):
        _ = state.secret(RUN, "north"), state.sizes(RUN), state.said(RUN)
