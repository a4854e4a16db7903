"""A table of base models as users may have them: the output of a small simulation of each, and its adapter's loss.

    python -P tests/inputs_models.py [--only WORD] > table.md

makes each input in a temporary folder and runs `fedlora-simulate` on it for one round. If the run succeeds, the
adapter is loaded by the lines of its README.md (or of the project's, for versions that write none), and its loss on the
held-out rows is compared with the report's. For conversations, the table also shows what the assistant learns. The code
that runs is the one on PYTHONPATH, so two versions can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.architectures import architecture

LIMIT_S = 60

Change = Callable[[Path], Any]
INPUTS: dict[str, tuple[str, tuple[Change, ...], tuple[str, ...]]] = {}
"""Description of an input → architecture, functions that change its folder, and further options.

The last function returns the value of --model if that is not the folder.
"""

PRIVATE = ("--epsilon=8", "--delta=1e-3", "--declared-size=20", "--batch-size=4")
PLAIN = ("--privacy=off", "--epsilon=inf")
CHAT = "--task=causal-lm"
ALL = "--targets=all"

WORDS = ("a warm and funny film", "dull from start to end", "I laughed all the way", "nobody would sit through it")
TURNS = (("user", "one"), ("assistant", "<think>why</think> two"), ("user", "three"), ("assistant", "four"))


def config(**values: Any) -> Change:
    """Set these values in config.json; None removes one."""
    def change(base: Path) -> None:
        file = base / "config.json"
        made = json.loads(file.read_text()) | values
        file.write_text(json.dumps({name: value for name, value in made.items() if value is not None}))

    return change


def write(name: str, content: str | bytes) -> Change:
    return lambda base: (base / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def remove(*names: str) -> Change:
    return lambda base: [(base / name).unlink(missing_ok=True) for name in names] and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        change(tensors)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    return changed


def without(part: str) -> Change:
    return weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


def tokenizer(change: Callable[[Any], Any]) -> Change:
    def changed(base: Path) -> None:
        made = AutoTokenizer.from_pretrained(base)
        change(made)
        made.save_pretrained(base)

    return changed


def ends_texts(made: Any) -> None:
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", made.eos_token_id)])


def template(text: str) -> Change:
    return tokenizer(lambda made: setattr(made, "chat_template", text))


def own_head(*names: str) -> Change:
    def change(base: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names),
                                                                   id2label=dict(enumerate(names)))
        model.save_pretrained(base)

    return change


def shards(missing: bool = False) -> Change:
    def change(base: Path) -> None:
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="40KB")
        (base / "model.safetensors").unlink(missing_ok=True)
        if missing:
            next(base.glob("model-00002*")).unlink()

    return change


def model(name: str) -> Change:
    """Have --model name this, and not the folder."""
    return lambda base: name


def moved(name: str) -> Change:
    return lambda base: base.rename(base.parent / name)


PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"
PIECE = "[{{ m.role }}]{{ m.content }};"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

for what, base, changes, *options in [
        # the folder
        ("a folder without config.json", "bert", [remove("config.json")]),
        ("config.json is empty", "bert", [write("config.json", "")]),
        ("config.json is a list", "bert", [write("config.json", "[]")]),
        ("config.json is a pointer of Git LFS", "bert", [write("config.json", POINTER)]),
        ("config.json without model_type", "bert", [config(model_type=None)]),
        ("a model type of the future", "bert", [config(model_type="bert-9000")]),
        ("a model type of its repository's own code", "bert", [config(
            model_type="mine", auto_map={"AutoModel": "mine.Mine"})]),
        ("weights in pytorch_model.bin alone", "bert", [remove("model.safetensors"), write("pytorch_model.bin", "x")]),
        ("model.safetensors is a pointer of Git LFS", "bert", [write("model.safetensors", POINTER)]),
        ("model.safetensors is cut short", "bert", [lambda base: os.truncate(base / "model.safetensors", 5000)]),
        ("model.safetensors is a link to nothing, as of a cache", "bert", [
            remove("model.safetensors"), lambda base: (base / "model.safetensors").symlink_to("/mnt/no/blob")]),
        ("shards", "llama", [shards()], CHAT),
        ("a shard is missing", "llama", [shards(missing=True)], CHAT),
        ("the shards' index is no JSON", "llama", [shards(), write("model.safetensors.index.json", "{")], CHAT),
        ("no tokenizer", "bert", [remove("tokenizer.json", "tokenizer_config.json")]),
        ("tokenizer.json is a pointer of Git LFS", "bert", [write("tokenizer.json", POINTER)]),
        ("an adapter's config beside the model", "bert", [write(
            "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')]),
        ("no such folder", "bert", [model("/mnt/no/such/model")]),
        ("a hub id that is not here", "bert", [model("some/model")]),
        ("--model local", "bert", [model("local")]),
        ("a folder of the name llama-3-ours", "bert", [moved("llama-3-ours")]),
        # what the config asks for
        ("quantised: gptq", "llama", [config(quantization_config={"quant_method": "gptq", "bits": 4})], CHAT),
        ("quantised: bitsandbytes", "bert", [config(quantization_config={
            "quant_method": "bitsandbytes", "load_in_4bit": True})]),
        ("attention by a package that is not here", "llama", [config(_attn_implementation="flash_attention_2")], CHAT),
        ("more tokens than positions", "bert", [], "--max-length=512"),
        # weights
        ("without its final norm", "llama", [without("model.norm")], CHAT),
        ("without its final norm, as a classifier", "llama", [without("model.norm")]),
        ("without a layer", "bert", [without("layer.1.")]),
        ("without embeddings", "bert", [without("word_embeddings")]),
        ("without a pooler, as many encoders", "bert", [without("pooler")]),
        ("more layers in config.json than weights", "bert", [config(num_hidden_layers=3)]),
        ("another vocabulary in config.json", "bert", [config(vocab_size=700)]),
        ("a weight that is no number", "bert", [weights(
            lambda tensors: tensors["encoder.layer.0.output.dense.weight"][0].fill_(math.nan))]),
        ("a weight of 10⁹", "bert", [weights(
            lambda tensors: tensors["encoder.layer.0.output.dense.weight"][0].fill_(1e9))]),
        ("weights in bfloat16", "llama", [weights(lambda tensors: tensors.update(
            {name: value.bfloat16() for name, value in tensors.items()})), config(dtype="bfloat16")]),
        # tokenizers
        ("no pad token", "gpt2", []),
        ("no pad token, every text ends in </s>", "llama", [tokenizer(ends_texts)]),
        ("no pad token and no end of text", "llama", [tokenizer(lambda made: setattr(made, "eos_token", None))]),
        ("ten tokens beyond the embeddings", "llama", [tokenizer(
            lambda made: made.add_tokens([f"<extra{i}>" for i in range(10)]))]),
        ("a pad token beyond the embeddings", "llama", [tokenizer(
            lambda made: (made.add_tokens([f"<extra{i}>" for i in range(10)]),
                          setattr(made, "pad_token", "<extra9>")))]),
        ("pads at the left", "qwen2", [tokenizer(lambda made: setattr(made, "padding_side", "left"))]),
        ("segments that the model has no embeddings for", "roberta", [tokenizer(lambda made: setattr(
            made, "model_input_names", ["input_ids", "token_type_ids", "attention_mask"]))]),
        # heads
        ("a head of its own, in another order", "bert", [own_head("positive", "negative")]),
        ("a head of its own, of other names", "bert", [own_head("entailment", "contradiction")]),
        ("a head of its own, without names", "bert", [own_head("LABEL_0", "LABEL_1")]),
        ("a head of its own, of three", "bert", [own_head("a", "b", "c")]),
        # kinds of models
        ("an encoder as a language model", "bert", [], CHAT),
        ("T5 as a language model", "t5", [], CHAT),
        ("BART", "bart", [], *PRIVATE),
        ("BART, whose tokenizer ends no text", "bart", [tokenizer(lambda made: setattr(
            made.backend_tokenizer, "post_processor", TemplateProcessing(single="$A", pair="$A $B",
                                                                         special_tokens=[])))]),
        ("CANINE, whose embeddings are elsewhere", "canine", []),
        ("CANINE, private", "canine", [], *PRIVATE),
        ("DeBERTa, private, --targets all", "deberta-v2", [], *PRIVATE, ALL),
        ("DeBERTa, private, --targets key_proj", "deberta-v2", [], *PRIVATE, "--targets=key_proj"),
        ("OPT, private, --targets all", "opt", [], *PRIVATE, ALL),
        ("Qwen2-MoE, private, --targets all", "qwen2_moe", [], *PRIVATE, ALL),
        ("Qwen2-MoE, --targets all", "qwen2_moe", [], ALL, CHAT),
        # conversations
        ("a chat template", "llama", [template("{% for m in messages %}" + PIECE + "{% endfor %}" + PROMPT)], CHAT),
        ("the assistant begins, the template has a system text", "llama", [template(
            "You are kind. {% for m in messages %}" + PIECE + "{% endfor %}" + PROMPT)], CHAT, "begins"),
        ("a template that ends the last turn alone", "llama", [template(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last and not add_generation_prompt %}<end>"
            "{% endif %}{% endfor %}" + PROMPT)], CHAT),
        ("a template that takes out earlier reasoning", "llama", [template(
            "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.split('</think>')[-1] }};"
            "{% endfor %}" + PROMPT)], CHAT),
        ("a template that writes other words", "llama", [template(
            "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }};{% endfor %}" + PROMPT)], CHAT),
        ("a template that fails", "llama", [template("{{ raise_exception(messages[0]['content']) }}")], CHAT),
        ("conversations without a template", "llama", [remove("chat_template.jinja")], CHAT, "messages"),
        ("conversations under the default task", "llama", [template(PIECE)], "messages")]:
    INPUTS[what] = base, tuple(changes), tuple(options)


def rows(folder: Path, options: Sequence[str], chats: bool) -> tuple[Path, Path]:
    """Write and return the files to train on and to hold out."""
    made = []
    for i in range(40):
        text = f"{WORDS[i % 4]}, {i}"
        turns = TURNS[1:] if "begins" in options else TURNS
        made.append({"messages": [{"role": role, "content": said} for role, said in turns]} if chats else
                    {"text": text} if CHAT in options else
                    {"text": text, "label": ("positive", "negative")[i % 2]})
    files = folder / "rows.jsonl", folder / "held-out.jsonl"
    for file, part in zip(files, (made, [*made[1:8], *made[:1]]), strict=True):
        if file.name.startswith("held") and not chats:
            part = [row | {"text": f"again {row['text']}"} for row in part]
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


def printed(what: str, home: Path) -> tuple[str, str]:
    """Return the command's output, and a summary of its outcome."""
    kind, changes, options = INPUTS[what]
    base = named = architecture(kind, home / "model")
    for change in changes:
        given = change(base)
        if isinstance(given, (str, Path)):
            named = given
            base = given if isinstance(given, Path) else base
    chats = "messages" in options or "template" in what
    train, held_out = rows(home, options, chats)
    flags = [option for option in options if option.startswith("--")]
    if not any(flag.startswith("--epsilon") for flag in flags):
        flags += PLAIN
    flags += [f"--data={train}", f"--eval-data={held_out}", f"--model={named}", f"--out={home / 'out'}",
              "--rounds=1", "--local-steps=1", "--rank=2", "--strategy=fedavg-lora", "--track=no-plots"]
    for usual in ("--batch-size=8", "--max-length=64"):
        if not any(flag.startswith(usual.partition("=")[0]) for flag in flags):
            flags.append(usual)
    code, said = _in_a_process(lambda: _simulate(flags), home / "said")
    if code == 0:
        _, more = _in_a_process(lambda: _elsewhere(home / "out", base, held_out, CHAT in options, chats),
                                home / "elsewhere")
        last = more.strip().splitlines()[-1]
        return _plain(said, home), last if "Traceback" not in more else (
            f"**the adapter does not load or predict**: {last}")
    return _plain(said, home), ("**hangs**" if code is None else "**traceback**" if "Traceback" in said else
                                "refused" if code == 2 else f"**exit {code}**")


