"""A server that asks for more than was agreed gets a refusal and no update.

The clients are real processes over real gRPC. A test gives each order by hand, so that it can be hostile.
"""

import dataclasses
import json

import numpy as np
import pytest

from fedlora import models
from fedlora.adapters import TensorSpec
from fedlora.plan import AGGREGATE, Refusal
from tests.driven_server import Server

OTHER_MODEL = models.ModelRef("local", "0" * 64, "1" * 64, "2" * 64)


@pytest.fixture
def serve(tmp_path, checkpoint):
    servers = []

    def start(**changes):
        servers.append(Server(tmp_path, checkpoint("bert"), **changes))
        return servers[-1]

    yield start
    for server in servers:
        server.engine.close("the test is over")
        server.deployment.__exit__()


def test_more_rounds_than_agreed_are_declined(serve):
    server = serve().client()
    for number in (1, 2):
        assert server.ask(number).steps == 2
    assert server.ask(3).code == "budget"
    assert len(server.charges()) == 2 and "calibrated to" in server.log()


def test_a_repeated_round_gets_the_same_bytes_and_costs_nothing_and_a_repeated_training_is_charged(serve):
    server = serve().client()
    first, again = server.ask(1), server.ask(1)
    assert {n: t.tobytes() for n, t in first.tensors.items()} == {n: t.tobytes() for n, t in again.tensors.items()}
    assert len(server.charges()) == 1
    other = server.ask(1, attempt=1)
    assert any(other.tensors[name].tobytes() != first.tensors[name].tobytes() for name in first.tensors)
    assert len(server.charges()) == 2
    assert server.ask(1, attempt=2).code == "budget"


@pytest.mark.parametrize(("said", "changes"), [
    ({}, {"clip_norm": 5.0}), ({}, {"local_steps": 4}), ({}, {"max_participations": 3, "rounds": 3}),
    ({}, {"rounds": 3}), ({}, {"private": False}), ({}, {"expected_batch": 16}), ({}, {"model": OTHER_MODEL}),
    ({}, {"strategy": "fedsvd"}), ({}, {"max_length": 32}), ({}, {"private_start": True}),
    ({}, {"lr": 1.0}), ({}, {"rank": 1}), ({}, {"targets": ("value",)}),
    ({"private_start": True}, {"private_start": False})], ids=lambda terms: " ".join(terms))
def test_a_plan_that_is_not_what_was_said_when_joining_is_declined(serve, said, changes):
    server = serve(**said).client("--epsilon", 200)  # so large that calibrating its noise takes no time
    assert server.ask(1, **changes) == Refusal("policy")
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == ()
    assert any(f"The plan's {field} is not what the server said" in server.log() for field in changes)


def test_more_tensors_than_the_base_model_could_need_are_refused_from_their_header(serve):
    server = serve()
    large = TensorSpec("classifier.extra", (17 << 20,), "head")
    server.layout = dataclasses.replace(server.layout, frozen=(*server.layout.frozen, large))
    server.state[large.name] = np.zeros(large.shape, np.float32)
    answer = server.client().ask(1)
    assert answer.code == "invalid-tensors" and f"takes at most {64 << 20}" in answer.detail
    assert server.charges() == ()


def test_labels_are_refused_by_what_is_declared_alone(serve):
    server = serve(labels=("calm", "routine")).client("--labels", "routine,urgent")
    assert server.deployment.end("north", 60) == 4
    assert "urgent are not in the server's set, which is: calm, routine" in server.log()
    assert not any(member.ready_at for member in server.engine.members()) and server.charges() == ()


def test_a_plan_with_other_labels_than_the_server_said_is_declined(serve):
    server = serve().client()
    assert server.ask(1, labels=("calm", "routine")) == Refusal("policy")
    assert server.deployment.end("north", 60) == 4


@pytest.mark.parametrize("name", ["adjustment", "optimizer"])
def test_a_plan_that_names_what_is_not_installed_is_declined_before_anything_is_disclosed(serve, name):
    server = serve(**{name: "of-a-newer-version"}).client()
    assert server.deployment.end("north", 60) == 4
    assert f"the {name} 'of-a-newer-version', which this FedLoRA" in server.log()
    assert not any(member.ready_at for member in server.engine.members()) and server.charges() == ()


def test_under_privacy_no_label_name_is_announced_because_a_row_has_it(serve):
    server = serve(announce=True)
    for flag in ((), ("--labels", "routine,urgent")):
        server.client("--simulated-ledger", server.deployment.folder / "simulated", *flag, defaults=False)
        if not flag:  # like an owner who declares nothing
            assert server.deployment.end("north", 60) == 4
            assert 'labels = ["routine", "urgent"]' in server.log() and "labels]" in server.log()
    assert server.ask(1).steps == 2
    assert [member.announced_labels for member in server.engine.members()] == [("routine", "urgent")]


def test_tensors_that_cut_the_adapter_off_get_noise_and_no_word_of_it(serve):
    """Whether tensors do so depends on the records, so a refusal would tell the server about the records."""
    server = serve()
    for spec in server.layout.frozen:
        server.state[spec.name] = np.full(spec.shape, 1e-45, np.float32)
    assert server.client().ask(1).steps == 2
    assert "no gradient for" in server.log() and len(server.charges()) == 1


