"""Options that several commands share, in one class for each group of commands that has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedlora import registry
from fedlora.config import values
from fedlora.config.option import MODEL, NETWORK, PRESET, PRIVACY, RUN, TUNING, option
from fedlora.plan import FOUND, LR_SCHEDULES, MOST_HELD_OUT, WIRE_DTYPES
from fedlora.plan.usual import MAX_LENGTH

if TYPE_CHECKING:
    from fedlora.data.options import ReadOptions

SERVER, CLIENT, SIMULATE = "server", "client", "simulate"
"""Names of the commands (fedlora-server, …) and of their tables in a TOML file."""

RECIPES, SERVER_OPTIMIZERS = values.RECIPES, "fedlora_strategies.server_optimizers"
REDUCTIONS = "fedlora_strategies.reductions"
TRACKERS = "fedlora_server.trackers"
"""Packages whose modules are the values of options. The names are read from the files, without importing them."""

USUAL_TRACKERS = ("console", "page", "plots")
"""Trackers that watch every run, unless `--track no-NAME` leaves one out."""


def _tracked() -> tuple[str, ...]:
    return (*registry.keys(TRACKERS), *(f"no-{name}" for name in USUAL_TRACKERS))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of every command.

    Attributes:
        command: class attribute, the command's name without "fedlora-".
        forms: class attribute, the ways to call the command, for --help.
        fixed: class attribute, the fields that the command sets by itself. --help leaves them out.
    """

    command: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    fixed: ClassVar[tuple[str, ...]] = ()

    config: Path | None = option(None, "TOML file with any of these options; the command line overrides it", RUN,
                                 values.path, metavar="FILE.toml")
    task: str = option("classification", "what the model learns to do", RUN,
                       choices=lambda: registry.keys(FOUND["task"]), plan="task", place=4)
    column: Mapping[str, str] = option({}, "which column of the data holds which field, as in text=note,label=triage",
                                       RUN, values.columns, metavar="NAME=COLUMN", place=4,
                                       example='{text = "note", label = "triage"}')
    delimiter: str | None = option(
        None, "character between the fields of .csv and .tsv files, or one of the words comma, semicolon, tab, bar",
        RUN, values.delimiter, metavar="CHAR", unset="found in each file's first line", place=7,
        example='"semicolon"')
    encoding: str | None = option(
        None, "encoding of text files, as in utf-8, utf-16, cp1252 (Windows), cp850 (DOS), mac-roman", RUN,
        values.encoding, metavar="NAME", unset="UTF-8, UTF-16 or else cp1252, as found in each file", place=7,
        example='"cp1252"')
    sheet: str | None = option(None, "sheet of .xlsx workbooks that holds the rows", RUN, metavar="NAME", place=7,
                               unset="the only one with the needed columns, or the first", example='"Sheet1"')
    label_map: Mapping[str, str] = option(
        {}, "the run's names for labels of the data, as in dringend=urgent,URGENT=urgent", RUN, values.label_map,
        metavar="LABEL=NAME", place=7, example='{dringend = "urgent"}')
    skip_incomplete: bool = option(False, "leave out rows of the data without a text, a label or an answer, and say "
                                   "how many", RUN, None, place=7)
    allow_download: bool = option(False, "download the base model, or a hub dataset, if it is not on this machine",
                                  MODEL, None)

    def read_options(self) -> ReadOptions:
        """Return what the options say about data files."""
        from fedlora.data.options import ReadOptions  # imported late, so that --help needs no numpy

        return ReadOptions(self.delimiter, self.encoding, self.sheet, self.label_map, self.skip_incomplete)


@dataclass(frozen=True, kw_only=True)
class ConnectedConfig(Config):
    """Options of the server and the client, which talk to each other over the network."""

    tls: Path | None = option(None, "folder with this side's key and certificate: encrypt by mutual TLS 1.3", NETWORK,
                              values.path, metavar="DIR", unset="no encryption, on this machine alone", place=2,
                              example='"pki"')
    insecure: bool = option(False, "allow unencrypted connections to other machines", NETWORK, None)
    log_format: str = option("text", "how messages are written to stderr; json makes each line a JSON object", RUN,
                             choices=("text", "json"), place=8)


