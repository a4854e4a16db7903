"""All runs that one command asks for, checked together before the first of them begins. `running` then runs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fedlora import models
from fedlora.config import SimulationConfig
from fedlora.training import check_computing
from fedlora_server.run_setup import (
    BaseModel,
    check_start,
    find_model,
    planned,
    prepare,
)

from .cells import Cell
from .population import Method, Population, check_sizes, populate
from .reference import Published, read_published
from .simulated_run import compiles_here, fewest_of
from .sweep import Setting, settings
from .tune import Trials, Tuning

READ_BY = ("data", "eval_data", "task", "column", "delimiter", "encoding", "sheet", "label_map", "skip_incomplete",
           "labels", "privacy_unit", "partition", "clients", "model", "max_length")
"""Options on which the clients' encoded rows depend."""


@dataclass
class Campaign:
    """All runs of one command.

    Attributes:
        options: the options of fedlora-simulate.
        settings: the combinations of swept values.
        methods: the methods.
        bases: the base models, by --model.
        populations: the clients and their rows of the first seed, by the values of `READ_BY`.
        tuning: what --tune asks for; None without it.
        published: published figures.
    """

    options: SimulationConfig
    settings: list[Setting]
    methods: list[Method]
    bases: dict[str, BaseModel] = field(default_factory=dict)
    populations: dict[str, Population] = field(default_factory=dict)
    tuning: Tuning | None = None
    published: list[Published] = field(default_factory=list)

    @property
    def is_sweep(self) -> bool:
        """Whether there is more to compare than methods."""
        return bool(self.options.sweep or self.options.tune or self.options.reference)

    @property
    def runs(self) -> int:
        """Number of cells, without those of --tune."""
        return len(self.settings) * len(self.methods) * len(self.options.seeds)

    def base(self, setting: Setting) -> BaseModel:
        """Return the setting's base model."""
        return self.bases[setting.options.model]

    def population(self, setting: Setting, seed: int) -> Population:
        """Return the setting's clients and their rows, dealt with this seed."""
        return self.populations[key_of(setting.options)].dealt(setting.options, seed)

    def cell(self, setting: Setting, method: Method, seed: int, population: Population,
             chosen: Trials | None = None) -> Cell:
        """Return the cell of one run.

        Args:
            setting: the setting.
            method: the method.
            seed: the seed.
            population: the setting's clients and rows, dealt with this seed.
            chosen: what --tune chose for the method with this setting; None without --tune.
        """
        options = chosen.options if chosen else setting.options
        return Cell.of(options, method, seed, self.base(setting), population, values=setting.values,
                       tuned=chosen.values if chosen else {})


def key_of(options: SimulationConfig) -> str:
    """Return what tells apart options that lead to other rows, or to other encodings of them."""
    return repr([getattr(options, name) for name in READ_BY])


def checked(options: SimulationConfig) -> Campaign:
    """Check everything that can be checked before hours of training, for every cell.

    Args:
        options: the options of fedlora-simulate.

    Raises:
        ValueError: the options do not fit the model, the data or each other. The message names the setting.
    """
    if options.resume and options.out is None:
        raise ValueError("--resume goes on in a folder of before; name it with --out")
    if options.tune_budget is not None and not options.tune:
        raise ValueError(f"--tune-budget {options.tune_budget} is for --tune; say what to tune, as in --tune "
                         "lr=0.01,0.03,0.1, or leave it out")
    found = Campaign(options, settings(options), [Method.parse(text) for text in options.strategy])
    if options.reference is not None:
        found.published = read_published(options.reference)
    if options.tune:
        found.tuning = Tuning.of(options)
    dealt: dict[tuple[str, int], Population] = {}
    for setting in found.settings:
        try:
            _check(found, setting, dealt)
        except ValueError as error:
            if not setting.values:
                raise
            raise ValueError(f"{setting.before}{error}") from error
    return found


def _check(campaign: Campaign, setting: Setting, dealt: dict[tuple[str, int], Population]) -> None:
    """Check one setting; `dealt` keeps populations by `key_of` and seed from one setting to the next."""
    options = setting.options
    if (options.epsilon == math.inf) != (options.privacy == "off"):
        raise ValueError(f"--privacy {options.privacy} and --epsilon {options.epsilon:g} contradict each other; "
                         "for a run without privacy give both --privacy off and --epsilon inf")
    if options.trust != "local" and not options.secure_aggregation:
        raise ValueError(f"--trust {options.trust} is for --secure-aggregation, without which no noise is shared; "
                         "leave it out, or give both")
    if options.model in campaign.bases:
        check_start(options)
        models.check_task(campaign.bases[options.model].path, options.task, options.max_length)
    else:
        campaign.bases[options.model] = find_model(options)
    for method in campaign.methods:
        planned(method.options(options), method.strategy)
        check_start(method.options(options))
    if options.compile and options.batch_clients > 1:
        raise ValueError("--compile and --batch-clients do not work together: steps that clients share have too many "
                         "shapes to compile; leave one of the two out")
    if options.client_ranks and options.batch_clients > 1:
        raise ValueError("--client-ranks and --batch-clients do not work together: clients that share a pass of the "
                         "model have the same rank; leave one of the two out")
    check_computing(options.device, options.precision, compiles_here(options))
    if key_of(options) not in campaign.populations:
        campaign.populations[key_of(options)] = populate(options, options.seeds[0])
    for seed in options.seeds:
        key = key_of(options), seed
        if key not in dealt:
            dealt[key] = campaign.population(setting, seed)
        population = dealt[key]
        check_sizes(options, campaign.methods, population, seed)
        if unknown := sorted(dict(options.client_ranks).keys() - population.parts.keys()):
            raise ValueError(f"--client-ranks names {unknown[0]!r}, which is no client of this simulation. Its clients "
                             f"are {next(iter(population.parts))} to {next(reversed(list(population.parts)))}")
        for method in campaign.methods:
            fewest_of(method.options(options), method, len(population.parts))
    if campaign.tuning is not None:
        campaign.tuning.check(options, campaign.methods, dealt[key_of(options), options.seeds[0]])


def prepare_all(campaign: Campaign) -> None:
    """Load the model with each plan once, so that what does not fit is said before the first run.

    The first one is prepared when its run begins. Values that cannot make a difference here are not tried.
    """
    tried: list[SimulationConfig] = []
    for setting in campaign.settings:
        population, tuning = campaign.populations[key_of(setting.options)], campaign.tuning
        for variant in [setting.options] if tuning is None else [own for _, own in tuning.trials(setting.options)]:
            for method in campaign.methods:
                own = method.options(variant)
                alike = replace(own, epsilon=1.0, delta=None, declared_size=None, partition="", clients=None,
                                clients_per_round=None, strategy=(method.strategy,))
                if alike in tried:
                    continue
                tried.append(alike)
                if len(tried) > 1:
                    try:
                        prepare(own, method.strategy, campaign.base(setting), population.labels, own.seeds[0],
                                members=len(population.parts))
                    except ValueError as error:
                        raise ValueError(f"{setting.before}{error}") from error
