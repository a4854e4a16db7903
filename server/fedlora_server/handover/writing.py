"""Texts written by an adapted language model: prompts as the run's records began, continued token by token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fedlora.adapters import AdaptedModel
from fedlora.memory import memory_advice
from fedlora.models.reading import silent_transformers

Turns = tuple[tuple[str, str], ...]
"""A prompt, as the turns of a conversation: (role, content). A text without a conversation is one turn of the user."""


class Writer:
    """A writer of texts. Without a temperature, it takes the likeliest token each time.

    Args:
        adapted: the adapted language model.
        device: where to compute.
        chat: write prompts into the tokenizer's chat template, if it has one.
        system: text of a system turn before each prompt; None for none.
        most_new: most tokens to write for a prompt.
        temperature: draw tokens at random, the more freely the higher; None for the likeliest.
        seed: seed of these draws.

    Attributes:
        chat: whether prompts are written into a chat template.

    Raises:
        ValueError: a system text is given, and there is no chat template to hold it.
    """

    def __init__(self, adapted: AdaptedModel, *, device: torch.device, chat: bool = True, system: str | None = None,
                 most_new: int = 128, temperature: float | None = None, seed: int = 0) -> None:
        self._model: Any = adapted.model.to(device)  # type: ignore[arg-type]  # transformers annotates it for `self`
        self._model.config.use_cache = True  # loading turns the cache off for training
        self._tokenizer: Any = copy.deepcopy(adapted.tokenizer)
        self._tokenizer.padding_side = "left"  # a model continues a text after its last token
        self._device, self._system, self._most_new, self._seed = device, system, most_new, seed
        self.chat = chat and bool(self._tokenizer.chat_template)
        if system is not None and not self.chat:
            raise ValueError("--system needs a chat template, and " + (
                "--plain leaves it out" if not chat else "the model's tokenizer has none") + "; leave --system out")
        config = copy.deepcopy(self._model.generation_config)
        config.update(do_sample=temperature is not None, pad_token_id=self._tokenizer.pad_token_id, use_cache=True,
                      **({} if temperature is None else {"temperature": temperature}))
        if config.eos_token_id is None:
            config.eos_token_id = self._tokenizer.eos_token_id
        self._config = config

    def write(self, prompts: Sequence[Turns]) -> list[str]:
        """Return the text that follows each prompt.

        Raises:
            ValueError: the chat template cannot write a prompt, or a prompt leaves the model no room.
            MemoryError: memory ran out. The message says what helps.
        """
        tokens = [self._tokens(turns) for turns in prompts]
        longest = max(map(len, tokens))
        config = copy.deepcopy(self._config)
        config.max_new_tokens = self._room(longest)
        batch = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self._device)
        torch.manual_seed(self._seed)
        # silent, because it warns about settings of the model's authors that do not apply here
        with (torch.no_grad(), silent_transformers(),
              memory_advice("writing", "lower --batch-size or --max-new-tokens")):
            found = self._model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                         generation_config=config)
        texts: list[str] = self._tokenizer.batch_decode(found[:, batch["input_ids"].shape[1]:],
                                                        skip_special_tokens=True)
        return texts

    def _tokens(self, turns: Turns) -> list[int]:
        """Return a prompt's tokens, as a record of the run begins."""
        if self.chat:
            said = [*([("system", self._system)] if self._system else []), *turns]
            try:
                text = self._tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in said], tokenize=False,
                    add_generation_prompt=True)
            except Exception as error:  # a template is a program, and may raise anything
                raise ValueError(f"the tokenizer's chat template cannot write this prompt ({type(error).__name__}: "
                                 f"{error}); --plain leaves it out") from None
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            if len(turns) > 1:
                raise ValueError("a conversation of several turns needs the model's chat template; leave --plain out, "
                                 "or give prompts as text")
            ids = self._tokenizer(turns[0][1])["input_ids"]
            if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers end every text
        if not ids:
            raise ValueError("a prompt has no token; write at least a word")
        return ids

    def _room(self, longest: int) -> int:
        """Return the most tokens to write after a prompt of so many tokens.

        Raises:
            ValueError: the model has no room for any.
        """
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(positions, int):
            return self._most_new
        if longest >= positions:
            raise ValueError(f"a prompt has {longest:,} tokens, and the model has room for {positions:,} with what it "
                             "writes; shorten the prompt")
        return min(self._most_new, positions - longest)
