"""A sample of `tests.attacks`: all attacks by a mere connection, at the same time, and changed frames.

Neither may change a bit of the run.
"""

import random
from collections import Counter

import pytest

from fedlora.plan import Proposal
from fedlora.wire import pb
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls
from tests import fuzz
from tests.attackers import ATTACKS, PRIVATE
from tests.attacks import ENOUGH_FILES, open_files_allowed, run
from tests.federation import plan_of
from tests.identities import enrolled
from tests.tls_attackers import TLS_ATTACKS

SAMPLE = ("idle connections", "garbage bytes")
SECONDS, ROUNDS = 2.0, 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint):
    """Return the outcome of a run that nobody attacks."""
    outcome = run(tmp_path_factory.mktemp("alone") / "run", checkpoint("bert"), (), PRIVATE, SECONDS, ROUNDS)
    assert outcome.adapter and not outcome.wrong
    return outcome


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "TLS"])
def test_a_run_under_several_attacks_ends_with_the_adapter_of_one_that_nobody_attacked(
        tmp_path, checkpoint, alone, tls):
    open_files_allowed(ENOUGH_FILES)
    attacks = [attack for attack in (TLS_ATTACKS if tls else ATTACKS) if tls or attack.name in SAMPLE]
    outcome = run(tmp_path / "attacked", checkpoint("bert"), attacks, PRIVATE, SECONDS, ROUNDS, tls=tls)
    assert outcome.done["connections"] > 1000 and len(attacks) >= len(SAMPLE)
    outcome.log_bytes = 0  # the log's length is not tested here
    assert outcome.verdict(alone, takes_part=False) == "as undisturbed"


def test_changed_frames_over_tls_end_a_stream_and_those_without_a_listed_certificate_are_turned_away(tmp_path):
    authority = Authority.create(tmp_path / "pki", ["127.0.0.1"])
    identities = [enrolled(authority, tmp_path / name, name) for name in ("mallory", "trudy")]
    authority.revoke("trudy")
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan_of("ffa-lora", private=True)), tmp_path / "uploads",
                        tls=ServerTls(authority.folder))
    try:
        met = fuzz.to_server(engine.address, 100, seed=1, identities=identities)
        assert met["frames"] >= 100 and not met["ERRORS OF THE SERVER"]
        assert met["PERMISSION_DENIED"] > 5 and met["INVALID_ARGUMENT"] > 5
        assert {member.name for member in engine.members()} <= {"mallory"}
    finally:
        engine.close("finished")


def test_changed_frames_end_a_clients_connection_with_a_typed_error_or_are_a_request():
    met = fuzz.to_clients(200, seed=1)
    assert met.keys() <= {"frames", "MB at most", "WireError", "Refused", "Goodbye", "RunChanged", "a request"}, met
    assert met["frames"] >= 200 and met["WireError"] > met["a request"]


def test_every_known_frame_is_changed_in_every_way_and_some_changes_can_still_be_decoded():
    mutator = fuzz.Mutator(pb.ClientFrame, fuzz.FROM_CLIENTS, random.Random(0))
    found: Counter = Counter()
    for _ in range(2000):
        frame = mutator.frame()
        try:
            found[pb.ClientFrame.FromString(frame).WhichOneof("kind")] += frame not in fuzz.FROM_CLIENTS
        except Exception:
            found["not decoded"] += 1
    assert found["not decoded"] > 200
    assert all(found[kind] > 10 for kind in ("join", "ready", "upload", "declined", "sum")), found
