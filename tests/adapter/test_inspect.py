"""fedlora-adapter inspect: its figures are those of the dense matrices, and its intruders those of the paper."""

import json
import math

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fedlora.adapters import hand_on
from fedlora_adapter.base_weights import BaseWeights
from fedlora_adapter.inspection import Search, figures, overlap
from fedlora_adapter.low_rank import leading, svd
from fedlora_adapter.peft_folder import read
from tests.adapter.adapters import LOW_RANK, RESCALED, change, exported, loaded, peft_adapter, run, updates
from tests.fedlora.test_adapters import adapted_model, random_state
from tests.tiny import tiny_checkpoint

LAYER = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {
    "rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"layer.0.*value": 3}}],
    ids=["plain", "rank-stabilised", "patterns"])
def test_scales_and_ranks_are_those_of_peft(settings, checkpoint, tmp_path):
    adapter = read(peft_adapter(checkpoint("bert"), tmp_path / "a", **settings))
    model = loaded(checkpoint("bert"), tmp_path / "a")
    assert len(adapter.targets) == 4
    for name, target in adapter.targets.items():
        layer = model.base_model.model.get_submodule(name)
        assert target.rank == layer.r["default"] and target.scaling == pytest.approx(layer.scaling["default"])
        factors = adapter.factors(name)
        torch.testing.assert_close(target.scaling * factors.B @ factors.A, layer.get_delta_weight("default").double(),
                                   atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", LOW_RANK)
def test_figures_are_those_of_the_dense_update(family, checkpoint, tmp_path):
    adapter = read(exported(checkpoint("bert"), tmp_path / "a", family))
    for name, update in updates(tmp_path / "a").items():
        S = torch.linalg.svdvals(update)
        found = figures(adapter, name, None, Search())
        assert found.frobenius == pytest.approx(float(update.norm()), rel=1e-6)
        assert found.spectral == pytest.approx(float(S[0]), rel=1e-6)
        assert found.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-6)
        share = S[1e-10 * S[0] < S] / S.sum()
        assert found.effective_rank == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-5)


def with_update(folder, update):
    """Make one layer's update another one, of rank 1, and all others 0."""
    values = load_file(folder / "adapter_model.safetensors")
    values = {name: torch.zeros_like(value) if "lora_" in name else value for name, value in values.items()}
    u, v = update
    values[f"base_model.model.{LAYER}.lora_B.weight"][:, 0] = u
    values[f"base_model.model.{LAYER}.lora_A.weight"][0] = v
    save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})


def test_no_update_has_no_intruder_a_large_random_one_has_one_and_one_along_the_base_has_none(checkpoint, tmp_path):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a", lora_alpha=4)
    base = BaseWeights(str(checkpoint("bert")))
    W = base.weight(read(folder), read(folder).targets[LAYER])
    U, S, Vh = torch.linalg.svd(W)
    u, v = (torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(seed)), dim=0)
            for seed in (1, 2))
    for update, count in (((0 * u, v), 0), ((10 * S[0].float() * u, v), 1), ((3 * U[:, 0].float(), Vh[0].float()), 0)):
        with_update(folder, update)
        found = figures(read(folder), LAYER, base, Search()).base
        assert len(found.intruders.S) == count
        assert found.spectral == pytest.approx(float(S[0])) and found.frobenius == pytest.approx(float(W.norm()))
        assert found.compared == 32


def test_scaled_intruders_are_those_that_peft_makes(checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a")
    code, out, _ = run(capsys, "inspect", folder, "--base", checkpoint("bert"), "--scale-intruders", "0.75", "--out",
                       tmp_path / "new")
    assert code == 0 and "Wrote" in out
    model = loaded(checkpoint("bert"), folder)
    reduce_intruder_dimension(model, logging_sink=None)
    theirs = model.get_submodule(f"base_model.model.{LAYER}").get_delta_weight("intruder_reduced").double()
    ours = updates(tmp_path / "new")[LAYER]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, updates(folder)[LAYER], rtol=0.05)
    assert loaded(checkpoint("bert"), tmp_path / "new").active_adapter == "default"


