"""What a client refuses of a plan before it reads a record."""

import logging

import pytest

from fedlora.plan import Refused
from fedlora_client.trainers import make_trainer
from tests.fedlora.private_training import loaded, plan


def test_a_private_plan_with_a_family_that_refuses_privacy_is_refused_with_the_reason(caplog):
    run = plan("randlora", targets=("query",))
    with caplog.at_level(logging.ERROR), pytest.raises(Refused) as refused:
        make_trainer(None, run, loaded("bert", run.task), None, None)
    assert refused.value.refusal.code == "policy"
    assert "the adapter family randlora is not for private runs: gamma has far more values" in caplog.text
