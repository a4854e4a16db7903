"""What a run will cost, told before it is charged, and the owner's word on it.

    ╭─ What this run costs data set north ─────────────────────────────────────────╮
    │ trains         frozen-a, rank 2, in query, value, and the head: fedsvd,      │
    │                20 rounds of 4 steps, rate 0.03, clip norm 3                  │
    │ declared size  1,300 records. It is public: the noise tells of it.           │
    │ reserved       ε 8.000 of the 8.000 that are left of its lifetime's 8        │
    │ afterwards     ε 0.000 left, even if the run breaks off                      │
    │ a second run   like it would fit if both had --epsilon 3.912                 │
    ╰──────────────────────────────────────────────────────────────────────────────╯

All of it follows from the options, the policy, the ledger and what the server proposes, never from a record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedlora.plan import RunPlan
from fedlora.privacy import Accountant, RunTerms, four_digits
from fedlora.privacy.ledger.lifetime_budget import Book, Run

from .terms import with_room

MOST_TARGETS = 4
"""Names of adapted layers that are shown; a plan for all linear layers has as many as the model's blocks have."""

MOST_NOISE_FOR_TWO = 100
"""So many times the run's noise is tried for a second run."""


@dataclass(frozen=True)
class Cost:
    """What a run takes from its data set's lifetime.

    Attributes:
        limit, left: ε of the lifetime, and what is left of it before the run; infinite where there is no limit.
        afterwards: what is left once the run has begun all that it may, and where it `closes` the budget, as soon as
            it has begun at all.
        guarantee: ε of the run alone, at its own δ.
        closes: whether it fits only as the data set's one run.
        for_two: the --epsilon at which a second run like it fits beside it; None where there is none.
        second_fits: whether one fits as it is.
    """

    limit: float
    left: float
    afterwards: float
    guarantee: float
    closes: bool
    for_two: float | None
    second_fits: bool

    @classmethod
    def of(cls, book: Book, dataset: str, terms: RunTerms) -> Cost | None:
        """None where the run does not fit.

        Args:
            book: a copy, which is written into.
        """
        closes = book.admit(dataset, terms)
        if closes is None:
            return None
        limit, left = book.declared(dataset), book.lifetime(dataset).remaining
        if limit is None or left is None or limit.epsilon == math.inf:
            return cls(math.inf, math.inf, math.inf, _guarantee(terms), False, None, True)
        second_fits = book.room_for(2, dataset, terms)
        roomy = with_room(terms, lambda other: book.room_for(2, dataset, other), MOST_NOISE_FOR_TWO)
        for_two = None if roomy is None else _guarantee(roomy)
        book.runs[dataset, terms.run_id] = Run(dataset, terms, closes, begun=terms.max_participations)
        afterwards = book.lifetime(dataset).remaining
        assert afterwards is not None
        return cls(limit.epsilon, left, afterwards, _guarantee(terms), bool(closes), for_two, second_fits)


def _guarantee(terms: RunTerms) -> float:
    planned = terms.spends(terms.max_participations)
    assert planned is not None and terms.delta is not None, "a run that costs something has noise, and a delta"
    return Accountant(planned).epsilon(terms.delta)


def panel(cost: Cost, dataset: str, size: str, plan: RunPlan) -> Panel:
    """What is trained, and the cost in four lines.

    Args:
        size: the declared size, in words.
    """
    lines = Table.grid(padding=(0, 2))
    lines.add_row("trains", Text(what_is_trained(plan)))
    lines.add_row("declared size", f"{size}. It is public: the noise tells of it.")
    if cost.limit == math.inf:
        lines.add_row("reserved", f"ε {four_digits(cost.guarantee)}; no lifetime limits this data set")
    else:
        lines.add_row("reserved", f"ε {four_digits(cost.left - cost.afterwards)} of the "
                                  f"{four_digits(cost.left, down=True)} that are left of its lifetime's {cost.limit:g}")
        lines.add_row("afterwards", f"ε {four_digits(cost.afterwards, down=True)} left, " + (
            "even if the run breaks off" if cost.closes else "and more if the run breaks off"))
        lines.add_row("a second run", "like it fits as well" if cost.second_fits else
                      "like it would not fit, however small its ε" if cost.for_two is None else
                      f"like it would fit if both had --epsilon {four_digits(cost.for_two, down=True)}")
    return Panel(lines, title=f"What this run costs data set {dataset}", title_align="left", width=80)


def what_is_trained(plan: RunPlan) -> str:
    """The plan in one line, of which the owner is told before anything is charged."""
    targets = [*plan.targets[:MOST_TARGETS], *(["…"] if len(plan.targets) > MOST_TARGETS else [])]
    ranks = max([plan.rank, *(rank for _, rank in plan.ranks)])
    rank = f"rank {plan.rank}" + (f", in {len(plan.ranks)} layers up to {ranks}" if plan.ranks else "")
    family = plan.family + "".join(f" {name} {value:g}" for name, value in plan.family_options)
    where = ([f"{family}, {rank}, in {', '.join(targets)}"] if targets else []) + (
        ["the head"] if plan.train_head else [])
    how = plan.optimizer + (f" of gradients that {plan.adjustment} adjusts" if plan.adjustment else "")
    start = "a start from noised gradients, then " if plan.private_start else ""
    return (f"{', and '.join(where)}: {plan.strategy}, {start}{plan.max_participations} rounds of {plan.local_steps} "
            f"steps of {how}, rate {plan.lr:g}, clip norm {plan.clip_norm:g}")


def ask_size(console: Console, proposal: int, units: str) -> int:
    """The declared size, from whoever sits at the terminal; an empty answer takes the proposal.

    Raises:
        ValueError: nobody answers.
    """
    console.print(f"How many {units} does this data set have, as the public may know? The noise is computed from that "
                  "number, and tells of it; it stays the same when a few are added or removed.", soft_wrap=True)
    while True:
        try:
            answer = console.input(f"Declared size [{proposal}]: ", markup=False).strip().replace(",", "")
        except EOFError:
            raise ValueError("no size was declared; name it with --declared-size") from None
        if not answer:
            return proposal
        if answer.isdecimal() and int(answer) >= 1:
            return int(answer)
        console.print("That is no whole number of at least 1.")


def ask_whether(console: Console) -> bool:
    """Whether to take part, from whoever sits at the terminal; only yes is yes."""
    try:
        return console.input("Take part? [y/N]: ", markup=False).strip().lower() in ("y", "yes")
    except EOFError:
        return False
