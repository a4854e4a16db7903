"""What a client keeps about a run is on the disk, whole, and read back as it was written."""

import numpy as np
import pytest

from fedlora.plan import Upload
from fedlora.privacy import Spend
from fedlora_client.state import Account, FolderState, MemoryState

RUN = "0123456789abcdef"


def account(**changes):
    return Account(**{"plan_sha256": "a" * 64, "sampling_rate": 0.05, "noise_multiplier": 1.0, "delta": 1e-5,
                      "clip_norm": 0.2} | changes)


class Order:
    """The part of a RoundPlan that the state looks at."""

    def __init__(self, round, attempt):
        self.key, self.run = (RUN, round, attempt), type("Run", (), {"run_id": RUN})


@pytest.fixture(params=["memory", "folder"])
def state(request, tmp_path):
    return MemoryState({}) if request.param == "memory" else FolderState(tmp_path / "state")


def test_an_account_is_read_back_as_it_was_saved(state):
    assert state.account(RUN) is None
    spent = account().charged(1, 0, 4).charged(2, 1, 4)
    state.save_account(RUN, spent)
    assert state.account(RUN) == spent
    assert spent.started == ((1, 0), (2, 1))
    assert spent.history == (Spend(1.0, 0.05, 8),)


def test_an_upload_is_given_back_for_its_own_round_and_attempt_only(state):
    tensors = {"a.B": np.arange(6, dtype=np.float32).reshape(2, 3)}
    state.save_upload(Upload(RUN, 3, 1, tensors, steps=4, delta=1e-5, noise_multiplier=1.0))
    again = state.stored_upload(Order(3, 1))
    assert again.steps == 4 and again.delta == 1e-5 and again.num_examples is None
    assert again.tensors["a.B"].tobytes() == tensors["a.B"].tobytes()
    assert state.stored_upload(Order(3, 0)) is None and state.stored_upload(Order(2, 1)) is None


def test_only_the_latest_shared_tensors_are_kept(state):
    first, second = ({"a.A": np.full((2, 2), value, np.float32)} for value in (1, 2))
    state.save_shared("1" * 64, first)
    assert np.array_equal(state.shared("1" * 64)["a.A"], first["a.A"])
    state.save_shared("2" * 64, second)
    assert state.shared("1" * 64) is None
    assert np.array_equal(state.shared("2" * 64)["a.A"], second["a.A"])


def test_a_new_process_finds_what_the_old_one_left(tmp_path):
    old = FolderState(tmp_path)
    old.save_account(RUN, account().charged(1, 0, 4))
    del old
    assert FolderState(tmp_path).account(RUN).started == ((1, 0),)


def test_nothing_unfinished_is_left_behind(tmp_path):
    state = FolderState(tmp_path)
    state.save_account(RUN, account())
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["account.json"]


def test_a_damaged_account_is_an_error_and_not_a_fresh_budget(tmp_path):
    state = FolderState(tmp_path)
    state.save_account(RUN, account())
    (tmp_path / RUN / "account.json").write_text('{"plan_sha256": ')
    with pytest.raises(ValueError, match="damaged"):
        state.account(RUN)


def test_two_clients_cannot_share_a_state_folder(tmp_path):
    first = FolderState(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        FolderState(tmp_path)
    del first
    FolderState(tmp_path)


def test_epsilon_without_privacy_is_infinite_once_something_was_sent():
    open_account = account(noise_multiplier=None, delta=None)
    assert open_account.epsilon() == 0.0
    assert open_account.charged(1, 0, 4).epsilon() == float("inf")
