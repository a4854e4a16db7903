"""The README.md of an exported adapter or merged model: a model card with Python code that loads it.

It begins with the metadata that a model hub reads. The licence is left out, because whoever publishes the adapter has
to choose it. So is the hub's list of results (model-index): it compares models on public data sets, and a run is
evaluated on rows that only its coordinator has.
"""

from __future__ import annotations

import json

from transformers.modeling_utils import PreTrainedModel

from fedlora.adapters.provenance import Provenance, plain, sections
from fedlora.tasks import task_named

_CARD = """---
{metadata}---

# {heading}

{about}

## Use

```python
{code}```
{more}"""

_LOADING = '''from peft import PeftModel
from transformers import AutoConfig, {auto}, AutoTokenizer

base, adapter = {base}, {adapter}{what}
config = AutoConfig.from_pretrained(f"{{adapter}}/base")
model = {auto}.from_pretrained(base, {revision}config=config{sizes})
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
'''

_LOADING_SAVED = '''from fedlora.adapters import load
from transformers import AutoTokenizer

base, adapter = {base}, {adapter}{what}
model = load(adapter, base{download}).model
tokenizer = AutoTokenizer.from_pretrained(adapter)
'''

_LOADING_MERGED = '''from transformers import {auto}, AutoTokenizer

folder = {folder}{what}
model = {auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
'''

_LEFT = """ Its tokenizer pads at the left, as `generate` needs it; for the logits of several texts
at once, and for training, set `tokenizer.padding_side = "right"`."""

_PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation", "TOKEN_CLS": "token-classification",
              "SEQ_2_SEQ_LM": "text2text-generation", "QUESTION_ANS": "question-answering"}
"""PEFT's task type → the hub's."""


def padding_side(task: str) -> str:
    """Return the side on which an exported adapter's tokenizer pads.

    For text generation that is the left side, because a model continues a text after its last token.
    """
    return "left" if task_named(task).peft_type == "CAUSAL_LM" else "right"


def card(model: PreTrainedModel, task: str, base_name: str, revision: str | None = None, *,
         run: Provenance | None = None, merged: str = "", family: str = "", form: str = "LoRA") -> str:
    """Return the text of an adapter's or a merged model's README.md.

    Args:
        model: the adapted model. Its config has the names of the labels.
        task: key of the task.
        base_name: the base model's hub id, or a title with a colon ("local:…") if it has none.
        revision: commit of the base model on the hub, if it is known.
        run: the facts about the run behind the adapter; None to say nothing of it.
        merged: for a merged model the dtype of its weights, as in "float32"; "" for an adapter.
        family: for an adapter in our own form the key of its family; "" for one in PEFT's format.
        form: the kind of the adapter.
    """
    kind, from_hub = task_named(task), ":" not in base_name
    title = base_name if from_hub else f"a {model.config.model_type} model ({base_name})"
    if merged:
        about = f"A LoRA adapter, trained with FedLoRA, merged into the weights ({merged}) of {title}."
        code = loading_merged(task, '"model"', "  # this folder")
    else:
        about = f"A {form} adapter for {title}, trained with FedLoRA."
        what = "  # this folder" if from_hub else "  # the base model's folder, and this one"
        if family:
            about += (f" Its family, {family}, is one that PEFT does not know: FedLoRA itself (`pip install fedlora`) "
                      "loads it.")
            code = _LOADING_SAVED.format(
                base=_quoted(f"{base_name}@{revision}" if revision else base_name) if from_hub else _quoted("…"),
                adapter='"adapter"', what=what, download=", allow_download=True" if from_hub else "")
        else:
            code = loading_code(task, _quoted(base_name if from_hub else "…"), '"adapter"', what, revision=revision)
    labels = [plain(_quoted(str(name))) for name in (model.config.id2label or {}).values()] if kind.has_labels else []
    about += f" Its outputs are {', '.join(labels)}, in this order." if labels else ""
    about += _LEFT if padding_side(task) == "left" else ""
    metadata = _metadata(task, base_name if from_hub else "", merged != "", family)
    return _CARD.format(metadata=metadata, about=about, code=code,
                        heading=f"{'Model' if merged else 'Adapter'} for {_pipeline(task) or plain(task)}",
                        more=f"\n{sections(run)}\n" if run is not None else "")


def _pipeline(task: str) -> str:
    return _PIPELINES.get(task_named(task).peft_type, "")


def _metadata(task: str, base_name: str, merged: bool, family: str = "") -> str:
    """Return the YAML at the beginning of a card.

    Args:
        task: key of the task.
        base_name: the base model's hub id; "" if it has none.
        merged: whether the card is a merged model's.
        family: the family of an adapter in our own form; "" otherwise.
    """
    lines = ["# license: for whoever publishes this to choose; the base model's holds too",
             f"library_name: {'transformers' if merged else 'fedlora' if family else 'peft'}"]
    if base_name:
        lines += [f"base_model: {base_name}", f"base_model_relation: {'finetune' if merged else 'adapter'}"]
    if pipeline := _pipeline(task):
        lines.append(f"pipeline_tag: {pipeline}")
    lines += ["tags:", *(f"- {tag}" for tag in ("lora", "fedlora", "federated-learning"))]
    return "".join(f"{line}\n" for line in lines)


def loading_code(task: str, base: str, adapter: str, what: str = "", *, revision: str | None = None) -> str:
    """Return Python code that loads an adapter as `model`, with its `tokenizer`.

    Args:
        task: key of the task.
        base: Python expression for the base model's hub id or folder.
        adapter: Python expression for the adapter's folder.
        what: a comment that explains the two; "" for none.
        revision: commit of the hub's model that the adapter was trained on; None if it is not known.
    """
    kind = task_named(task)
    return _LOADING.format(auto=kind.auto_class.__name__, base=base, adapter=adapter, what=what,
                           revision=f"revision={_quoted(revision)}, " if revision else "",
                           sizes=", ignore_mismatched_sizes=True" if kind.has_head else "")


def loading_merged(task: str, folder: str, what: str = "") -> str:
    """Return Python code that loads a merged model as `model`, with its `tokenizer`.

    Args:
        task: key of the task.
        folder: Python expression for the model's folder.
        what: a comment that explains it; "" for none.
    """
    return _LOADING_MERGED.format(auto=task_named(task).auto_class.__name__, folder=folder, what=what)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