def test_a_factor_of_one_changes_nothing(checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a")
    assert run(capsys, "inspect", folder, "--base", checkpoint("bert"), "--scale-intruders", "1", "--out",
               tmp_path / "new")[0] == 0
    assert all(map(torch.equal, load_file(folder / "adapter_model.safetensors").values(),
                   load_file(tmp_path / "new" / "adapter_model.safetensors").values()))


def test_an_adapter_beside_itself_has_cosine_one_and_a_random_one_about_none(checkpoint, tmp_path):
    one, other = (read(peft_adapter(checkpoint("bert"), tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    same = overlap(one, one, LAYER)
    assert same.cosine == pytest.approx(1) and same.rows == pytest.approx(1) and same.columns == pytest.approx(1)
    found = overlap(one, other, LAYER)
    dense = [updates(adapter.path)[LAYER] for adapter in (one, other)]
    assert found.cosine == pytest.approx(float((dense[0] * dense[1]).sum() / dense[0].norm() / dense[1].norm()))
    assert found.rows_by_chance == 4 / 32 and found.rows < 0.4


def test_adapters_of_one_run_s_frozen_a_share_their_inputs(checkpoint, tmp_path, capsys):
    folders = [exported(checkpoint("bert"), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    keys = [key for key in load_file(folders[0] / "adapter_model.safetensors") if "lora_A" in key]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    save_file(second | {key: first[key] for key in keys}, folders[1] / "adapter_model.safetensors", {"format": "pt"})
    code, out, _ = run(capsys, "inspect", *folders, "--json")
    [beside] = json.loads(out)["overlaps"]
    assert code == 0 and beside["mean"]["rows"] == pytest.approx(1) and beside["mean"]["columns"] < 0.5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bases_with_other_names_and_turned_weights_are_read_as_they_are_added_to(kind, checkpoint, tmp_path):
    path = tiny_checkpoint(kind, tmp_path / "base")
    AutoModel.from_pretrained(path).save_pretrained(path)  # without the "model." or "transformer." of the whole
    adapter = read(exported(path, tmp_path / "a"))
    base, model = BaseWeights(str(path)), loaded(path, tmp_path / "a")
    for name, target in adapter.targets.items():
        layer = model.base_model.model.get_submodule(name)
        weight = layer.get_base_layer().weight.detach()
        wanted = (weight.T if kind == "gpt2" else weight).double()
        assert torch.equal(base.weight(adapter, target), wanted)


def test_random_projection_finds_the_leading_directions(monkeypatch):
    matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix + 30 * torch.outer(matrix[:, 0], matrix[0]) / matrix[:, 0].norm() / matrix[0].norm()
    exact = leading(matrix, 5)
    monkeypatch.setattr("fedlora_adapter.low_rank.MOST_EXACT", 10)
    found = leading(matrix, 5)
    torch.testing.assert_close(found.S, exact.S, rtol=1e-3, atol=0)
    assert float((found.U[:, 0] @ exact.U[:, 0]).abs()) == pytest.approx(1)
    torch.testing.assert_close(exact.S, torch.linalg.svdvals(matrix)[:5])


def test_the_table_names_layers_and_is_bounded(checkpoint, tmp_path, capsys, monkeypatch):
    folder = exported(checkpoint("bert"), tmp_path / "a")
    code, out, _ = run(capsys, "inspect", folder, "--base", checkpoint("bert"))
    assert code == 0 and "0.attention.self.query" in out and "10" in out and "ε of this adapter is unknown" in out
    monkeypatch.setattr("fedlora_adapter.inspect_report.MOST_ROWS", 1)
    assert "… and 3 layers with smaller updates" in run(capsys, "inspect", folder)[1]
    assert len(json.loads(run(capsys, "inspect", folder, "--json")[1])["targets"]) == 4
    only = json.loads(run(capsys, "inspect", folder, "--json", "--only", "layer.1")[1])["targets"]
    assert [target["target"].split(".")[3] for target in only] == ["1", "1"]


@pytest.mark.parametrize(("settings", "told"), [
    ({"peft_type": "IA3"}, "is of PEFT's type 'IA3', and only LORA can be read"),
    ({"use_dora": True}, "was trained with use_dora: DoRA also rescales the rows"),
    ({"lora_bias": True}, "was trained with lora_bias"),
    ({"r": 5}, "gives it rank 5: the two files are not of the same adapter"),
    ({"lora_alpha": "x"}, "'x' is not a number, as alpha of bert.encoder"),
    ({"rank_pattern": {"(": 3}}, "is not a regular expression")])
def test_what_is_no_product_of_two_factors_is_refused_by_name(settings, told, checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a")
    change(folder, **settings)
    code, out, err = run(capsys, "inspect", folder)
    assert code == 2 and not out and told in err and err.startswith("fedlora-adapter inspect: ")


def test_damaged_and_missing_files_are_named(checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "run" / "adapter")
    assert f"The adapter is in {folder}" in run(capsys, "inspect", tmp_path / "run")[2]
    assert "there is no folder" in run(capsys, "inspect", tmp_path / "nothing")[2]
    weights = folder / "adapter_model.safetensors"
    values = load_file(weights)
    save_file(values | {next(key for key in values if "lora_A" in key): torch.full((4, 32), math.nan)}, weights)
    assert "holds a value that is not finite" in run(capsys, "inspect", folder)[2]
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "the file is damaged" in run(capsys, "inspect", folder)[2]
    weights.unlink()
    assert "has no adapter_model.safetensors" in run(capsys, "inspect", folder)[2]


def test_an_adapter_of_ours_that_rescales_rows_is_refused_by_name(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="was trained with use_dora"):
        read(exported(checkpoint("bert"), tmp_path / "a", RESCALED))


def test_an_adapter_in_our_own_form_is_refused_with_its_family(checkpoint, tmp_path, capsys):
    adapted = adapted_model(checkpoint("bert"), "classification", "flylora", options=(("k", 2.0),))
    folder = hand_on(adapted, random_state(adapted), tmp_path / "run" / "adapter", "org/tiny")
    for command in (("inspect", folder), ("inspect", folder.parent), ("resize", folder, "--rank", 1, "--out", "new"),
                    ("transfer", folder, "--to", checkpoint("bert"), "--prompts", "none", "--out", "new")):
        code, _, err = run(capsys, *command)
        assert code == 2 and f"{folder} holds an adapter of the family flylora in FedLoRA's own form" in err
    (folder / "adapter.json").write_text("{}")
    assert "Name the folder that save_pretrained wrote" in run(capsys, "inspect", folder)[2]


def test_another_base_is_refused(checkpoint, tmp_path, capsys):
    folder = exported(checkpoint("bert"), tmp_path / "a")
    assert "this is not the model" in run(capsys, "inspect", folder, "--base", checkpoint("gpt2"))[2]
    assert "Name the base model's folder" in run(capsys, "inspect", folder, "--base", "org/none")[2]


@pytest.mark.parametrize(("options", "told"), [
    (("--scale-intruders", "0.75"), "--scale-intruders and --out go together"),
    (("--scale-intruders", "0.75", "--out", "x"), "--scale-intruders needs --base"),
    (("--only", "nothing"), "no layer of")])
def test_options_that_do_not_fit_are_told(options, told, checkpoint, tmp_path, capsys):
    folder = exported(checkpoint("bert"), tmp_path / "a")
    code, _, err = run(capsys, "inspect", folder, *options)
    assert code == 2 and told in err


def test_singular_values_come_without_the_dense_product(checkpoint, tmp_path):
    adapter = read(exported(checkpoint("bert"), tmp_path / "a"))
    found = svd(adapter.factors(LAYER))
    dense = adapter.factors(LAYER).B @ adapter.factors(LAYER).A
    torch.testing.assert_close(found.U * found.S @ found.Vh, dense, atol=1e-12, rtol=1e-12)


def test_without_a_sub_command_the_sub_commands_are_named(capsys):
    code, _, err = run(capsys)
    assert code == 2 and "name a sub-command first: inspect" in err
