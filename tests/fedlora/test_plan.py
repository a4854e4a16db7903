"""Plans and messages: they are checked when they are made, and unchanged by conversion to flat values and back."""

import dataclasses
import math

import pytest

from fedlora.plan import (
    REFUSALS,
    ModelRef,
    Proposal,
    Refusal,
    RoundPlan,
    RunPlan,
    Upload,
    from_scalars,
    round_from_scalars,
    round_to_scalars,
    to_scalars,
    upload_metrics,
)

MODEL = ModelRef("minilm", "a" * 64, "b" * 64, "c" * 64)


def make_plan(**changes):
    return RunPlan(**{
        "run_id": "ab" * 8, "fedlora_version": "0.1.0", "strategy": "fedsvd", "family": "frozen-a", "private": True,
        "model": MODEL, "task": "classification", "labels": ("a", "b"), "max_length": 16, "rank": 2, "alpha": 4.0,
        "targets": ("query",), "train_head": True, "dropout": 0.0, "rounds": 4, "max_participations": 2,
        "local_steps": 2, "expected_batch": 6, "optimizer": "sgd", "lr": 0.1, "clip_norm": 0.5, "adapter_scale": 1.0,
        "head_scale": 1.0, "weight_by_examples": False} | changes)


def test_plans_survive_flat_scalars():
    plan = make_plan(lr_schedule="linear")
    assert from_scalars(to_scalars(plan)) == plan
    order = RoundPlan(plan, 3, 1, "d" * 64, ("q.B",), (("k", 1), ("q", 2)))
    flat = round_to_scalars(order)
    assert round_from_scalars(flat) == order
    with pytest.raises(ValueError, match="prefix_sites has 2 entries and prefix_ranks 1"):
        round_from_scalars(flat | {"prefix_ranks": [1]})


@pytest.mark.parametrize(("field", "value"), [
    ("rank", 10**6), ("labels", tuple(map(str, range(10**4)))),
    ("rank", 0), ("lr", -1.0), ("lr", float("nan")), ("clip_norm", float("inf")), ("clip_norm", 1e-30),
    ("adapter_scale", 1e-30), ("head_scale", float("nan")), ("local_steps", 10**6), ("dropout", 1.0), ("rounds", 0),
    ("run_id", "AB" * 8), ("strategy", "a\nb"), ("strategy", ""), ("family", "a\nb"), ("task", "a" * 65),
    ("family_options", (("blocks", math.inf),)), ("family_options", (("b", 1.0), ("a", 1.0))), ("ranks", (("q", 0),)),
    ("ranks", (("q", 1), ("q", 2))), ("optimizer", ""), ("adjustment", "\n"), ("labels", ("a",)),
    ("labels", ("a", "a")), ("targets", ("q", "q")), ("weight_by_examples", True), ("lr_schedule", "cosine"),
    ("wire_dtype", "int8"), ("labels", ("a", "\x1b[2J")), ("targets", ("query", "a\nb")),
    ("fedlora_version", "0.1\x07")])
def test_a_value_that_cannot_be_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=field):
        make_plan(**{field: value})


def test_labels_may_be_open_until_a_round():
    plan = make_plan(labels=())
    assert plan.labels_open and make_plan().with_open_labels() == plan and not make_plan().labels_open
    assert not make_plan(task="causal-lm", labels=(), train_head=False).labels_open
    with pytest.raises(ValueError, match="labels are open"):
        RoundPlan(plan, 1, 0, "d" * 64)


def test_a_proposal_is_broken_by_any_value_but_labels_that_were_open():
    open_labels, fixed = Proposal(make_plan().with_open_labels()), Proposal(make_plan())
    assert open_labels.broken_by(make_plan()) == fixed.broken_by(make_plan()) == []
    assert open_labels.broken_by(make_plan(labels=("b", "c"))) == []
    assert fixed.broken_by(make_plan(labels=("b", "c"))) == ["labels"]
    others = {"run_id": "cd" * 8, "model": ModelRef("minilm", "d" * 64, "b" * 64, "c" * 64), "private": False,
              "lr_schedule": "linear", "private_start": True, "train_head": False, "targets": ("value",),
              "family_options": (("k", 1.0),), "ranks": (("a", 3),), "dropout": 0.1, "wire_dtype": "bf16",
              "protocol": 5, "optimizer": "adamw"}
    sums = {"mechanism", "least_members", "colluding", "least_noise", "hold_out"}
    open_alone = {"weight_by_examples", "whole_gradients"}
    for name in {field.name for field in dataclasses.fields(RunPlan)} - {"labels", *open_alone, *sums}:
        value = getattr(make_plan(), name)
        if name not in others:
            others[name] = f"{value}x" if isinstance(value, str) else 2 * value
        for proposal in (open_labels, fixed):
            assert proposal.broken_by(make_plan(**{name: others[name]})) == [name]
    summed = secure_plan()
    for name, value in {"least_members": 7, "colluding": 1, "least_noise": 0.5, "hold_out": 0.1}.items():
        assert Proposal(summed).broken_by(dataclasses.replace(summed, **{name: value})) == [name]
    assert fixed.broken_by(make_plan(private=False, weight_by_examples=True)) == ["private", "weight_by_examples"]
    gradients = make_plan(private=False, private_start=True)
    assert Proposal(gradients).broken_by(dataclasses.replace(gradients, whole_gradients=True)) == ["whole_gradients"]