def test_a_client_whose_round_failed_leaves_so_that_a_server_cannot_have_one_after_another_charged(serve):
    server = serve()
    (server.deployment.folder / "state" / "north" / server.plan.run_id / "upload.safetensors.new").mkdir(parents=True)
    assert server.client().ask(1) == Refusal("unavailable")
    assert server.deployment.end("north", 60) == 5
    assert len(server.charges()) == 1
    assert "Is a directory" in server.log() and "start this client again" in server.log()


@pytest.mark.parametrize("changes", [{}, {"private_start": True}], ids=["unannounced", "announced too late"])
def test_a_start_from_private_rows_that_was_not_agreed_is_declined(serve, changes):
    server = serve().client()
    assert server.ask(0, **changes) == Refusal("policy")
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == ()


def test_an_agreed_start_is_released_once_and_never_after_the_first_round(serve):
    server = serve(private_start=True).client()
    released = server.ask(0)
    assert {n: t.shape for n, t in released.tensors.items()} == {s.name: s.shape for s in server.sketches.trained}
    assert server.ask(0).tensors.keys() == released.tensors.keys() and len(server.charges()) == 1
    assert server.ask(0, attempt=1) == Refusal("unavailable") and len(server.charges()) == 1
    for number in (1, 2):
        assert server.ask(number).steps == 2
    assert server.ask(3) == Refusal("budget")
    assert server.ask(0, attempt=2) == Refusal("policy")
    assert [(charge.round, charge.state) for charge in server.charges()] == [(n, "released") for n in range(3)]


def test_a_plan_that_changes_between_rounds_is_declined(serve):
    server = serve().client()
    assert server.ask(1).steps == 2
    assert server.ask(2, head_scale=0.01) == Refusal("policy")
    assert server.deployment.end("north", 60) == 4
    assert len(server.charges()) == 1


def test_another_model_is_declined(serve):
    server = serve(model=OTHER_MODEL).client()
    assert server.deployment.end("north", 60) == 4
    assert "model-mismatch" in server.log() and "0" * 64 in server.log()


@pytest.mark.parametrize(("content", "message"), [
    ("not a row\n", "north.jsonl:1 (character 1): the line is not valid JSON"),
    ('{"text": "calm", "label": "secret"}\n', "north.jsonl:1: the label is not in the label set"),
    ('{"prompt": "calm", "completion": "now"}\n', "--task causal-lm")])
def test_what_is_wrong_with_the_files_is_said_before_a_server_is_called(serve, content, message):
    server = serve()
    server.data.write_text(content)
    server.client()
    assert server.deployment.end("north", 60) == 2
    assert message in server.log() and "secret" not in server.log() and server.engine.members() == []


def test_a_server_with_another_task_is_declined(serve):
    server = serve().client("--task", "causal-lm")
    assert server.deployment.end("north", 60) == 4
    assert "this client's --task is causal-lm" in server.log()
    assert not any(member.ready_at for member in server.engine.members())


@pytest.mark.parametrize(("field", "value"), [("family", "of-next-year"), ("task", "of-next-year"),
                                              ("adjustment", "of-next-year"), ("dropout", 0.1)])
def test_a_plan_that_cannot_be_followed_here_is_declined_before_this_client_is_ready_or_charged(serve, field, value):
    server = serve()
    server.come_back_with(**{field: value})
    server.client()
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == () and not any(member.ready_at for member in server.engine.members())
    assert field in server.log() and str(value) in server.log() and "[policy]" in server.log()


def test_secure_aggregation_without_a_certificate_is_declined_before_this_client_is_ready_or_charged(serve):
    server = serve(mechanism=AGGREGATE, least_members=3, local_steps=1).client()
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == () and not any(member.ready_at for member in server.engine.members())
    assert "clients know each other by their certificates; refused. Give --tls DIR" in server.log()


POLICIES = {"min-noise-multiplier = 50.0": "min-noise-multiplier", 'servers = ["10.0.0.1:9092"]': "servers",
            "private-start = false": "private-start"}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_the_owners_policy_forbids_is_declined_with_a_bare_code(serve, tmp_path, policy):
    path = tmp_path / "policy.toml"
    path.write_text(policy + "\n")
    server = serve(private_start="start" in policy).client("--policy", path)
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == () and not any(member.ready_at for member in server.engine.members())
    assert POLICIES[policy] in server.log() and str(path) in server.log() and "Traceback" not in server.log()


def test_a_run_beyond_the_lifetime_is_declined_and_the_log_says_what_is_left(serve, tmp_path):
    path = tmp_path / "policy.toml"
    server = serve()
    path.write_text(f"[dataset.north]\ndata = {json.dumps(str(server.data))}\nepsilon = 0.001\ndelta = 1e-5\n")
    server.client("--policy", path)
    assert server.deployment.end("north", 60) == 4
    assert server.charges() == () and "lifetime" in server.log() and str(path.name) in server.log()
    assert not any(member.ready_at for member in server.engine.members()), "it does not count as a client that came"
