"""Starts of secure aggregation that would fail later are refused before anything listens."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from fedlora.config import ServerConfig
from fedlora.plan import AGGREGATE
from fedlora_server.app import serve
from fedlora_server.run_setup import planned
from fedlora_server.secure_start import check_sum
from fedlora_strategies import strategy_class
from tests.federation import layout_of, plan_of


def test_a_superlink_is_refused(tmp_path):
    options = ServerConfig(secure_aggregation=True, min_clients=3, out=tmp_path / "run")
    with pytest.raises(ValueError, match="works with fedlora-server alone"):
        serve(options, Console(file=StringIO()), listen=lambda *_: pytest.fail("it listens"))


def test_a_sum_that_could_overflow_is_refused():
    plan = plan_of("ffa-lora", private=True, mechanism=AGGREGATE, least_members=3, local_steps=1, least_noise=1e15)
    with pytest.raises(ValueError, match="can exceed 64 bits"):
        check_sum(strategy_class("ffa-lora")(plan, layout_of(plan.family)))


def test_more_trainings_than_rounds_are_allowed_where_attempts_may_end_unopened():
    options = ServerConfig(secure_aggregation=True, min_clients=3, rounds=3, max_participations=5)
    assert planned(options, "fedavg-lora").rounds == 3
    with pytest.raises(ValueError, match="more than the 3 rounds"):
        planned(replace(options, secure_aggregation=False), "fedavg-lora")
