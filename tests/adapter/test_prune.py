"""fedlora-adapter prune-base and recover: a smaller base, and its adapters spread over the full model."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedlora import models, tasks
from fedlora.adapters import attach, export, initial_tensors
from fedlora.tasks.causal_lm import CausalLM
from fedlora_adapter.importance import by_public_texts
from fedlora_adapter.pruning import architecture_of, sizes_of, smaller
from tests.adapter.adapters import run, updates
from tests.adapter.test_known_epsilon import with_reports
from tests.fedlora.test_adapters import LABELS, adapted_model, logits, random_state

TARGETS = {"llama": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), "bert": ("query", "output.dense"),
           "gpt2": ("c_attn", "c_fc", "mlp.c_proj")}


def pruned(capsys, base, out, *options):
    code, shown, err = run(capsys, "prune-base", base, "--out", out, "--json", *options)
    assert code == 0, err
    return json.loads(shown)


def trained_on(base, folder, kind, task="classification"):
    adapted = adapted_model(base, task, targets=TARGETS[kind])
    return export(adapted, random_state(adapted), folder, "org/tiny")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert", "gpt2"])
def test_at_ratio_0_the_model_gives_identical_logits(kind, checkpoint, tmp_path, capsys):
    found = pruned(capsys, checkpoint(kind), tmp_path / "same", "--ratio", 0)
    assert found["parameters"]["pruned"] == found["parameters"]["full"]
    for name, tensor in load_file(checkpoint(kind) / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "same" / "model.safetensors")[name], tensor)
    torch.manual_seed(0)
    before = models.load(checkpoint(kind), "classification", 2).model
    torch.manual_seed(0)
    after = models.load(tmp_path / "same", "classification", 2).model
    assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_heads_and_neurons_of_equal_number_go_in_every_layer_and_transformers_loads_what_is_left(
        kind, checkpoint, tmp_path, capsys):
    base, out = checkpoint(kind), tmp_path / "small"
    found = pruned(capsys, base, out, "--ratio", 0.5)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim,
            model.config.intermediate_size) == (2, 1, 8, 32)
    lost = 2 * (32 * (16 + 8 + 8 + 16) + 3 * 32 * 32 + (32 if kind == "qwen2" else 0))  # of two layers
    assert found["parameters"]["full"] - found["parameters"]["pruned"] == lost
    assert logits(model).isfinite().all()


def test_the_smallest_neurons_and_heads_go(checkpoint, tmp_path, capsys):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight[5:], mlp.up_proj.weight[5:], mlp.down_proj.weight[:, 5:]):
            weight *= 0.01
        attention.v_proj.weight[:8] *= 0.01
        attention.q_proj.weight[:16] *= 0.01
    model.save_pretrained(base)
    models.load(checkpoint("llama"), "causal-lm", ()).tokenizer.save_pretrained(base)
    pruned(capsys, base, tmp_path / "small", "--ratio", 0.5)
    kept = json.loads((tmp_path / "small" / "fedlora_pruned.json").read_text())["kept"]["1"]
    assert kept["heads"] == [1] and kept["neurons"][:5] == [0, 1, 2, 3, 4]
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.weight"], attention.q_proj.weight[16:])
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], mlp.down_proj.weight[:, kept["neurons"]])


def test_neurons_that_public_texts_do_not_need_go_by_loraprune_s_score(checkpoint, tmp_path, capsys):
    """A neuron that the output does not depend on has no gradient, however large its own weights are."""
    base, rows = tmp_path / "base", tmp_path / "public.jsonl"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
        model.model.layers[0].mlp.up_proj.weight[::2] *= 100
    model.save_pretrained(base)
    models.load(checkpoint("llama"), "causal-lm", ()).tokenizer.save_pretrained(base)
    rows.write_text("".join(json.dumps({"text": f"the patient reports pain {n}"}) + "\n" for n in range(4)))
    kept = {}
    for by in ("magnitude", f"public:{rows}"):
        pruned(capsys, base, tmp_path / by[:3], "--ratio", 0.5, "--by", by)
        record = json.loads((tmp_path / by[:3] / "fedlora_pruned.json").read_text())
        kept[by[:3]] = record["kept"]["0"]["neurons"]
    assert set(kept["mag"]) == set(range(0, 64, 2))
    # the down projection's inputs have a gradient where its weights are 0, but |gradient ∘ weight| is 0 there
    assert set(kept["pub"]) == set(range(1, 64, 2))
    assert record["public"]["file"] == "public.jsonl" and str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_score_by_public_texts_is_loraprune_s_formula(kind, checkpoint, tmp_path):
    """|(g_B A + B g_A − g_B g_A) ∘ (W + B A)| with B = 0, averaged over batches, by the base model's own gradients."""
    path, rows = checkpoint(kind), tmp_path / "public.jsonl"
    texts = [f"the patient reports pain {'again ' * (n % 3)}{n}" for n in range(40)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    base = models.load(path, "causal-lm", ())
    architecture = architecture_of(base.model.config.to_dict(), kind)
    measure = by_public_texts(path, architecture, rows, max_length=32, seed=1)
    start = attach(models.load(path, "causal-lm", ()), family="lora", rank=8, alpha=8.0, train_head=False,
                   targets=tuple(side.layer for side in architecture.sides))
    state = initial_tensors(start, init="orthonormal", seed=1)
    task = CausalLM(base.tokenizer, 32)
    records = task.encode(tasks.read(rows, "causal-lm", held_out=True))
    order = np.argsort(records.lengths, kind="stable")
    batches = [task.collate(records, some, int(records.lengths[some].max())) for some in (order[:32], order[32:])]
    for module in start.layout.modules:
        weight = base.model.get_submodule(module).weight.requires_grad_()
        A, B = (torch.from_numpy(state[f"{module}.{factor}"]) for factor in "AB")
        by_batch = []
        for batch in batches:
            [G] = torch.autograd.grad(task.per_record_loss(base.model, batch).mean(), weight)
            G, W = (G.T, weight.T) if kind == "gpt2" else (G, weight)
            g_B, g_A = G @ A.T, B.T @ G
            by_batch.append(((g_B @ A + B @ g_A - g_B @ g_A) * (W + B @ A)).abs())
        found, wanted = measure(module, weight.detach()), torch.stack(by_batch).mean(0).detach()
        torch.testing.assert_close(found.T if kind == "gpt2" else found, wanted, atol=1e-7, rtol=1e-4)
        assert wanted.mean() > 1e-5


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_recovered_adapter_is_the_trained_one_on_what_was_kept_and_0_elsewhere(kind, checkpoint, tmp_path, capsys):
    base, small, out = checkpoint(kind), tmp_path / "small", tmp_path / "new"
    pruned(capsys, base, small, "--ratio", 0.5)
    source = with_reports(trained_on(small, tmp_path / "a", kind))
    code, shown, err = run(capsys, "recover", source, "--pruned", small, "--base", base, "--out", out)
    assert code == 0, err
    kept = json.loads((small / "fedlora_pruned.json").read_text())["kept"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, out))
    spread = 0
    for key, wide in after.items():
        narrow = before[key]
        if wide.shape == narrow.shape:
            assert torch.equal(wide, narrow)
            continue
        block = next(part for part in key.split(".") if part.isdigit())
        name, side = key.split(".lora_")[0].rpartition(".")[2], int(".lora_A" in key)
        units = kept[block]["heads" if "self_attn" in key else "neurons"]
        width = {"q_proj": 16, "o_proj": 16, "v_proj": 8}.get(name, 1)
        places = torch.tensor([unit * width + n for unit in units for n in range(width)])
        others = torch.tensor([n for n in range(wide.shape[side]) if n not in set(places.tolist())])
        assert torch.equal(wide.index_select(side, places), narrow) and not wide.index_select(side, others).any()
        spread += 1
    assert spread == 2 * len(TARGETS[kind][0 if kind == "llama" else 1:]) and f"{spread} of" in shown
    model = models.load(base, "classification", LABELS).model
    tuned = PeftModel.from_pretrained(model, out).eval()
    plain = models.load(base, "classification", LABELS).model
    plain.load_state_dict({key.removeprefix("base_model.model."): value for key, value in after.items()
                           if "lora_" not in key}, strict=False)
    with torch.no_grad():
        for name, update in updates(out).items():
            plain.get_submodule(name).weight += (update.T if kind == "gpt2" else update).float()
    torch.testing.assert_close(logits(tuned), logits(plain), atol=1e-4, rtol=1e-4)
    card, config = (out / "README.md").read_text(), json.loads((out / "base" / "config.json").read_text())
    assert "ε = 7.99" in card and config["id2label"]["0"] == "LABEL_0"
    assert config.get("intermediate_size", config.get("n_inner")) in (64, None)
    assert "fedlora_pruned_sha256" not in config


