"""Base models: finding their folders, checking that they are the plan's model, and loading them.

A base model is a folder as `save_pretrained` writes it: config.json, safetensors weights and the tokenizer's files. It
is pinned by the hashes of its content (`fedlora.plan.ModelRef`). Weights are loaded from safetensors only, and code
that comes with a model is never run.
"""

from fedlora.models.folder import (
    MINILM_REPOSITORY,
    MINILM_WEIGHTS_SHA256,
    TOKENIZER_FILES,
    base_name,
    hub_name,
    is_hub_name,
    most_adapter_bytes,
    obtain,
    reference,
    resolve,
    verify,
    weight_files,
)
from fedlora.models.loading import MOST_WEIGHT, LoadedModel, embedded_tokens, load
from fedlora.models.reading import check_task
from fedlora.models.tokenizer import load_tokenizer
from fedlora.plan import ModelRef

__all__ = ["MINILM_REPOSITORY", "MINILM_WEIGHTS_SHA256", "MOST_WEIGHT", "TOKENIZER_FILES", "LoadedModel", "ModelRef",
           "base_name", "check_task", "embedded_tokens", "hub_name", "is_hub_name", "load", "load_tokenizer",
           "most_adapter_bytes", "obtain", "reference", "resolve", "verify", "weight_files"]
