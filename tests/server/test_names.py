"""Once a client was ready, its name is its own for the run: whoever joins under it must show the name's secret."""

import json
import os
import stat

import pytest

from fedlora.plan import Proposal, Refused
from fedlora_client.connection import Connection
from fedlora_client.state import FolderState
from fedlora_server.cli import main
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.names import Names, file_of
from tests.federation import plan_of

RUN = plan_of("ffa-lora")
OWN, OTHER = b"o" * 32, b"x" * 32
NAMES = ("north", "ärzte/../ haus", "%s")


@pytest.fixture
def listen(tmp_path):
    """Return a function that starts a server of the run, in place of the one before."""
    running = []

    def listen(**options):
        for engine in running:
            engine.close("another one takes over")
        running.append(GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", names=tmp_path / "names",
                                  **options))
        return running[-1]

    yield listen
    for engine in running:
        engine.close("the test is over")


def client(engine, state=None, name="north", ready=True):
    connection = Connection(engine.address, name, private=False, connect_timeout_s=10, secrets=state)
    connection.join()
    if ready:
        connection.ready()
        while name not in [member.name for member in engine.members() if member.connected and member.ready_at]:
            engine.wait([], 0.02)
    return connection


def leave(engine, connection):
    connection.leave()
    while any(member.name == connection.name and member.connected for member in engine.members()):
        engine.wait([], 0.02)


def test_a_name_that_was_ready_is_refused_to_who_does_not_show_its_secret_and_given_to_who_does(listen, tmp_path):
    engine, state = listen(), FolderState(tmp_path / "state")
    leave(engine, client(engine, state))
    stranger = FolderState(tmp_path / "stranger")
    stranger.save_secret(RUN.run_id, "north", OTHER)
    for kept in (None, stranger):
        with pytest.raises(Refused, match=r"--state folder.*fedlora-server forget north --out") as refused:
            client(engine, kept)
        assert refused.value.refusal.code == "name-in-use"
    state.close()
    leave(engine, client(engine, FolderState(tmp_path / "state")))


def test_the_same_process_has_its_name_back_without_anything_on_the_disk(listen):
    engine = listen()
    north = client(engine)
    for session in list(engine._sessions):
        session._context.cancel()
    while not (engine.members()[0].connected and engine.get_node_ids()):
        engine.wait([], 0.02)
    north.leave()


def test_a_secret_is_shown_to_no_server_of_another_run(listen, tmp_path):
    engine, state = listen(), FolderState(tmp_path / "state")
    leave(engine, client(engine, state))
    others = GrpcEngine("127.0.0.1:0", Proposal(plan_of("ffa-lora", run_id="b" * 16)), tmp_path / "others")
    leave(others, client(others))
    with pytest.raises(Refused, match="shows no secret of it"):
        client(others, state)
    others.close("the test is over")


def test_whoever_shows_the_secret_takes_over_a_stream_that_still_stands_and_who_had_it_is_told(listen, tmp_path):
    engine, state = listen(), FolderState(tmp_path / "state")
    before = client(engine, state)
    again = client(engine, state)
    with pytest.raises(Refused, match="another process"):
        before.next_request()
    while not engine.get_node_ids():
        engine.wait([], 0.02)
    with pytest.raises(Refused, match="is connected"):
        client(engine)
    leave(engine, again)


def test_a_process_that_comes_back_keeps_the_secret_that_it_has(listen, tmp_path):
    """So a crash between a Welcome and the next Ready locks no client out."""
    engine, state = listen(), FolderState(tmp_path / "state")
    north = client(engine, state)
    secret = state.secret(RUN.run_id, "north")
    [session] = engine._sessions
    session._context.cancel()
    while not any(other is not session and other.is_ready for other in list(engine._sessions)):
        engine.wait([], 0.02)
    assert secret and state.secret(RUN.run_id, "north") == secret
    leave(engine, north)


def test_a_name_that_never_was_ready_is_nobodys(listen):
    engine = listen()
    leave(engine, client(engine, ready=False))
    assert engine.members() == []
    leave(engine, client(engine))


