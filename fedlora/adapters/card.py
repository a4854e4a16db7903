"""README.md of an adapter's folder: what it is, and the lines that load it."""

from __future__ import annotations

import json

from transformers.modeling_utils import PreTrainedModel

from fedlora.tasks import task_named

_CARD = '''---
library_name: peft
{base_model}tags:
- lora
---

A LoRA adapter for {title}, trained with FedLoRA.{labels}

```python
{code}```
'''

_LOADING = '''from peft import PeftModel
from transformers import AutoConfig, {auto}, AutoTokenizer

base, adapter = {base}, {adapter}{what}
config = AutoConfig.from_pretrained(f"{{adapter}}/base")
model = {auto}.from_pretrained(base, config=config{sizes})
model = PeftModel.from_pretrained(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
'''


def card(model: PreTrainedModel, task: str, base_name: str) -> str:
    """The text.

    Args:
        model: whose config says the labels.
        task: its key.
        base_name: a hub id, or a name that is none (it has a colon).
    """
    kind, from_hub = task_named(task), ":" not in base_name
    labels = [_quoted(str(name)) for name in (model.config.id2label or {}).values()] if kind.has_labels else []
    names = f" Its outputs are {', '.join(labels)}, in this order." if labels else ""
    title = base_name if from_hub else f"a {model.config.model_type} model ({base_name})"
    what = "  # this folder" if from_hub else "  # the base model's folder, and this one"
    return _CARD.format(base_model=f"base_model: {base_name}\n" if from_hub else "", title=title, labels=names,
                        code=loading_code(task, _quoted(base_name if from_hub else "…"), '"adapter"', what))


def loading_code(task: str, base: str, adapter: str, what: str = "") -> str:
    """Python that loads an adapter as `model`, with its `tokenizer`.

    Args:
        task: its key.
        base: expression for the base model's hub id or folder.
        adapter: expression for the adapter's folder.
        what: the two are, as a comment.
    """
    kind = task_named(task)
    return _LOADING.format(auto=kind.auto_class.__name__, base=base, adapter=adapter, what=what,
                           sizes=", ignore_mismatched_sizes=True" if kind.has_head else "")


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
