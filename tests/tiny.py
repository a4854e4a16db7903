"""Tiny random base checkpoints of every model type that FedLoRA attaches to, each with a real tokenizer.

They load in milliseconds through the same `Auto` classes as real models, so tests need no mocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

ENCODERS = ("bert", "roberta", "modernbert")
DECODERS = ("llama", "qwen2", "gpt2")
KINDS = ENCODERS + DECODERS

HIDDEN, LAYERS, HEADS, MAX_POSITIONS, VOCABULARY = 32, 2, 4, 256, 320

_SENTENCES = (
    "the patient reports chest pain and shortness of breath since this morning",
    "a small cut on the left hand, cleaned and closed with three stitches",
    "a film that is warm, funny and well acted from the first scene to the last",
    "the plot is dull and the jokes are older than the actors",
    "What is the capital of France? The capital of France is Paris.",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_checkpoint(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random base checkpoint: config.json, model.safetensors and the tokenizer's files.

    Encoders are saved without a task head (`AutoModel`), decoders with their language-model head, as on the hub.
    Hidden size 32, 2 layers, 4 heads (Llama and Qwen2: 2 key-value heads), 256 positions, 320 byte-level BPE tokens.
    Only Qwen2's tokenizer has a pad token of its own; Llama's and GPT-2's have none, as on the hub.

    Args:
        kind: one of `KINDS`.
        folder: made if it does not exist; files of the same names are replaced.
        seed: decides the weights.

    Returns:
        folder.
    """
    tokenizer = tiny_tokenizer(kind)
    config = _config(kind, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (AutoModel if kind in ENCODERS else AutoModelForCausalLM).from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts biases at 0, where a mistake with them would not show
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    # Spare embedding rows, as many real models have: transformers adds <|endoftext|> to Qwen2's tokenizer on loading.
    # The weight scale is one at which two layers of 32 features give logits that are well apart.
    sizes = {"vocab_size": VOCABULARY + 8, "initializer_range": 0.2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        return GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=MAX_POSITIONS, **sizes, **ids)
    sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
              "intermediate_size": 2 * HIDDEN}
    if kind == "bert":
        return BertConfig(max_position_embeddings=MAX_POSITIONS, **sizes, pad_token_id=tokenizer.pad_token_id)
    if kind == "roberta":  # positions are counted from padding_idx + 1
        return RobertaConfig(max_position_embeddings=MAX_POSITIONS + tokenizer.pad_token_id + 1, type_vocab_size=1,
                             **sizes, **ids)
    if kind == "modernbert":
        return ModernBertConfig(max_position_embeddings=MAX_POSITIONS, local_attention=8,
                                cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id,
                                **sizes, **ids)
    decoder = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return decoder(max_position_embeddings=MAX_POSITIONS, num_key_value_heads=HEADS // 2, **sizes, **ids)


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, which can encode any text without unknown tokens."""
    if kind in ENCODERS:
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                   "mask_token": "[MASK]"}
        if kind != "bert":
            special |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    else:
        special = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if kind == "qwen2" else {})
    names = list(dict.fromkeys(special.values()))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(_SENTENCES, BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=names, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    inputs = ["input_ids", "attention_mask"]
    if kind in ENCODERS:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, names.index(name)) for name in ("[CLS]", "[SEP]")])
        inputs += ["token_type_ids"] if kind == "bert" else []
    elif kind == "llama":  # begins every text with <s>; GPT-2 and Qwen2 add nothing
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", names.index("<s>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs,
                                   model_max_length=MAX_POSITIONS, padding_side="right", **special)
    if kind in DECODERS:
        fast.chat_template = _CHAT_TEMPLATE
    return fast
