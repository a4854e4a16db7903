"""Loading of a base model for a task, with checks that its weights are complete and of ordinary size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlora.memory import memory_advice
from fedlora.models.head import follow_names
from fedlora.models.reading import check_task, config_of, silent_transformers, unreadable
from fedlora.models.tokenizer import tokenizer_for
from fedlora.task import Task
from fedlora.tasks import task_named

MOST_WEIGHT = 1e6
"""Largest magnitude of a base model's weight. The server chooses the base model, so its content is not trusted."""

_DRAWN = ("pooler", "contact_head")
"""Parts of an encoder that checkpoints made for other tasks may lack. They are drawn at random."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory, in eval mode.

    Attributes:
        model: the model for the task, without an adapter. Its config has the labels' names and the pad token.
        tokenizer: the model's tokenizer, which has a pad token (see `fedlora.models.tokenizer`).
        missing: names of the parameters that are not in the checkpoint (such as the task's head), sorted. transformers
            has drawn them at random.
        task: key of the task (see `fedlora.tasks`).
        path: the model's folder.
        said: a message about the head for the user who started the run; "" for none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: tuple[str, ...]
    task: str
    path: Path
    said: str = ""


@memory_advice("loading the base model", "close other programs, or start the run with a smaller --model")
def load(path: Path, task: str, labels: Sequence[str] | int, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a base model for a task on the CPU, in eval mode, with transformers' fused attention if it has one.

    Args:
        path: the folder that `resolve` returned.
        task: key of the task.
        labels: the run's label set in the order of the classifier's outputs, or the number of labels while their names
            are not known; () or 0 if there are none. The checkpoint's own head is kept if it has as many outputs; its
            rows are put in the order of the names. Otherwise the head counts as missing.
        dtype: dtype of the weights.

    Raises:
        ValueError: the model cannot do the task, its weights do not fit its config, or its tokenizer does not fit it.
        MemoryError: memory ran out. The message says what helps.
    """
    check_task(path, task)
    kind = task_named(task)
    names = () if isinstance(labels, int) else tuple(labels)
    with silent_transformers():
        try:
            model, info = kind.auto_class.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
                **kind.model_options(labels if isinstance(labels, int) else len(names)))
        except (MemoryError, RuntimeError):
            raise
        except Exception as error:  # safetensors and transformers raise errors of many kinds, some of them bare
            raise unreadable(path, error) from error
    absent = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = tuple(sorted(absent & {name for name, _ in model.named_parameters()}))
    _check_present(path, model, missing, kind)
    _check_weights(path, model)
    said = follow_names(model, kind.head(model), missing, config_of(path).get("id2label"), names)
    tokenizer = tokenizer_for(path, model.config, embedded_tokens(model))
    _set_pad_token(model.config, tokenizer.pad_token_id)
    model.config.use_cache = False  # the cache of keys and values only serves generation
    return LoadedModel(model.eval(), tokenizer, missing, task, path, said)


def embedded_tokens(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that the model has embeddings for.

    None if the model computes an embedding for any number, as CANINE does for a character's code.
    """
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        weight = None
    return None if weight is None else len(weight)


def _set_pad_token(config: PretrainedConfig, pad: int | None) -> None:
    """Set the pad token in the config, where a decoder's classifier looks for it.

    An encoder that has a pad token keeps its own, because some encoders count positions from it.
    """
    own = config.get_text_config()
    if own.pad_token_id is None or config.model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        config.pad_token_id = own.pad_token_id = pad


def _check_present(path: Path, model: PreTrainedModel, missing: Sequence[str], kind: type[Task]) -> None:
    """Check that the checkpoint lacks no parameters except those of a head.

    Raises:
        ValueError: another parameter is missing.
    """
    base = f"{model.base_model_prefix}."
    lacking = [name for name in missing if not kind.has_head or (
        name.startswith(base) and not any(part in _DRAWN for part in name.split(".")))]
    if lacking:
        raise ValueError(f"the weights in {path} are not those of its config.json: they lack {lacking[0]}"
                         f"{' and more' if len(lacking) > 1 else ''}, or have it with another shape. Fetch the model "
                         "again.")


def _check_weights(path: Path, model: PreTrainedModel) -> None:
    """Check the magnitude of all weights. Larger ones could only serve to magnify rounding.

    Raises:
        ValueError: a weight is not finite, or is larger than `MOST_WEIGHT`.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if not torch.linalg.vector_norm(parameter.detach(), ord=math.inf) <= MOST_WEIGHT:
            raise ValueError(f"{path} holds a value in {name} that is not finite or is beyond {MOST_WEIGHT:g}, which "
                             "training never produces: the model is damaged, or was made to do harm. Fetch it again, "
                             "or choose another")
