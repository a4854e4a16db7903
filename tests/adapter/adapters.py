"""Small adapters in PEFT's format for the tests of fedlora-adapter, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedlora.adapters import export
from fedlora_adapter.cli import main
from tests.families import FAMILIES
from tests.fedlora.test_adapters import LABELS, adapted_model, random_state

ONLY = ("query", "value")
RESCALED = "row-scale"
"""A family whose adapters are no product of two factors: they are in PEFT's DoRA format."""
LOW_RANK = [family for family in FAMILIES if family not in (RESCALED, "row-scale-frozen-a", "bat", "dora")]


def classifier(base: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS)


def peft_adapter(base: Path, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, head: bool = True,
                 **settings: Any) -> Path:
    """Write a random adapter with PEFT itself. All of them have the same head if `head`, as drawn from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = classifier(base)
        config = {"r": 4, "lora_alpha": 6, "target_modules": list(ONLY), "task_type": "SEQ_CLS" if head else None,
                  "modules_to_save": ["classifier"] if head else None} | settings
        model = get_peft_model(made, LoraConfig(**config))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(folder))
    change(folder, base_model_name_or_path="org/tiny")
    if dtype != torch.float32:
        weights = folder / "adapter_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    return folder


def exported(base: Path, folder: Path, family: str = "lora", *, seed: int = 0, name: str = "org/tiny",
             **options: Any) -> Path:
    """Write an adapter with random values as a run of ours exports it."""
    adapted = adapted_model(base, "classification", family, **options)
    return export(adapted, random_state(adapted, seed), folder, name)


def loaded(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(classifier(base), folder).eval()


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Compute each layer's ΔW as PEFT's documentation states it, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    values = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in values.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = len(A), config["alpha_pattern"].get(name, config["lora_alpha"])
            scale = alpha / (rank ** 0.5 if config["use_rslora"] else rank)
            found[name] = scale * values[key.replace("lora_A", "lora_B")].double() @ A.double()
    return found


def change(folder: Path, **settings: object) -> None:
    """Change settings of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Call fedlora-adapter in this process; return its exit code, its stdout and its stderr."""
    capsys.readouterr()  # what loading printed before
    try:
        code = main([str(word) for word in argv])
    except SystemExit as ended:
        code = int(str(ended.code))
    return code, *capsys.readouterr()
