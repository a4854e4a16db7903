"""The cost of a run, shown to the data holder before anything is charged, and the two questions asked at a terminal.

    ╭─ What this run costs data set north ─────────────────────────────────────────╮
    │ trains         frozen-a, rank 2, in query, value, and the head: fedsvd,      │
    │                20 rounds of 4 steps of sgd, rate 0.03, clip norm 3           │
    │ declared size  1,300 records. It is public: the noise level reveals it.      │
    │ reserved       ε 8.000 of the 8.000 left in its lifetime budget of 8         │
    │ afterwards     ε 0.000 left, even if the run breaks off                      │
    │ a second run   like it would fit if both had --epsilon 3.912                 │
    ╰──────────────────────────────────────────────────────────────────────────────╯

Everything shown is computed from the options, the policy, the ledger and the server's proposal. No record is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedlora.plan import RunPlan
from fedlora.privacy import RunTerms, four_digits
from fedlora.privacy.ledger.lifetime_budget import Book, Run
from fedlora.privacy.mechanisms.distributed_gaussian import honest

from .terms import with_room

MOST_TARGETS = 4
"""Number of adapted layer names that are shown; a plan that adapts every linear layer of a block has more."""

MOST_NOISE_FOR_TWO = 100
"""Limit of the search for an ε at which two runs fit: up to this many times the run's noise is tried."""


@dataclass(frozen=True)
class Cost:
    """The part of a data set's lifetime budget that a run takes.

    Attributes:
        limit: ε of the lifetime budget; infinite if there is no limit.
        left: ε left of it before the run; infinite if there is no limit.
        afterwards: ε left once the run has begun every training that it may. A run that `closes` the budget leaves
            only this much from its first training on.
        guarantee: ε of the run alone, at the run's own δ.
        closes: whether the run fits only as the data set's single run. Such a run uses up the budget when it begins.
        for_two: the --epsilon at which two runs of this kind fit side by side; None if there is none.
        second_fits: whether a second run with the same --epsilon fits beside this one.
        sums: what holds in a run with secure sums; None in another run.
    """

    limit: float
    left: float
    afterwards: float
    guarantee: float
    closes: bool
    for_two: float | None
    second_fits: bool
    sums: Sums | None = None

    @classmethod
    def of(cls, book: Book, dataset: str, terms: RunTerms, *, pinned: bool = False) -> Cost | None:
        """Compute the cost of a run.

        Args:
            book: a copy of the ledger's book. The run is entered into it.
            dataset: id of the data set that is charged.
            terms: the run's terms; private, so that they have noise and a δ.
            pinned: whether the policy names the keys of all members of secure sums.

        Returns:
            The cost; None if the run does not fit the budget.
        """
        closes = book.admit(dataset, terms)
        if closes is None:
            return None
        limit, left = book.declared(dataset), book.lifetime(dataset).remaining
        sums = Sums.of(terms, pinned=pinned)
        if limit is None or left is None or limit.epsilon == math.inf:
            return cls(math.inf, math.inf, math.inf, _guarantee(terms), False, None, True, sums)
        second_fits = book.room_for(2, dataset, terms)
        roomy = with_room(terms, lambda other: book.room_for(2, dataset, other), MOST_NOISE_FOR_TWO)
        for_two = None if roomy is None else _guarantee(roomy)
        book.runs[dataset, terms.run_id] = Run(dataset, terms, closes, begun=terms.max_participations)
        afterwards = book.lifetime(dataset).remaining
        assert afterwards is not None
        return cls(limit.epsilon, left, afterwards, _guarantee(terms), bool(closes), for_two, second_fits, sums)


@dataclass(frozen=True)
class Sums:
    """The two guarantees of a run with secure sums, as they can be foretold before a roster is known.

    Attributes:
        local: ε of the run by this client's own noise.
        aggregate: ε of the run in the sums; None if it is not stated, as the members are not pinned.
        members: the fewest members of a roster.
        honest: the fewest honest ones whose noise is in a sum.
        charged: whose noise is charged, as in policy.toml: "local" or "aggregate".
    """

    local: float
    aggregate: float | None
    members: int
    honest: int
    charged: str

    @classmethod
    def of(cls, terms: RunTerms, *, pinned: bool) -> Sums | None:
        """Return what holds of a run on these terms; None without secure sums.

        Args:
            terms: the run's terms; private.
            pinned: whether the policy names the keys of all members.
        """
        foretold = terms.sums_epsilon(terms.max_participations)
        if foretold is None:
            return None
        return cls(terms.own().epsilon(terms.max_participations), foretold if pinned else None, terms.least_members,
                   honest(terms.least_members, terms.colluding), terms.charged)


NOT_PINNED = ("not stated: policy.toml does not name the members' keys (members), and whoever runs the certificate "
              "authority could make members up")
"""Why no ε is stated for sums."""


