"""Tiny random base checkpoints, one of every architecture that FedLoRA supports, in the form of its published models.

`tests.tiny` has the few that most tests use. These are for tests of what holds for all; each takes some 50 ms to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CanineTokenizer

from tests.tiny import VOCABULARY, tiny_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 130, "initializer_range": 0.2}
GROUPED = SIZES | {"num_key_value_heads": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 130,
           "init_std": 0.2}
EXPERTS = GROUPED | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """How to make one architecture's checkpoint.

    Attributes:
        sizes: config values that make the model tiny.
        tokenizer: one of the tokenizers below.
        decoder: whether it is saved with a language-model head.
        targets: value of --targets, where no default is known for the architecture; () for the default.
        private: whether it can be trained with privacy.
    """

    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    tokenizer: str = "roberta"
    decoder: bool = False
    targets: tuple[str, ...] = ()
    private: bool = True


def _decoder(sizes: Mapping[str, Any] = GROUPED, tokenizer: str = "llama", **others: Any) -> Architecture:
    return Architecture(sizes, tokenizer, decoder=True, **others)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(tokenizer="bert"),
    "roberta": Architecture(),
    "xlm-roberta": Architecture(),
    "distilbert": Architecture({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.2,
                                "max_position_embeddings": 130}),
    "deberta-v2": Architecture(SIZES | {"relative_attention": True, "position_buckets": 16, "share_att_key": True,
                                        "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm",
                                        "type_vocab_size": 0, "position_biased_input": False}),
    "albert": Architecture(SIZES | {"embedding_size": 16}, "bert"),
    "electra": Architecture(SIZES | {"embedding_size": 16}, "bert"),
    "mpnet": Architecture(targets=("q", "v")),
    "modernbert": Architecture(SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2}),
    "ernie": Architecture(tokenizer="bert"),
    "roformer": Architecture(SIZES | {"embedding_size": 32}, "bert"),
    "canine": Architecture(SIZES | {"num_hash_buckets": 64}, "canine", private=False),
    "bart": Architecture(SEQ2SEQ, "ends"),
    "mbart": Architecture(SEQ2SEQ, "ends"),
    "t5": Architecture({"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "ends",
                       targets=("q", "v")),
    "gpt2": _decoder({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 130, "initializer_range": 0.2}, "gpt2"),
    "gpt_neo": _decoder({"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 130,
                         "attention_types": [[["global", "local"], 1]], "initializer_range": 0.2}, "gpt2"),
    "gpt_neox": _decoder(SIZES, "gpt2"),
    "opt": _decoder({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
                     "max_position_embeddings": 130, "word_embed_proj_dim": 32, "init_std": 0.2}, "gpt2"),
    "bloom": _decoder({"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}, "qwen2"),
    "falcon": _decoder({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2},
                       "gpt2"),
    "mpt": _decoder({"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 130}, "gpt2"),
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(tokenizer="qwen2"),
    "qwen3": _decoder(GROUPED | {"head_dim": 8}, "qwen2"),
    "gemma": _decoder(GROUPED | {"head_dim": 8}),
    "gemma2": _decoder(GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_text": _decoder(GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi": _decoder(SIZES, "gpt2"),
    "phi3": _decoder(),
    "stablelm": _decoder(tokenizer="gpt2"),
    "starcoder2": _decoder(tokenizer="gpt2"),
    "olmo2": _decoder(tokenizer="gpt2"),
    "smollm3": _decoder(),
    "mixtral": _decoder(GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": _decoder(EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}, "qwen2"),
    "qwen3_moe": _decoder(EXPERTS | {"num_experts": 4, "head_dim": 8}, "qwen2"),
}
"""Model type → how to make its checkpoint."""


def architecture(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint: config.json, model.safetensors and the tokenizer's files.

    Args:
        name: key of `ARCHITECTURES`.
        folder: made if it does not exist.
        seed: decides the weights.

    Returns:
        folder.
    """
    made = ARCHITECTURES[name]
    tokenizer = CanineTokenizer() if made.tokenizer == "canine" else _ends() if made.tokenizer == "ends" else (
        tiny_tokenizer(made.tokenizer))
    ids = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("pad", "bos", "eos")}
    if made.tokenizer == "ends":
        ids["decoder_start_token_id"] = ids["eos_token_id"]
    vocabulary = {} if made.tokenizer == "canine" else {"vocab_size": VOCABULARY + 8}
    config = AutoConfig.for_model(name, **made.sizes, **vocabulary, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (AutoModelForCausalLM if made.decoder else AutoModel).from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # biases start at 0, where a mistake with them would not show
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ends() -> Any:
    """Return a tokenizer that ends every text with </s> and has a pad token."""
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    return tokenizer
