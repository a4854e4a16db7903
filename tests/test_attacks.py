"""A sample of `tests.attacks`: all attacks by a mere connection, at the same time, and changed frames.

Neither may change a bit of the run.
"""

import random
from collections import Counter

from fedlora.wire import pb
from tests import fuzz
from tests.attackers import ATTACKS, PRIVATE
from tests.attacks import ENOUGH_FILES, open_files_allowed, run

SAMPLE = ("idle connections", "garbage bytes")
SECONDS, ROUNDS = 2.0, 4


def test_a_run_under_several_attacks_ends_with_the_adapter_of_one_that_nobody_attacked(tmp_path, checkpoint):
    open_files_allowed(ENOUGH_FILES)
    attacks = [attack for attack in ATTACKS if attack.name in SAMPLE]
    assert len(attacks) == len(SAMPLE)
    alone = run(tmp_path / "alone", checkpoint("bert"), (), PRIVATE, SECONDS, ROUNDS)
    outcome = run(tmp_path / "attacked", checkpoint("bert"), attacks, PRIVATE, SECONDS, ROUNDS)
    assert alone.adapter and not alone.wrong and outcome.done["connections"] > 1000
    outcome.log_bytes = 0  # the log's length is not tested here
    assert outcome.verdict(alone, takes_part=False) == "as undisturbed"


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
    assert all(found[kind] > 10 for kind in ("join", "ready", "upload", "declined")), found