def _in_a_process(do: Callable[[], Any], out: Path) -> tuple[int | None, str]:
    """Call `do` in a child process. Return the exit code (None if it did not end in time) and the output."""
    process = os.fork()
    if process == 0:
        for number in (1, 2):
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        os.environ["HOME"] = str(out.parent)
        code = 1
        try:
            do()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else bool(left.code)
        except BaseException:  # prints what the interpreter would
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), out.read_text(errors="replace")
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, out.read_text(errors="replace")


def _simulate(flags: list[str]) -> None:
    from fedlora_simulations.cli import main

    sys.exit(main(flags))


def _elsewhere(out: Path, base: Path, held_out: Path, decoder: bool, chats: bool) -> None:
    """Print the report's loss and the loaded adapter's; for conversations, also what is learned from the first one."""
    from fedlora.tasks import read, task_named

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    report = next(out.rglob("report.json"))
    adapter = next(out.rglob("adapter_config.json")).parent
    plan, told = (json.loads(report.read_text())[part] for part in ("plan", "evaluation"))
    if (adapter / "README.md").exists():
        code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
        assert code is not None
        names: dict[str, Any] = {}
        exec(code[1].replace('"…"', repr(str(base))).replace('"adapter"', repr(str(adapter))), names)
        loaded, text = names["model"], names["tokenizer"]
    else:
        from peft import PeftModel

        auto, options = (AutoModelForCausalLM, {}) if decoder else (
            AutoModelForSequenceClassification, {"num_labels": len(plan["labels"])})
        loaded = PeftModel.from_pretrained(auto.from_pretrained(base, **options), adapter)
        text = AutoTokenizer.from_pretrained(base)
        text.pad_token = text.pad_token or text.eos_token
    words = []
    if not decoder:
        lines = [json.loads(line) for line in held_out.read_text().splitlines()]
        inputs = text([line["text"] for line in lines], padding=True, truncation=True, max_length=plan["max_length"],
                      return_tensors="pt")
        wanted = torch.tensor([plan["labels"].index(line["label"]) for line in lines])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(loaded(**inputs).logits.float(), wanted).item()
        same = abs(loss - told["after"]["loss"]) < 1e-3
        words.append(f"{'trains; as the run where it is loaded' if same else '**another model where it is loaded**'}: "
                     f"loss {told['after']['loss']:.4f}, loaded {loss:.4f}")
    else:
        words.append("trains, loads")
    if chats:
        task = task_named("causal-lm")(text, 256)
        records = task.encode(read(held_out, "causal-lm").take([0]))
        words.append(f"learned: {text.decode(records.tokens[records.answers == 1])!r}")
    local = [file.name for file in adapter.rglob("*") if file.is_file() and str(base.parent).encode() in
             file.read_bytes()]
    if local:
        words.append(f"**{', '.join(local)} name a path of this machine**")
    print("; ".join(words))


def _plain(said: str, home: Path) -> str:
    """Return the output without the lines that every run prints."""
    usual = r"given|preset|default|  |seed 0|before training|round 1|fedavg-lora|bytes are|method|Adapters, reports|$"
    lines = [line for line in said.replace(str(home), "HOME").splitlines() if not re.match(usual, line)]
    return "<br>".join(line[:1200].replace("|", "\\|") for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="inputs that have this word")
    only = parser.parse_args().only
    transformers.logging.disable_progress_bar()
    from fedlora_simulations import simulated_run  # noqa: F401 - once, for all children

    print("| input | printed | what came of it |\n|---|---|---|")
    for what in INPUTS:
        if only in what:
            with tempfile.TemporaryDirectory() as home:
                said, came = printed(what, Path(home))
            print(f"| {what} | {said} | {came.replace('|', chr(92) + '|')} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
