"""fedlora-adapter resize: the best update of a rank, or a prefix of the factors, in a folder that PEFT loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.adapter.adapters import LOW_RANK, change, classifier, exported, loaded, peft_adapter, run, updates
from tests.fedlora.test_adapters import logits


def cut(update: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def merged_logits(base, folder, changed):
    """Compute the logits of the base with these updates and the adapter's head."""
    model = classifier(base).eval()
    head = {key.removeprefix("base_model.model."): value for key, value in
            load_file(folder / "adapter_model.safetensors").items() if "lora_" not in key}
    model.load_state_dict(head, strict=False)
    with torch.no_grad():
        for name, update in changed.items():
            model.get_submodule(name).weight += update.float()
    return logits(model)


@pytest.mark.parametrize("family", LOW_RANK)
def test_svd_gives_the_closest_update_and_peft_loads_it_with_its_logits(family, checkpoint, tmp_path, capsys):
    base, folder, out = checkpoint("bert"), tmp_path / "a", tmp_path / "new"
    exported(base, folder, family)
    code, shown, _ = run(capsys, "resize", folder, "--rank", "1", "--out", out, "--json")
    wanted = {name: cut(update, 1) for name, update in updates(folder).items()}
    errors = {one["target"]: one["error"] for one in json.loads(shown)["targets"]}
    assert code == 0 and errors.keys() == wanted.keys()
    for name, update in updates(folder).items():
        torch.testing.assert_close(updates(out)[name], wanted[name], atol=1e-5, rtol=1e-5)
        assert errors[name] == pytest.approx(float((update - wanted[name]).norm() / update.norm()), rel=1e-4)
    torch.testing.assert_close(logits(loaded(base, out)), merged_logits(base, out, wanted), atol=1e-4, rtol=1e-4)
    assert 'Its outputs are "LABEL_0", "LABEL_1"' in (card := (out / "README.md").read_text())
    assert 'AutoConfig.from_pretrained(f"{adapter}/base")' in card
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "base/config.json", "fedlora_adapter.json", "sources/1.md", "tokenizer.json"} <= files
    assert not [name for name in files if str(tmp_path).encode() in (out / name).read_bytes()]


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {
    "rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"layer.0.*value": 3}}],
    ids=["rank-stabilised", "patterns"])
@pytest.mark.parametrize("by", ["svd", "prefix"])
def test_scales_stay_and_smaller_layers_are_left_alone(settings, by, checkpoint, tmp_path, capsys):
    folder, out = peft_adapter(checkpoint("bert"), tmp_path / "a", **settings), tmp_path / "new"
    assert run(capsys, "resize", folder, "--rank", "3", "--by", by, "--out", out)[0] == 0
    before, after = loaded(checkpoint("bert"), folder), loaded(checkpoint("bert"), out)
    for name, module in after.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            was = before.base_model.model.get_submodule(name)
            whole = was.get_delta_weight("default").double()
            A, B = was.lora_A["default"].weight[:3].double(), was.lora_B["default"].weight[:, :3].double()
            wanted = cut(whole, 3) if by == "svd" else was.scaling["default"] * B @ A
            assert module.r["default"] == min(3, was.r["default"])
            torch.testing.assert_close(module.get_delta_weight("default").double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_rounding_is_in_the_error(dtype, checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a", dtype=dtype)
    shown = run(capsys, "resize", folder, "--rank", "3", "--out", tmp_path / "new", "--json")[1]
    values = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {value.dtype for name, value in values.items() if "lora_" in name} == {dtype}
    for one in json.loads(shown)["targets"]:
        before, after = (updates(path)[one["target"]] for path in (folder, tmp_path / "new"))
        assert one["error"] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)


def test_an_embedding_is_cut_too(checkpoint, tmp_path, capsys):
    name = "bert.embeddings.word_embeddings"
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a", target_modules=["word_embeddings"])
    assert run(capsys, "resize", folder, "--rank", "2", "--out", tmp_path / "new")[0] == 0
    before, after = (loaded(checkpoint("bert"), path).base_model.model.get_submodule(name).get_delta_weight("default")
                     for path in (folder, tmp_path / "new"))
    torch.testing.assert_close(after, cut(before, 2), atol=1e-5, rtol=1e-4)


def test_nothing_is_overwritten_and_nothing_is_left_after_an_error(checkpoint, tmp_path, capsys, monkeypatch):
    folder = exported(checkpoint("bert"), tmp_path / "a")
    (tmp_path / "there").mkdir()
    assert "is there already" in run(capsys, "resize", folder, "--rank", "1", "--out", tmp_path / "there")[2]
    assert "to cut to rank 3: its layers have rank 3 at most" in run(
        capsys, "resize", folder, "--rank", "3", "--out", tmp_path / "new")[2]
    monkeypatch.setattr("fedlora_adapter.written._card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "resize", folder, "--rank", "1", "--out", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "there"}


def test_a_resized_adapter_can_be_resized_again_and_says_how_it_was_made(checkpoint, tmp_path, capsys):
    folder = peft_adapter(checkpoint("bert"), tmp_path / "a")
    change(folder, base_model_name_or_path=str(checkpoint("bert")))
    run(capsys, "resize", folder, "--rank", "3", "--out", tmp_path / "b")
    assert run(capsys, "resize", tmp_path / "b", "--rank", "2", "--out", tmp_path / "c")[0] == 0
    card, record = (tmp_path / "c" / name for name in ("README.md", "fedlora_adapter.json"))
    assert "--rank 2 --by svd" in card.read_text() and "--rank 3" not in card.read_text()
    assert "--rank 3 --by svd" in (tmp_path / "c" / "sources" / "1.md").read_text()
    assert json.loads(record.read_text())["privacy"] == {
        "epsilon": None, "delta": None, "statements": [], "unknown": ["a"]}
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint("bert")) and config["r"] == 2
    assert not [file for file in (card, record) if str(tmp_path) in file.read_text()]