def test_an_adapter_of_another_base_or_a_changed_record_is_refused(checkpoint, tmp_path, capsys):
    base, small = checkpoint("llama"), tmp_path / "small"
    pruned(capsys, base, small, "--ratio", 0.5)
    pruned(capsys, base, tmp_path / "other", "--ratio", 0.25)
    source = trained_on(small, tmp_path / "a", "llama")

    def told(*options):
        code, _, err = run(capsys, "recover", source, "--out", tmp_path / "new", *options)
        assert code == 2 and not (tmp_path / "new").exists()
        return err

    assert "which is no folder here" in told("--base", base)
    assert "it is another model" in told("--base", checkpoint("qwen2"), "--pruned", small)
    assert "did not write it" in told("--base", base, "--pruned", base)
    assert "was trained on another base model than" in told("--base", base, "--pruned", tmp_path / "other")
    record = small / "fedlora_pruned.json"
    record.write_text(record.read_text().replace('"ratio": 0.5', '"ratio": 0.4'))
    assert "one of the two was changed" in told("--base", base, "--pruned", small)


def test_what_cannot_be_pruned_is_told(checkpoint, tmp_path, capsys, monkeypatch):
    def told(kind, *options):
        code, _, err = run(capsys, "prune-base", checkpoint(kind), "--out", tmp_path / "new", *options)
        assert code == 2 and not (tmp_path / "new").exists()
        return err

    assert "model type 'modernbert', and what can be pruned is known for llama" in told("modernbert", "--ratio", 0.5)
    assert "is an encoder; choose --by magnitude" in told("bert", "--ratio", 0.5, "--by", "public:rows.jsonl")
    assert "'much' is neither magnitude nor public:FILE" in told("bert", "--ratio", 0.5, "--by", "much")
    assert "'1' is not a number of at least 0 and at most 0.95" in told("bert", "--ratio", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--four-bit needs bitsandbytes" in told("llama", "--ratio", 0.5, "--four-bit")


def test_only_numbers_of_heads_that_the_config_allows_are_left():
    """Llama's config refuses numbers of heads that do not divide the hidden size; Qwen2's does not."""
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
              "intermediate_size": 100}
    for kind, heads in (("llama", 8), ("qwen2", 6)):
        architecture = architecture_of(config | {"model_type": kind}, kind)
        new, sizes = smaller(architecture, config | {"model_type": kind}, 0.3)
        assert sizes.groups == heads and sizes.neurons == 70 and sizes_of(architecture, new) == sizes