def _guarantee(terms: RunTerms) -> float:
    assert terms.delta is not None, "a run that costs something has noise and a delta"
    return terms.epsilon(terms.max_participations)


def panel(cost: Cost, dataset: str, size: str, plan: RunPlan) -> Panel:
    """Return the box that shows what a run trains and what it costs.

    Args:
        cost: the run's cost.
        dataset: id of the data set that is charged.
        size: the declared size in words, such as "1,300 records".
        plan: the plan that the server proposes.
    """
    lines = Table.grid(padding=(0, 2))
    lines.add_row("trains", Text(what_is_trained(plan)))
    lines.add_row("declared size", f"{size}. It is public: the noise level reveals it.")
    if cost.limit == math.inf:
        lines.add_row("reserved", f"ε {four_digits(cost.guarantee)}; no lifetime budget limits this data set")
    else:
        lines.add_row("reserved", f"ε {four_digits(cost.left - cost.afterwards)} of the "
                                  f"{four_digits(cost.left, down=True)} left in its lifetime budget of {cost.limit:g}")
        lines.add_row("afterwards", f"ε {four_digits(cost.afterwards, down=True)} left, " + (
            "even if the run breaks off" if cost.closes else "and more if the run breaks off"))
        lines.add_row("a second run", "like it fits as well" if cost.second_fits else
                      "like it would not fit, however small its ε" if cost.for_two is None else
                      f"like it would fit if both had --epsilon {four_digits(cost.for_two, down=True)}")
    if cost.sums is not None:
        sums = cost.sums
        lines.add_row("by own noise", f"ε {four_digits(sums.local)} against everyone who sees what leaves this client. "
                                      "Nobody has to be trusted for that.")
        lines.add_row("in the sums", NOT_PINNED if sums.aggregate is None else
                      f"ε {four_digits(sums.aggregate)} against whoever sees the sums alone. It relies on "
                      f"{sums.honest} honest ones of {sums.members} members or more, who add as much noise as this "
                      "client.")
        which = "by own noise" if sums.charged == "local" else "in the sums"
        lines.add_row("charged", f'{which} (trust = "{sums.charged}" in policy.toml)')
    return Panel(lines, title=f"What this run costs data set {dataset}", title_align="left", width=80)


def what_is_trained(plan: RunPlan) -> str:
    """Describe the plan in one line: family, rank, layers, strategy, rounds, steps, optimizer and any clip norm."""
    targets = [*plan.targets[:MOST_TARGETS], *(["…"] if len(plan.targets) > MOST_TARGETS else [])]
    ranks = max([plan.rank, *(rank for _, rank in plan.ranks)])
    rank = f"rank {plan.rank}" + (f", in {len(plan.ranks)} layers up to {ranks}" if plan.ranks else "")
    family = plan.family + "".join(f" {name} {value:g}" for name, value in plan.family_options)
    where = ([f"{family}, {rank}, in {', '.join(targets)}"] if targets else []) + (
        ["the head"] if plan.train_head else [])
    how = plan.optimizer + (f" of gradients that {plan.adjustment} adjusts" if plan.adjustment else "")
    held = f"; {plan.hold_out:.0%} of the data are held out" if plan.hold_out else ""
    kind = "noised " if plan.private else "whole " if plan.whole_gradients else ""
    start = f"a start from {kind}gradients, then " if plan.private_start else ""
    clip = f", clip norm {plan.clip_norm:g}" if plan.private else ""
    return (f"{', and '.join(where)}: {plan.strategy}, {start}{plan.max_participations} rounds of {plan.local_steps} "
            f"steps of {how}, rate {plan.lr:g}{clip}{held}")


def ask_size(console: Console, proposal: int, units: str) -> int:
    """Ask at the terminal for the declared size, the public number of units; an empty answer takes the proposal.

    Args:
        console: where to ask.
        proposal: the number that an empty answer stands for.
        units: what is counted, such as "records".

    Raises:
        ValueError: the input ended without an answer.
    """
    console.print(f"About how many {units} does this data set have? The noise is computed from the number that you "
                  "give and reveals it, so the number is public. Give the same one again after a few are added or "
                  "removed.", soft_wrap=True)
    while True:
        try:
            answer = console.input(f"Declared size [{proposal}]: ", markup=False).strip().replace(",", "")
        except EOFError:
            raise ValueError("no size was declared; give it with --declared-size N") from None
        if not answer:
            return proposal
        if answer.isdecimal() and int(answer) >= 1:
            return int(answer)
        console.print(f"Give a whole number of at least 1, or press Enter for {proposal}.")


def ask_whether(console: Console, question: str = "Take part?") -> bool:
    """Ask at the terminal whether to do something. Only "y" and "yes" mean yes; so no answer means no.

    Args:
        console: where to ask.
        question: what to ask, without the answers.
    """
    try:
        return console.input(f"{question} [y/N]: ", markup=False).strip().lower() in ("y", "yes")
    except EOFError:
        return False