def test_a_server_that_takes_the_run_up_again_knows_whose_a_name_is(listen, tmp_path):
    engine, state = listen(), FolderState(tmp_path / "state")
    leave(engine, client(engine, state))
    assert not (tmp_path / "names").exists(), "nothing is written before the run begins"
    engine.keep_names()
    leave(engine, client(engine, name="south"))
    engine = listen()
    with pytest.raises(Refused, match="shows no secret of it"):
        client(engine)
    with pytest.raises(Refused, match="'south'"):
        client(engine, name="south")
    leave(engine, client(engine, state))  # the server now has another port


def test_a_forgotten_name_is_free_at_once_and_stays_the_next_ones(listen, tmp_path, capsys):
    engine = listen()
    engine.keep_names()
    leave(engine, client(engine))
    with pytest.raises(Refused):
        client(engine)
    assert main(["forget", "north", "--out", str(tmp_path)]) == 0
    state = FolderState(tmp_path / "state")
    leave(engine, client(engine, state))
    with pytest.raises(Refused):
        client(engine)
    leave(engine, client(engine, state))


def test_forget_says_which_names_are_taken(tmp_path, capsys):
    names = Names(tmp_path / "names")
    names.begin()
    names.keep("north", OWN)
    assert main(["forget", "nroth", "--out", str(tmp_path)]) == 2
    assert "'nroth'" in (said := capsys.readouterr().err) and "Taken names: north" in said
    assert main(["forget", "north", "--out", str(tmp_path / "elsewhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_folder_that_is_away_for_a_moment_frees_no_name(tmp_path):
    names = Names(tmp_path / "names")
    names.begin()
    names.keep("north", OWN)
    (tmp_path / "names").rename(tmp_path / "away")
    assert not names.may_have("north", OTHER)
    (tmp_path / "away").rename(tmp_path / "names")
    assert not names.may_have("north", OTHER) and names.may_have("north", OWN)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_holds_no_secret_and_only_its_owner_reads_it(tmp_path, name):
    names = Names(tmp_path / "names")
    names.begin()
    names.keep(name, OWN)
    [path] = (tmp_path / "names").iterdir()
    assert path == file_of(tmp_path / "names", name) and stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert json.loads(content)["name"] == name and OWN.hex() not in content and OWN.decode() not in content
    again = Names(tmp_path / "names")
    assert again.may_have(name, OWN) and not again.may_have(name, OTHER) and not again.may_have(name, b"")
    again.forget(name)
    assert again.may_have(name, OTHER) and not list((tmp_path / "names").iterdir())


def test_a_name_that_cannot_be_written_holds_as_long_as_the_server(tmp_path, caplog):
    (tmp_path / "names").write_text("a file where a folder should be")
    names = Names(tmp_path / "names")
    names.begin()
    names.keep("north", OWN)
    assert names.may_have("north", OWN) and not names.may_have("north", OTHER)
    assert "cannot be written" in caplog.text


def test_a_name_whose_file_cannot_be_removed_is_free_as_long_as_the_server_lives(tmp_path, caplog):
    names = Names(tmp_path / "names")
    names.begin()
    names.keep("north", OWN)
    path = file_of(tmp_path / "names", "north")
    path.unlink()
    path.mkdir()
    names.forget("north")
    assert names.may_have("north", OTHER) and "cannot be changed" in caplog.text


def test_a_client_keeps_the_secret_of_each_run_and_name_for_itself(tmp_path):
    state = FolderState(tmp_path)
    state.save_secret("a" * 16, "north", OTHER)
    state.save_secret("a" * 16, "north", OWN)
    state.save_secret("b" * 16, "north", OTHER)
    assert state.secret("a" * 16, "north") == OWN and state.secret("b" * 16, "north") == OTHER
    assert state.secret("a" * 16, "south") == state.secret("c" * 16, "north") == b""
    assert stat.S_IMODE(os.stat(tmp_path / "secrets.json").st_mode) == 0o600
    for number in range(300):
        state.save_secret(f"{number:016}", "south", OTHER)
    assert len(state._secrets()) == 100 and state.secret(f"{299:016}", "south") == OTHER


def test_a_secret_that_cannot_be_kept_is_said_and_the_client_goes_on(listen):
    class Full(dict):
        def secret(self, run_id, name):
            return b""

        def save_secret(self, run_id, name, secret):
            raise OSError(28, "No space left on device")

    said, engine = [], listen()
    north = Connection(engine.address, "north", private=False, secrets=Full(), report=said.append)
    north.join()
    assert "No space left" in said[0] and "forget" in said[0]
    north.leave()
