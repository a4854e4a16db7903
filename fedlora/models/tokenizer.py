"""A base model's tokenizer, completed with what the model needs: a pad token, the end of texts, the model's inputs.

The same tokenizer is exported with the adapter, so that those who load it give the model the inputs that the run gave.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlora.models.reading import silent_transformers, unreadable

POOLS_AT_END = frozenset({"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"})
"""Model types whose classifier reads a text at its last end-of-text token.

They need the same number of such tokens in every text of a batch."""


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `fedlora.models.load` returns, without the model, which is quick enough to do first.

    Raises:
        ValueError: the tokenizer has no token to pad with, or has tokens beyond the number of embeddings in
            config.json, or does not end texts for a model that reads a text at its end.
    """
    with silent_transformers():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises errors of many kinds, some of them bare
            raise unreadable(path, error) from error
    return tokenizer_for(path, config, getattr(config.get_text_config(), "vocab_size", None))


def tokenizer_for(path: Path, config: PretrainedConfig, embedded: int | None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and complete it for the model.

    Args:
        path: the model's folder.
        config: the model's config.
        embedded: number of the model's token embeddings; None if any token has one.

    Raises:
        ValueError: the tokenizer does not fit the model, as `load_tokenizer` explains.
    """
    # a text that contains "</s>" as characters must not end twice
    written_out = {"split_special_tokens": True} if config.model_type in POOLS_AT_END else {}
    with silent_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True,
                                                      **written_out)
        except Exception as error:  # tokenizers and transformers raise errors of many kinds, some of them bare
            raise unreadable(path, error) from error
    tokenizer.padding_side = "right"  # as `fedlora.records.collate` pads
    if not _takes_segments(config):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _pad_token(path, tokenizer)
    if embedded is not None:
        _check_embedded(path, tokenizer, embedded)
    if config.model_type in POOLS_AT_END and _last_token(tokenizer) != config.eos_token_id:
        raise ValueError(f"the model in {path} reads a text at the token {config.eos_token_id} that ends it "
                         "(eos_token_id in config.json), but its tokenizer ends no text with that. Give the tokenizer "
                         "a post-processor that does, and save it again.")
    return tokenizer


def _takes_segments(config: PretrainedConfig) -> bool:
    """Return whether the model takes the numbers that distinguish the texts of a pair (token_type_ids).

    Some models without them would take those numbers for tokens.
    """
    return config.model_type == "xlnet" or (getattr(config, "type_vocab_size", None) or 0) > 1


def _last_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the tokenizer puts at the end of every text; None if there is none."""
    ends = {next(reversed(tokenizer(text)["input_ids"]), None) for text in ("a", "b c")}
    last = ends.pop() if len(ends) == 1 else None
    return last if last in tokenizer.all_special_ids else None


def _pad_token(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Choose a pad token for a tokenizer without one.

    It is never the token that ends every text, because a model that ignores padding would ignore that token too.

    Raises:
        ValueError: there is no suitable token.
    """
    ends = _last_token(tokenizer)
    if tokenizer.eos_token is not None:
        for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if token is not None and tokenizer.convert_tokens_to_ids(token) != ends:
                return str(token)
    raise ValueError(f"the tokenizer in {path} has neither a pad token nor an end-of-sequence token"
                     f"{'' if ends is None else ' that does not end every text'}; set a pad token with "
                     "tokenizer.pad_token = … and save the tokenizer again.")


def _check_embedded(path: Path, tokenizer: PreTrainedTokenizerBase, embedded: int) -> None:
    if tokenizer.pad_token_id >= embedded:
        raise ValueError(f"the tokenizer in {path} pads with token {tokenizer.pad_token_id}, but the model has "
                         f"embeddings for {embedded} tokens only; set another pad token with tokenizer.pad_token = "
                         "tokenizer.eos_token and save the tokenizer again, or resize the model's embeddings.")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= embedded:  # a record with such a token would end the round that draws it
        raise ValueError(f"the tokenizer in {path} has tokens up to {largest}, but the model has embeddings for "
                         f"{embedded} only; resize the model's embeddings (resize_token_embeddings) and save both "
                         "again.")