@pytest.mark.parametrize(("values", "field"), [
    ({"private": True, "private_start": True}, "whole_gradients"), ({"private": False}, "whole_gradients"),
    ({"private": False, "private_start": True, "protocol": 7}, "protocol")])
def test_whole_gradients_are_for_a_start_without_privacy_alone(values, field):
    assert make_plan(private=False, private_start=True, whole_gradients=True, ranks=(("a", 3),)).whole_gradients
    with pytest.raises(ValueError, match=f"^{field} is "):
        make_plan(**values, whole_gradients=True)


def test_something_must_be_trained():
    assert make_plan(targets=()).targets == ()
    with pytest.raises(ValueError, match="nothing would be trained"):
        make_plan(targets=(), train_head=False)


def test_a_language_model_has_neither_labels_nor_a_head():
    assert make_plan(task="causal-lm", labels=(), train_head=False).task == "causal-lm"
    for wrong in ({"labels": ("a", "b"), "train_head": False}, {"labels": (), "train_head": True}):
        with pytest.raises(ValueError):
            make_plan(task="causal-lm", **wrong)


@pytest.mark.parametrize("break_it", [
    lambda flat: flat.pop("rank"), lambda flat: flat.update(code="import os"), lambda flat: flat.update(rank="2"),
    lambda flat: flat.update(rank=True), lambda flat: flat.update(labels="ab"), lambda flat: flat.update(private=1),
    lambda flat: flat.update(model_weights_sha256="xyz")])
def test_fields_that_are_missing_unknown_or_of_another_type_are_refused(break_it):
    flat = to_scalars(make_plan())
    break_it(flat)
    with pytest.raises(ValueError):
        from_scalars(flat)


def test_pairs_of_names_and_numbers_travel_as_two_lists():
    plan = make_plan(family_options=(("blocks", 4.0), ("k", 2.0)), ranks=(("layer.0.q", 3),), adjustment="scaled-gd")
    flat = to_scalars(plan)
    assert (flat["rank_sites"], flat["rank_values"], flat["family_option_values"]) == (["layer.0.q"], [3], [4.0, 2.0])
    assert from_scalars(flat) == plan
    with pytest.raises(ValueError, match="rank_sites"):
        from_scalars(flat | {"rank_values": []})


def test_a_plan_of_an_earlier_protocol_has_the_values_that_it_had():
    plan = make_plan(protocol=5)
    assert not {"ranks", "rank_sites", "family_option_names", "adjustment"} & to_scalars(plan).keys()
    assert from_scalars(to_scalars(plan)) == plan
    for name in ("family_options", "ranks"):
        with pytest.raises(ValueError, match="protocol"):
            make_plan(protocol=5, **{name: (("a", 1),)})


def test_a_linear_schedule_falls_from_the_rate_in_equal_steps():
    plan = make_plan(lr_schedule="linear", lr=0.4)
    assert [RoundPlan(plan, t, 0, "d" * 64).lr for t in (1, 2, 3, 4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert {RoundPlan(dataclasses.replace(plan, lr_schedule="constant"), t, 0, "d" * 64).lr for t in (1, 4)} == {0.4}


@pytest.mark.parametrize("sha256", ["", "../../models/model", "/tmp/model", "D" * 64, "d" * 63])
def test_the_digest_of_the_shared_tensors_cannot_be_a_path(sha256):
    with pytest.raises(ValueError, match="frozen_sha256"):
        RoundPlan(make_plan(), 1, 0, sha256)


def test_only_scalars_that_are_there_are_sent():
    assert upload_metrics(Upload("ab" * 8, 1, 0, {}, steps=4, delta=1e-5)) == {"steps": 4, "delta": 1e-5}


def test_a_refusal_has_a_known_code_and_says_what_it_means():
    assert REFUSALS["budget"] in str(Refusal("budget"))
    with pytest.raises(ValueError, match="sulking"):
        Refusal("sulking")


def secure_plan(**values):
    return make_plan(**{"mechanism": "distributed-gaussian", "least_members": 6, "local_steps": 1, "optimizer": "sgd",
                        "private": True, "weight_by_examples": False, **values})


@pytest.mark.parametrize(("field", "value"), [
    ("mechanism", "gaussian"), ("least_members", 2), ("least_members", 201), ("colluding", 2), ("colluding", -1),
    ("least_noise", -1.0), ("least_noise", math.inf), ("hold_out", 0.6), ("hold_out", -0.1), ("local_steps", 2),
    ("optimizer", "adamw"), ("private", False),
    ("adjustment", "allora"), ("private_start", True), ("protocol", 7)])
def test_secure_aggregation_refuses_what_it_cannot_keep(field, value):
    assert secure_plan().secure_aggregation and not make_plan().secure_aggregation
    with pytest.raises(ValueError, match=f"^{field} is "):
        secure_plan(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("least_members", 6), ("colluding", 1), ("least_noise", 0.5),
                                             ("hold_out", 0.1)])
def test_values_of_secure_aggregation_are_refused_without_it(field, value):
    with pytest.raises(ValueError, match="only secure aggregation has it"):
        make_plan(**{field: value})
