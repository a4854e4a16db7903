"""fedlora-adapter route: a folder that PEFT loads with Arrow routing, by the code on its card."""

import json
import re

import pytest
import torch

from fedlora import models
from fedlora.adapters import export
from tests.adapter.adapters import exported, run, updates
from tests.adapter.test_known_epsilon import with_reports
from tests.fedlora.test_adapters import adapted_model, logits, random_state


def language_adapter(base, folder, seed=0, **options):
    adapted = adapted_model(base, "causal-lm", **options)
    return export(adapted, random_state(adapted, seed), folder, "org/tiny")


def routed(capsys, out, *argv):
    code, shown, err = run(capsys, "route", *argv, "--out", out)
    assert code == 0, err
    return shown


def loaded_by_its_card(out, base):
    """Run the code of the card, with the folders that it leaves open."""
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    code = re.sub(r'base, folder = .*', f"base, folder = {str(base)!r}, {str(out)!r}", code)
    names = {}
    exec(code, names)
    return names["model"].eval()


def with_adapter(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(models.load(base, "causal-lm", ()).model, folder).eval()


def test_routing_between_copies_of_one_adapter_is_that_adapter(checkpoint, tmp_path, capsys):
    base = checkpoint("llama")
    folder = with_reports(language_adapter(base, tmp_path / "a"))
    shown = routed(capsys, tmp_path / "route", folder, folder, folder, "--top-k", 2)
    wanted = logits(with_adapter(base, folder))
    torch.testing.assert_close(logits(loaded_by_its_card(tmp_path / "route", base)), wanted, atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "route" / "fedlora_route.json").read_text())
    assert record["arrow"] == {"top_k": 2, "router_temperature": 1.0, "rng_seed": 0}
    assert "ε = 7.99" in shown and record["privacy"]["epsilon"] == pytest.approx(7.99, abs=0.01)
    files = [path for path in (tmp_path / "route").rglob("*") if path.is_file()]
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]


def test_different_ranks_are_filled_up_without_a_change_and_the_router_mixes_the_adapters(checkpoint, tmp_path, capsys):
    base = checkpoint("llama")
    two = [language_adapter(base, tmp_path / str(rank), rank, rank=rank) for rank in (2, 3)]
    routed(capsys, tmp_path / "route", *two, "--top-k", 1)
    for number, folder in enumerate(two, 1):
        mine = updates(tmp_path / "route" / "experts" / str(number))
        for name, update in updates(folder).items():
            torch.testing.assert_close(mine[name], update, atol=1e-9, rtol=1e-6)
    mixed = logits(loaded_by_its_card(tmp_path / "route", base))
    assert mixed.isfinite().all()
    for folder in two:
        assert not torch.allclose(mixed, logits(with_adapter(base, folder)), atol=1e-2)


def test_adapters_that_arrow_cannot_route_are_refused(checkpoint, tmp_path, capsys):
    base = checkpoint("llama")
    one, other = (language_adapter(base, tmp_path / name, targets=(target,)) for name, target in
                  (("q", "q_proj"), ("v", "v_proj")))
    some = language_adapter(base, tmp_path / "some", targets=("model.layers.0.self_attn.q_proj",))
    head = exported(checkpoint("bert"), tmp_path / "head")

    def told(*argv):
        code, _, err = run(capsys, "route", *argv, "--out", tmp_path / "new")
        assert code == 2 and not (tmp_path / "new").exists()
        return err

    assert "is adapted by only one of" in told(one, other)
    assert "a head or a bias would be lost" in told(head, head)
    assert "change q_proj in 1 of 2 blocks" in told(some, some)
    assert "name at least two adapters" in told(one)
    assert "--top-k 3 is more than the 2 adapters" in told(one, one, "--top-k", 3)
