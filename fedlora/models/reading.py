"""Checks of a model folder's files before anything is loaded, and explanations of files that cannot be read."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import logging as transformers_logging
from transformers.models.auto import modeling_auto

from fedlora.tasks import task_named

_POINTER = b"version https://git-lfs"
_LOADING = threading.RLock()


def config_of(path: Path) -> Mapping[str, Any]:
    """Return the content of a model folder's config.json.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise unreadable(path, file=path / "config.json")
    return config


def check_task(path: Path, task: str, max_length: int | None = None) -> None:
    """Check from config.json alone that a model can do a task, which is quick enough to do first.

    Args:
        path: the model's folder.
        task: key of the task.
        max_length: most tokens of a record; None to leave that unchecked.

    Raises:
        ValueError: the model is an encoder and the task needs a language model; transformers does not offer this model
            type for the task; the weights are quantised; or records can be longer than the model's positions.
    """
    config = config_of(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path / 'config.json'} names no model_type: it is not the config of a transformers model. "
                         "Name the folder that save_pretrained wrote.")
    encoder = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind = task_named(task)
    if why := kind.why_not(model_type, encoder=encoder):
        raise ValueError(f"{path} {why}")
    if model_type not in kind.model_types:
        raise ValueError(f"{path} has model type {model_type!r}, which transformers does not offer for {task} without "
                         "code from the model's own repository. Such code is never run. Choose another model.")
    if quantised := config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else "unnamed"
        raise ValueError(f"{path} is quantised (quantization_config in config.json, method {method}), but adapters are "
                         "only trained on weights of 16 or 32 bits. Choose the model that it was made from, or "
                         "save it dequantised (model.dequantize()) without quantization_config.")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if positions is not None and any(name in model_type for name in ("roberta", "camembert")):
        positions -= (config.get("pad_token_id", 1) or 0) + 1  # these models start positions at the pad token's id + 1
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"max_length is {max_length}, and {path} has {positions} positions; lower --max-length.")


def unreadable(path: Path, error: BaseException | None = None, *, file: Path | None = None) -> ValueError:
    """Return an error that says why a model's folder or file cannot be read, and what to do.

    Args:
        path: the model's folder.
        error: the error that a library raised, if any.
        file: the file that cannot be read, if it is known.
    """
    pointer = next((one for one in sorted(path.iterdir()) if one.is_file() and _begins_as_pointer(one)), None)
    if pointer is not None:
        return ValueError(f"{pointer} cannot be read: it is a pointer of Git LFS in place of the file itself. Fetch "
                          "the model again, with git lfs pull or through the hub.")
    why = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})" if error else ""
    if isinstance(error, ImportError):
        return ValueError(f"{path} needs a package that is not installed{why}. Install it, or remove the setting in "
                          "config.json that asks for it.")
    if file is not None:
        return ValueError(f"{file} cannot be read: it is not what save_pretrained writes, so it is damaged or was not "
                          "fetched completely. Fetch the model again.")
    return ValueError(f"{path} cannot be read{why}: it is damaged, was not fetched completely, or was made for another "
                      f"version of transformers than {transformers.__version__}. Fetch the model again.")


def _begins_as_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its report on missing heads while a model is loaded.

    The report would mislead, because the server sends the missing parameters. Only one thread loads at a time:
    transformers changes settings of the whole process meanwhile (whether weights are tied, say).
    """
    with _LOADING:
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        # the ignored errors: transformers leaves these functions without types
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
