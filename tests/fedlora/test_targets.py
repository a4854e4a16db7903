"""Target layers: under privacy, only those can train that receive each record's values separately."""

import pytest

from fedlora import models
from fedlora.adapters import all_targets, attach, automatic_targets, not_by_record
from fedlora.tasks import task_named
from fedlora.training import Trainer
from tests.architectures import ARCHITECTURES, architecture
from tests.covering import WHOLE


def loaded(name, folder):
    return models.load(architecture(name, folder), "classification", ("no", "yes"))


def rehearse(model, targets):
    adapted = attach(model, family="frozen-a", rank=2, alpha=4, targets=targets, train_head=True)
    Trainer(adapted, task_named("classification")(model.tokenizer, ("no", "yes"), 16), device="cpu",
            precision="fp32").rehearse()
    return adapted


STRANGE = {"deberta-v2": {"query_proj", "key_proj"},  # also receive positions, which belong to no record
           "qwen2_moe": {"shared_expert_gate", "gate_proj", "up_proj", "down_proj"},  # receive all tokens in one row
           "opt": {"fc1", "fc2"}, "bart": set(), "llama": set(), "bert": set()}


@pytest.mark.parametrize("name", STRANGE)
def test_all_targets_under_privacy_are_those_that_are_given_each_record_by_itself(name, tmp_path):
    model = loaded(name, tmp_path)
    private, plain = (all_targets(model.model, private=private) for private in (True, False))
    assert {suffix.rpartition(".")[2] for suffix in {*plain} - {*private}} == STRANGE[name]
    adapted = rehearse(model, private)
    assert not not_by_record(adapted.model, [site.name for site in adapted.layout.sites])


@pytest.mark.parametrize(("name", "layer"), [("deberta-v2", "key_proj"), ("qwen2_moe", "shared_expert_gate")])
def test_a_named_target_that_is_not_is_refused_by_its_full_name(name, layer, tmp_path):
    with pytest.raises(ValueError, match=rf"2 of the 2 target layers .*layers?\.0\.\S*{layer} is given \d+×.* values"):
        rehearse(loaded(name, tmp_path), [layer])


@pytest.mark.parametrize("name", [name for name, made in ARCHITECTURES.items()
                                  if made.private and (WHOLE or name in STRANGE) and name != "canine"])
def test_whatever_targets_are_chosen_can_be_trained_under_privacy(name, tmp_path):
    if "moe" in name or name == "mixtral":
        pytest.skip("mixtures of experts are trained one record at a time")
    model = loaded(name, tmp_path)
    rehearse(model, ARCHITECTURES[name].targets or automatic_targets(model.model))


def test_layers_without_a_part_in_the_output_are_not_chosen(tmp_path):
    """CANINE's last encoder computes outputs for each character, which a classifier does not use."""
    if not WHOLE:
        pytest.skip("its tokenizer takes seconds to load; make test-all")
    model = loaded("canine", tmp_path)
    assert any(name.startswith("canine.final_char_encoder") for name, _ in model.model.named_modules())
    assert not any("final_char_encoder" in name for name in automatic_targets(model.model))
