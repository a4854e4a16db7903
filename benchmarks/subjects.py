"""Subjects to measure: base models, rows of text, and trainers on both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedTokenizerFast

from fedlora.adapters import AdaptedModel, attach, automatic_targets, initial_tensors
from fedlora.data import Rows, label_names
from fedlora.models import load, reference, resolve
from fedlora.plan import RunPlan
from fedlora.privacy import RandomStream, RunStreams
from fedlora.tasks import Records, read, task_for
from fedlora.training import Trainer, TrainingJob, TrainResult, resolve_precision

from .federations import FAMILY_STRATEGIES, plan
from .measure import Settings

RANDOM_LLAMA = "llama-1b"
"""Name of a model in the shape of Llama 3.2 1B, with random weights and a tokenizer made from the rows.

It allows measuring a model of that size on machines that cannot reach a hub."""


@dataclass(frozen=True)
class GivenStreams:
    """A round's streams of random numbers, one for each purpose."""

    by_purpose: Mapping[str, RandomStream]

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """Return the stream for this purpose, whatever the round and attempt."""
        return self.by_purpose[purpose]


@dataclass(frozen=True)
class Subject:
    """An adapted model that is ready to train, with the records to train it on."""

    adapted: AdaptedModel
    plan: RunPlan
    records: Records
    trainer: Trainer
    _trained: Iterator[int] = field(default_factory=itertools.count)

    def train(self, block: int, *, private: bool, sampling_rate: float = 1.0) -> TrainResult:
        """Train one round of the plan's steps from the adapter's present state.

        The same records are drawn whenever `block` is the same, with and without privacy. The noise is new at each
        call: repeated noise would trigger a runtime check.
        """
        return self.step({"sampling": RandomStream.derived(0, "bench", block, "sampling"),
                          "noise": RandomStream.derived(0, "bench", next(self._trained), "noise")},
                         private=private, sampling_rate=sampling_rate)

    def step(self, streams: Mapping[str, RandomStream], *, private: bool = True,
             sampling_rate: float = 1.0) -> TrainResult:
        """Train one round of the plan's steps from the adapter's present state, with these streams by purpose."""
        return self.trainer.train(TrainingJob(
            self.plan, self.records, None, sampling_rate, 1.0 if private else None, self.plan.clip_norm,
            GivenStreams(streams)))

    def rounds(self, rows: Rows, records: int, *, private: bool) -> Iterator[list[TrainingJob]]:
        """Yield the training jobs of round after round, one job for each client.

        Each client has `records` of the rows and noise of its own. All rounds start from the adapter's present state.
        """
        start, encode = self.adapted.read("state"), self.trainer.task.encode
        parts = [encode(rows.take(range(first, first + records))) for first in range(0, len(rows), records)]
        for number in itertools.count(1):
            yield [TrainingJob(self.plan, own, start, sampling_rate=1.0, noise_multiplier=1.0 if private else None,
                            clip_norm=self.plan.clip_norm, lr=self.plan.lr, rows_per_unit=1,
                            streams=RunStreams(f"client-{k}", 0), round=number, attempt=0)
                   for k, own in enumerate(parts)]


def precisions(settings: Settings) -> tuple[str, ...]:
    """Return the precisions to measure: fp32, and bf16 where the device computes in it.

    Elsewhere bf16 is emulated, many times slower than fp32, and nobody would choose it. A quick measurement includes it
    on every device.
    """
    has_bf16 = resolve_precision("auto", settings.device) == "bf16"
    return ("fp32", "bf16") if has_bf16 or settings.quick else ("fp32",)


def settle(device: str) -> Callable[[], object]:
    """Return a function to call before reading the clock: it waits for the GPU, or does nothing on the CPU."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def rows_of(settings: Settings) -> Rows:
    """Read the rows of --data; for a quick measurement, the first 64 of them."""
    rows = read(settings.data, "classification")
    return rows.take(range(min(64, len(rows)))) if settings.quick else rows


def cut_to_length(rows: Rows, count: int) -> Rows:
    """Return `count` rows with texts long enough to fill any --max-length.

    Each text joins 64 rows. The labels take turns.
    """
    joined = [" ".join(rows.texts[(start + i) % len(rows)] for i in range(64)) for start in range(count)]
    names = label_names(rows)
    taken = rows.take([i % len(rows) for i in range(count)])
    return replace(taken, texts=tuple(joined), labels=tuple(names[i % len(names)] for i in range(count)))


def subject(settings: Settings, rows: Rows, *, family: str, rank: int, precision: str, expected_batch: int,
            max_length: int, steps: int = 1, micro_batch: int | None = None, compiled: bool = False,
            train_head: bool = True) -> Subject:
    """Load the base model, attach adapters to it and encode the rows.

    Args:
        settings: names the model, the device and the threads.
        rows: rows to train on.
        family: key of the family of adapters.
        rank: rank of the adapters.
        precision: "fp32" or "bf16", or "auto" for what the device computes in.
        expected_batch: expected number of records in a step.
        max_length: longest record in tokens; longer texts are cut.
        steps: local steps of a round.
        micro_batch: most records in one pass of the model; None sets a bound on tokens instead.
        compiled: compile the model's blocks, as --compile does.
        train_head: train the classifier's last layer beside the adapters.
    """
    labels = label_names(rows)
    folder = resolve(settings.model)
    loaded, model = load(folder, "classification", len(labels)), reference(settings.model, folder)
    targets = automatic_targets(loaded.model)
    run = plan(FAMILY_STRATEGIES[family], family, model=model, labels=labels, max_length=max_length, rank=rank,
               alpha=float(rank), targets=targets, train_head=train_head, local_steps=steps,
               expected_batch=expected_batch)
    adapted = attach(loaded, family=family, rank=rank, alpha=float(rank), targets=targets, train_head=train_head)
    adapted.write(initial_tensors(adapted, init="orthonormal", seed=0))
    task = task_for(run, loaded.tokenizer)
    trainer = Trainer(adapted, task, device=settings.device, precision=precision, micro_batch=micro_batch,
                      threads=settings.threads, compiled=compiled)
    return Subject(adapted, run, task.encode(rows), trainer)


def save_random_llama(rows: Rows, folder: Path, *, device: str, quick: bool) -> None:
    """Write the model `RANDOM_LLAMA` and its tokenizer into a folder, as `save_pretrained` does.

    Args:
        rows: rows that the tokenizer is made from.
        folder: folder to write into.
        device: device to draw the weights on; they are saved in bf16, as Llama's are published.
        quick: write a tiny model of the same kind instead.
    """
    tokenizer = _tokenizer(rows)
    sizes: dict[str, Any] = dict(vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                 num_key_value_heads=8, intermediate_size=8192)
    if quick:
        sizes = dict(vocab_size=8000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=64)
    config = LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=True,
                         pad_token_id=tokenizer.pad_token_id)
    devices = [device] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):  # drawing there takes only seconds
        torch.manual_seed(0)
        # transformers leaves this function without types, as it does the two below
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_random_bert(rows: Rows, folder: Path) -> None:
    """Write a tiny BERT with random weights into a folder, as `save_pretrained` does: hidden size 64, 2 layers."""
    tokenizer = _tokenizer(rows)
    config = BertConfig(vocab_size=8000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)


def _tokenizer(rows: Rows) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the rows, with at most 8,000 tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(rows.texts[:2000], BpeTrainer(
        vocab_size=8000, special_tokens=["<pad>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="right")
