"""A client that is ordered to train some ranks alone: what it accepts, sends, keeps and pays."""

import dataclasses

import numpy as np
import pytest

from fedlora.plan import Refusal, Upload
from fedlora.privacy import Ledger
from fedlora_client.state import FolderState
from tests.client.test_session import Desk


@pytest.fixture
def desk(checkpoint, tmp_path):
    return Desk(checkpoint, FolderState(tmp_path / "state"), Ledger(tmp_path / "ledger.sqlite", simulated=True))


def narrowed(desk, round, ranks):
    """Return the order of some ranks, and what is sent with it: whole frozen tensors, and trained ones of those."""
    order = dataclasses.replace(desk.order(round), prefixes=tuple(sorted(ranks.items())))
    layout = desk.trainer.adapted.layout
    fits = set(ranks) <= set(layout.modules) and all(rank <= 2 for rank in ranks.values())
    return order, layout.sent_in(ranks if fits else {}).cut(desk.start)


def test_it_trains_and_sends_those_ranks_and_pays_as_for_all(desk):
    session, modules = desk.session(), desk.trainer.adapted.layout.modules
    ranks = dict.fromkeys(modules[:1], 1)
    order, tensors = narrowed(desk, 1, ranks)
    upload = session.run_round(order, tensors)
    assert isinstance(upload, Upload)
    shapes = {name: array.shape for name, array in upload.tensors.items()}
    assert shapes[f"{modules[0]}.B"] == (32, 1) and shapes[f"{modules[1]}.B"] == (32, 2)
    assert upload.noise_multiplier == session.terms.noise_multiplier
    spent = session.epsilon()
    other, _ = narrowed(desk, 2, dict.fromkeys(modules, 1))
    again = session.run_round(other, {name: array[..., :1] if name.endswith(".B") else array
                                      for name, array in desk.trained.items()})
    assert isinstance(again, Upload), "the frozen tensors that it holds are whole, whatever the round's ranks"
    assert len(desk.ledger.charges()) == 2 and spent < session.epsilon()
    assert desk.session().terms == session.terms


def test_the_same_bytes_are_sent_again(desk):
    session = desk.session()
    order, tensors = narrowed(desk, 1, dict.fromkeys(desk.trainer.adapted.layout.modules, 1))
    first, again = session.run_round(order, tensors), desk.session(seed=8).run_round(order, tensors)
    assert all(np.array_equal(array, again.tensors[name]) for name, array in first.tensors.items())
    assert len(desk.ledger.charges()) == 1


@pytest.mark.parametrize("ranks", [lambda modules: {modules[0]: 3}, lambda modules: {"nowhere": 1}])
def test_ranks_beyond_the_plan_are_refused_and_cost_nothing(desk, ranks):
    answer = desk.session().run_round(*narrowed(desk, 1, ranks(desk.trainer.adapted.layout.modules)))
    assert isinstance(answer, Refusal) and answer.code == "invalid-tensors" and "ranks do not fit" in answer.detail
    assert not desk.ledger.charges()


def test_tensors_of_other_ranks_than_the_order_names_are_refused(desk):
    order, _ = narrowed(desk, 1, dict.fromkeys(desk.trainer.adapted.layout.modules, 1))
    answer = desk.session().run_round(order, desk.start)
    assert isinstance(answer, Refusal) and answer.code == "invalid-tensors" and "shape" in answer.detail
    assert not desk.ledger.charges()