@dataclass(frozen=True, kw_only=True)
class LocalConfig(Config):
    """Options of the holder of the data: the client, or the simulation on behalf of all its clients."""

    data: str | None = option(None, "training data: a .jsonl, .csv, .tsv or .parquet file, a folder of such files, or "
                              "a hub dataset", RUN, metavar="DIR_OR_FILE", place=1, example='"data"')

    epsilon: float = option(8.0, "privacy budget ε of the run; inf turns differential privacy off", PRIVACY,
                            values.positive, place=1)
    delta: float | None = option(None, "δ of the privacy guarantee", PRIVACY, values.probability,
                                 unset="min(1e-5, 0.1 / declared size)", place=2, example="1e-5")
    declared_size: int | None = option(
        None, "a client's number of records (of units with --privacy-unit), which is made public and sets the sampling "
        "rate", PRIVACY, values.count, place=2,
        unset={CLIENT: "the policy's, or asked for", SIMULATE: "the true number, rounded down to two digits"},
        example="1000")
    privacy_unit: str | None = option(
        None, "what is protected as a whole: row, or column:NAME for all rows with the same value in that column",
        PRIVACY, values.unit, metavar="UNIT", unset="row", place=3,
        example='"column:patient"')
    rows_per_unit: int = option(8, "most rows of one privacy unit that enter a training step", PRIVACY, values.count)
    max_clip_norm: float | None = option(
        None, "clip to at most this L2 norm, even if the server's plan has a larger one", PRIVACY, values.finite,
        unset="no limit")

    device: str = option("auto", "where to train", TUNING, choices=("auto", "cpu", "cuda", "mps"), place=6)
    precision: str = option("auto", "number format to compute in; auto takes bf16 if the hardware supports it", TUNING,
                            choices=("auto", "fp32", "bf16"), place=6)
    threads: int | None = option(None, "number of CPU threads", TUNING, values.count, unset="PyTorch's choice", place=6)
    micro_batch: int | None = option(None, "number of records computed at once", TUNING, values.count,
                                     unset="as many as a limit on tokens allows, which depends on the device", place=6)
    compile: bool = option(False, "compile the model's blocks with torch.compile, on CUDA: takes up to half a minute "
                           "for each padded length, then steps are faster; results are equal up to rounding", TUNING,
                           None, place=6)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Options that plan a run: those of the server, or of the simulation in its place."""

    labels: tuple[str, ...] | None = option(
        None, "names of the labels, in the order of the classifier's outputs", RUN, values.labels, metavar="A,B,…",
        plan="labels", place=2, example='["routine", "urgent"]',
        unset={SERVER: "the names that clients announce", SIMULATE: "those in --data"})
    rounds: int | None = option(None, "number of rounds", RUN, values.count, unset=PRESET, plan="rounds", place=2)
    eval_data: Path | None = option(None, "held-out data to evaluate the model on as the run goes on", RUN, values.path,
                                    place=2, example='"held-out.jsonl"')
    eval_every: int = option(1, "evaluate after every Nth round, and always after the last", RUN, values.count)
    out: Path | None = option(
        None, "folder for adapters, reports and curves", RUN, values.path, place=3, example='"runs/first"',
        unset={SERVER: "runs/<time>-<strategy>", SIMULATE: "runs/<time>-simulation"})
    dry_run: bool = option(False, "check everything, show the plan, its traffic, noise and time, and start nothing",
                           RUN, None, place=3)
    clients_per_round: int | None = option(None, "number of clients that are asked to train in each round", RUN,
                                           values.count, unset="all", place=4, example="2")
    min_replies: int | None = option(
        None, "uploads needed to close a round", RUN, values.count,
        unset="half of the clients asked first; those that are lost or decline no longer count once --round-timeout is "
        "over or no idle client can replace them", place=6, example="2")

    model: str = option("minilm", "base model: an alias (minilm), a folder, or a hub id[@commit]", MODEL, plan="model",
                        place=1)
    rank: int | None = option(None, "rank r of the adapters", MODEL, values.count, unset=PRESET, plan="rank", place=2)
    alpha: float | None = option(None, "scale of the adapters: their update is multiplied by alpha / rank", MODEL,
                                 values.finite, unset=PRESET, plan="alpha", place=2)
    scaling: str = option("plain", "factor on the adapters' update: alpha / rank (plain), or alpha / √rank (rs), which "
                          "suits large ranks", MODEL, choices=("plain", "rs"), place=6)
    targets: tuple[str, ...] | None = option(
        None, "linear layers to adapt: names or name endings; or auto (query and value), all, none", MODEL,
        values.names, metavar="NAME,…", unset=PRESET, plan="targets", place=2)
    init: str | None = option(
        None, "start of the adapter's factors, by what it is computed from: nothing (kaiming, orthonormal, block, "
        "sparse), the base model's weights (weight, weight-scaled, nystrom, lu, row-norms), public texts without "
        "labels (eva:FILE, avoid:FILE, protect:FILE), the loss's gradient on public rows (public:FILE, lora-ga:FILE, "
        "lora-sb:FILE), or the clients' gradients: noised (dp, at the privacy cost of one round), or as they are in a "
        "run without privacy (gradient, lora-ga-clients, lora-sb-clients)", MODEL, values.start, metavar="START",
        unset=PRESET, plan="private_start", place=2)
    init_head: str | None = option(
        None, "start of a classifier's head: a regression on public rows, at the server, at no privacy cost", MODEL,
        values.head_start, metavar="public:FILE", unset="drawn at random", place=6,
        example='"public:public.jsonl"')
    family_options: tuple[tuple[str, float], ...] = option(
        (), "numeric options of the strategy's adapter family", MODEL, values.numbers, metavar="NAME=X,…",
        plan="family_options", place=6, example="{name = 1.0}")
    ranks: tuple[tuple[str, int], ...] | str = option(
        (), "layers whose rank is not --rank, by full module name; or, to save traffic, ranks that the server changes "
        "during the run: grow:TOTAL and shrink:TOTAL end with TOTAL ranks in all layers together, nested trains the "
        "first ranks alone, of a number drawn for each round", MODEL, values.ranks,
        metavar="MODULE=R,…|SCHEDULE", plan="ranks", place=6,
        example='{"encoder.layer.0.attention.self.query" = 4}')
    client_ranks: tuple[tuple[str, int], ...] = option(
        (), "clients that train the first R ranks of the adapter alone, by name; all others train --rank. The strategy "
        "flexlora takes it", MODEL, values.whole_numbers, metavar="NAME=R,…", place=6, example="{north = 2}")
    max_length: int = option(MAX_LENGTH, "number of tokens kept of each record", MODEL, values.count, plan="max_length",
                             place=3)
    head: str | None = option(None, "train a classifier's final linear layer too, or keep its initial values", MODEL,
                              choices=("train", "freeze"), unset="train", plan="train_head")
    dropout: float = option(0.0, "probability of dropout on the adapters' input", MODEL, values.number(float, 0, 0.99),
                            plan="dropout")

    privacy: str = option("required", "whether clients must train under differential privacy", PRIVACY,
                          choices=("required", "off"), plan="private", place=1)
    clip_norm: float | None = option(None, "L2 norm to which each record's gradient is clipped", PRIVACY, values.finite,
                                     unset=PRESET, plan="clip_norm", place=3)
    max_participations: int | None = option(
        None, "most rounds that one client may start; its noise is calibrated to this number", PRIVACY, values.count,
        unset="rounds", plan="max_participations", place=4)

    secure_aggregation: bool = option(
        False, "have the server learn only the sum of the clients' uploads: each client adds its share of the sum's "
        "noise and masks what it sends. Implies --one-step", PRIVACY, None, plan="mechanism", place=2)
    colluding: int = option(
        0, "with --secure-aggregation, how many clients may use what they know, alone or with the server, without the "
        "other clients' promise changing; at most a third of them", PRIVACY, values.natural, plan="colluding", place=3)
    least_noise: float = option(
        0.0, "with --secure-aggregation, least noise of each client, as a multiple of --clip-norm; 0 leaves it to the "
        "clients", PRIVACY, values.number(float, 0), plan="least_noise", place=4)

    hold_out: float = option(
        0.0, "with --secure-aggregation, share of each client's records that no one trains on; the sums tell how the "
        "model does on them, at no further ε", PRIVACY, values.number(float, 0, MOST_HELD_OUT), plan="hold_out",
        place=4)

    strategy_options: tuple[tuple[str, float], ...] = option(
        (), "numeric options of the strategy, as in period=2,warmup=1 for fedsvd", TUNING, values.numbers,
        metavar="NAME=X,…", place=4, example="{period = 2, warmup = 1}")
    reduction: str | None = option(
        None, "how the server combines the uploads of a round; all but mean limit what hostile clients can do, and "
        "need every upload in memory and in the clear", TUNING, choices=lambda: registry.keys(REDUCTIONS),
        unset="the strategy's: mean", place=4, example='"median"')
    reduction_options: tuple[tuple[str, float], ...] = option(
        (), "numeric options of --reduction, as in trim=0.2 for trimmed-mean and f=1,m=4 for multi-krum", TUNING,
        values.numbers, metavar="NAME=X,…", place=4, example="{trim = 0.2}")
    server_optimizer: str | None = option(
        None, "optimizer that the server applies to the mean of the uploads", TUNING,
        choices=lambda: ("none", *registry.keys(SERVER_OPTIMIZERS)), unset="the strategy's", place=4)
    server_lr: float | None = option(None, "learning rate of --server-optimizer", TUNING, values.finite,
                                     unset="1; for adam and yogi 0.01", place=4, example="1.0")
    server_options: tuple[tuple[str, float], ...] = option(
        (), "other numeric options of --server-optimizer, as in beta1=0,beta2=0.99,decay=1", TUNING, values.numbers,
        metavar="NAME=X,…", place=4, example="{beta1 = 0.9, beta2 = 0.99}")

    screen: float | None = option(
        None, "leave out uploads that move the adapter more than K times as far as the round's median; inf keeps all",
        TUNING, values.number(float, 1), metavar="K", unset="5; with privacy 10", place=4,
        example="10.0")

    one_step: bool = option(
        False, "one local step a round, after which the server's optimizer steps: Adam, which keeps its memory over "
        "many short rounds. Has a preset of its own, with privacy and without", TUNING, None, place=1)

    lr: float | None = option(None, "learning rate of the clients", TUNING, values.finite, unset=PRESET, plan="lr",
                              place=1)
    local_steps: int | None = option(None, "optimizer steps of each client per round", TUNING, values.count,
                                     unset=PRESET, plan="local_steps", place=1)
    batch_size: int | None = option(None, "expected number of records in a step, which are drawn by Poisson sampling",
                                    TUNING, values.count, unset=PRESET, plan="expected_batch", place=1)
    lr_schedule: str | None = option(
        None, "learning rate over the rounds; linear lowers it in equal steps, to reach 0 after the last round", TUNING,
        choices=lambda: LR_SCHEDULES, unset=PRESET, plan="lr_schedule", place=2)
    optimizer: str | None = option(None, "optimizer of the clients, started afresh in each round", TUNING,
                                   choices=lambda: registry.keys(FOUND["optimizer"]), unset=PRESET, plan="optimizer",
                                   place=2)
    adjustment: str = option("none", "change to each step's noised gradient before the optimizer takes it", TUNING,
                             choices=lambda: ("none", *registry.keys(FOUND["adjustment"])), plan="adjustment")
    track: tuple[str, ...] = option(
        (), f"what records the run besides {', '.join(USUAL_TRACKERS)}; no-NAME, as in no-{USUAL_TRACKERS[-1]}, "
        "leaves out one of those", RUN, values.several(_tracked, "tracker"), keys=TRACKERS, metavar="A[,B…]", place=6,
        example='["csv"]')
    head_scale: float | None = option(None, "factor on the gradient of the classifier's head before clipping", TUNING,
                                      values.finite, unset=PRESET, plan="head_scale", place=3)

    wire_dtype: str = option("fp32", "number format of adapters on the network, both ways; bf16 halves the bytes and "
                             "rounds each value to 8 significant bits", NETWORK, choices=WIRE_DTYPES, plan="wire_dtype")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that watch the run: the usual ones, without those left out, and those that --track adds."""
        left_out = {name.removeprefix("no-") for name in self.track if name.startswith("no-")}
        return tuple(name for name in dict.fromkeys((*USUAL_TRACKERS, *self.track))
                     if not name.startswith("no-") and name not in left_out)
