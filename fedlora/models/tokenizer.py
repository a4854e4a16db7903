"""A base model's tokenizer, made to say all that the model needs: what pads, where a text ends, which inputs there are.

It is the one that goes with the adapter: whoever loads that gives the model what the run gave it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlora.models.reading import silent_transformers, unreadable

POOLS_AT_END = frozenset({"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"})
"""Model types whose classifier reads the last end-of-text token, and wants as many of them in every text of a batch."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `fedlora.models.load` gives, without the model: quick enough to be done before anything else.

    Raises:
        ValueError: it has no token to pad with, tokens beyond the embeddings that config.json gives the model, or no
            end of a text for a model that reads it there.
    """
    with silent_transformers():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers' own, some of them bare
            raise unreadable(path, error) from error
    return tokenizer_for(path, config, getattr(config.get_text_config(), "vocab_size", None))


def tokenizer_for(path: Path, config: PretrainedConfig, embedded: int | None) -> PreTrainedTokenizerBase:
    """See `load_tokenizer`.

    Args:
        embedded: number of the model's embeddings; None where any token has one.
    """
    # a text that holds </s> in writing must not end twice
    written_out = {"split_special_tokens": True} if config.model_type in POOLS_AT_END else {}
    with silent_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True,
                                                      **written_out)
        except Exception as error:  # tokenizers' and transformers' own, some of them bare
            raise unreadable(path, error) from error
    tokenizer.padding_side = "right"  # as records are padded here
    if not _takes_segments(config):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _pad_token(path, tokenizer)
    if embedded is not None:
        _check_embedded(path, tokenizer, embedded)
    if config.model_type in POOLS_AT_END and _last_token(tokenizer) != config.eos_token_id:
        raise ValueError(f"the model in {path} reads a text where token {config.eos_token_id} ends it (eos_token_id in "
                         "config.json), and its tokenizer ends no text with that. Give the tokenizer a post-processor "
                         "that does, and save it again.")
    return tokenizer


def _takes_segments(config: PretrainedConfig) -> bool:
    """Whether the model tells the texts of a pair apart. Some others would take the numbers for tokens."""
    return config.model_type == "xlnet" or (getattr(config, "type_vocab_size", None) or 0) > 1


def _last_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """With which every text ends; None if texts end with what they end with."""
    ends = {next(reversed(tokenizer(text)["input_ids"]), None) for text in ("a", "b c")}
    last = ends.pop() if len(ends) == 1 else None
    return last if last in tokenizer.all_special_ids else None


def _pad_token(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """For a tokenizer without one. Never the token that ends every text: where padding is skipped, so would that be."""
    ends = _last_token(tokenizer)
    if tokenizer.eos_token is not None:
        for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if token is not None and tokenizer.convert_tokens_to_ids(token) != ends:
                return token
    raise ValueError(f"the tokenizer in {path} has neither a pad token nor an end-of-sequence token"
                     f"{'' if ends is None else ' that does not end every text'}; set one with "
                     "tokenizer.pad_token = … and save it again.")


def _check_embedded(path: Path, tokenizer: PreTrainedTokenizerBase, embedded: int) -> None:
    if tokenizer.pad_token_id >= embedded:
        raise ValueError(f"the tokenizer in {path} pads with token {tokenizer.pad_token_id}, and the model has "
                         f"embeddings for {embedded}; set another one with tokenizer.pad_token = "
                         "tokenizer.eos_token and save it again, or resize the model's embeddings.")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= embedded:  # else the record that has it ends the round that draws it
        raise ValueError(f"the tokenizer in {path} has tokens up to {largest}, and the model has embeddings for "
                         f"{embedded}; resize the model's embeddings (resize_token_embeddings) and save both again.")
