"""The README.md of an exported adapter: what the adapter is, and Python code that loads it."""

from __future__ import annotations

import json

from transformers.modeling_utils import PreTrainedModel

from fedlora.tasks import task_named

_CARD = '''---
library_name: peft
{base_model}tags:
- lora
---

A LoRA adapter for {title}, trained with FedLoRA.{notes}

```python
{code}```
'''

_LOADING = '''from peft import PeftModel
from transformers import AutoConfig, {auto}, AutoTokenizer

base, adapter = {base}, {adapter}{what}
config = AutoConfig.from_pretrained(f"{{adapter}}/base")
model = {auto}.from_pretrained(base, {revision}config=config{sizes})
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
'''

_LEFT = """ Its tokenizer pads at the left, as `generate` needs it; for the logits of several texts
at once, and for training, set `tokenizer.padding_side = "right"`."""


def padding_side(task: str) -> str:
    """Return the side on which an exported adapter's tokenizer pads.

    For text generation that is the left side, because a model continues a text after its last token.
    """
    return "left" if task_named(task).peft_type == "CAUSAL_LM" else "right"


def card(model: PreTrainedModel, task: str, base_name: str, revision: str | None = None) -> str:
    """Return the text of an adapter's README.md.

    Args:
        model: the adapted model. Its config has the names of the labels.
        task: key of the task.
        base_name: the base model's hub id, or a title with a colon ("local:…") if it has none.
        revision: commit of the base model on the hub, if it is known.
    """
    kind, from_hub = task_named(task), ":" not in base_name
    labels = [_quoted(str(name)) for name in (model.config.id2label or {}).values()] if kind.has_labels else []
    notes = f" Its outputs are {', '.join(labels)}, in this order." if labels else ""
    if padding_side(task) == "left":
        notes += _LEFT
    title = base_name if from_hub else f"a {model.config.model_type} model ({base_name})"
    what = "  # this folder" if from_hub else "  # the base model's folder, and this one"
    return _CARD.format(base_model=f"base_model: {base_name}\n" if from_hub else "", title=title, notes=notes,
                        code=loading_code(task, _quoted(base_name if from_hub else "…"), '"adapter"', what,
                                          revision=revision))


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


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
