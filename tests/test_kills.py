"""A sample of `tests.kills`: a client killed anywhere after its first charge was charged for all that had left."""

import pytest

from fedlora.plan import PROTOCOL
from tests.kills import POINTS, SERVER_POINTS, campaign, found, restored_snapshot, server_campaign

SAMPLE = [("once that is noted", 2), ("after the witness", 1), ("while sending", 1), ("during the training", 1)]


def test_kills_after_a_charge_never_let_more_updates_leave_than_were_charged(tmp_path, checkpoint):
    counted = campaign(tmp_path, checkpoint("bert"), SAMPLE)
    assert counted.states["reserved"] >= 1, "the one that was killed in its training stays charged"
    assert counted.charges > len(counted.left)


@pytest.mark.skipif(PROTOCOL == 4, reason="a server keeps no anchor before protocol 5")
def test_a_ledger_that_was_restored_with_its_witness_is_refused(tmp_path, checkpoint):
    code, counted, log = restored_snapshot(tmp_path, checkpoint("bert"))
    assert code not in (None, 0), log
    assert counted.charges < len(counted.left), "the ledger has forgotten what had left"


@pytest.mark.parametrize("where", sorted({where for where, _ in (*POINTS.values(), *SERVER_POINTS.values())}))
def test_every_point_of_the_campaign_is_a_function_that_is_there(where):
    owner, name = found(where)
    assert callable(getattr(owner, name))


def test_a_server_killed_wherever_goes_on_by_the_same_command_to_the_same_adapter(tmp_path, checkpoint):
    sample = [("before the run is written", 1), ("once it has noted whom it asks", 1), ("once an upload is stored", 1),
              ("before a round's checkpoint", 1), ("before the report, after the adapter", 1),
              ("once the report is written", 1)]
    assert server_campaign(tmp_path, checkpoint("bert"), sample) == len(sample)
