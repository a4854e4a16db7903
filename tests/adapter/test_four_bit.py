"""fedlora-adapter prune-base --four-bit: QLoRAM, a pruned base in 4 bits that PEFT trains on."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.adapter.adapters import run
from tests.fedlora.test_adapters import batch


def test_an_adapter_that_peft_trained_on_four_bits_is_recovered_for_the_full_model(checkpoint, tmp_path, capsys):
    base, small, trained, out = checkpoint("llama"), tmp_path / "small", tmp_path / "trained", tmp_path / "full"
    code, _, err = run(capsys, "prune-base", base, "--ratio", 0.5, "--four-bit", "--out", small)
    assert code == 0, err
    stored = load_file(small / "model.safetensors")
    weight = stored["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.uint8 and weight.numel() == 32 * 32 / 2, "two of the values that are left in a byte"

    torch.manual_seed(0)
    model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(small))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"],
                                             task_type="CAUSAL_LM"))
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    torch.optim.SGD(factors, lr=1.0).step()
    model.save_pretrained(trained)

    code, shown, err = run(capsys, "recover", trained, "--pruned", small, "--base", base, "--out", out)
    assert code == 0 and "4 of 4 layers were spread" in shown, err
    kept = json.loads((small / "fedlora_pruned.json").read_text())["kept"]
    narrow, wide = (load_file(folder / "adapter_model.safetensors") for folder in (trained, out))
    for block in ("0", "1"):
        name = f"base_model.model.model.layers.{block}.mlp.down_proj.lora_"
        A, B = (wide[f"{name}{factor}.weight"] for factor in "AB")
        assert torch.equal(A[:, kept[block]["neurons"]], narrow[f"{name}A.weight"]) and A.count_nonzero() == 2 * 32
        assert torch.equal(B, narrow[f"{name}B.weight"]) and B.any(), "the step moved B"
    with torch.no_grad():
        full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
        tuned = full(**batch()).logits
        with full.disable_adapter():
            plain = full(**batch()).logits
    assert tuned.isfinite().all() and not torch.allclose(tuned, plain)
