"""The facts that a model card states about the run behind an adapter, and the card's sections made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.figures import for_people
from fedlora.plan import AGGREGATE, RunPlan
from fedlora.privacy.accounting import four_digits, short
from fedlora.privacy.mechanisms import mechanism_named
from fedlora.privacy.mechanisms.distributed_gaussian import honest

NOT_DESCRIBED = ("Not described. Whoever coordinated the run can say what the data were, with `fedlora-server "
                 "--data-description` or `fedlora-server export RUN --data-description`.")


@dataclass(frozen=True)
class Statement:
    """A client's signed privacy report, as it was verified when the adapter was exported.

    Attributes:
        epsilon: epsilon guaranteed at the run's maximum; None if the report says that no guarantee holds.
        delta: the delta of that guarantee; None without one.
        unit: whom the guarantee covers, in words: "one row".
        noise_multiplier: noise standard deviation / clip norm; None without noise.
        sampling_rate: q, the probability with which each unit enters a step; None if it is withheld.
        steps: the steps that the guarantee covers.
        why_not: why no guarantee holds; "" if one does.
        public_key: the key that signed the report, 64 hexadecimal digits.
        pinned: whether the coordinator gave this key as the client's.
        client: the client's name; "" if the card does not name clients.
        epsilon_in_sums: epsilon at the same delta towards whoever sees the run's secure sums alone; None if the report
            states none.
    """

    epsilon: float | None
    delta: float | None
    unit: str
    noise_multiplier: float | None
    sampling_rate: float | None
    steps: int
    why_not: str
    public_key: str
    pinned: bool
    client: str = ""
    epsilon_in_sums: float | None = None


@dataclass(frozen=True)
class Noise:
    """The noise of a private run, as the clients' uploads stated it.

    Attributes:
        noise_multipliers: the lowest and the highest noise standard deviation / clip norm.
        deltas: the lowest and the highest delta of the clients' guarantees.
        most_steps: the most optimizer steps in the uploads of one client.
    """

    noise_multipliers: tuple[float, float]
    deltas: tuple[float, float]
    most_steps: int


@dataclass(frozen=True)
class Provenance:
    """The facts about a run that its adapter's model card states.

    Attributes:
        plan: the run's plan.
        rounds: number of finished rounds.
        clients: number of clients whose updates are in the adapter.
        names: their names; () if the card does not name them.
        data: what the data were, in the coordinator's words; "" if nothing was said.
        figures: the last evaluation's figures on the coordinator's own rows; empty if there was none.
        evaluated_after: the round after which that was.
        noise: the noise that uploads stated; None if there was none.
        statements: the clients' verified privacy reports.
        simulated: whether one machine played all clients.
        server_step: the parts of the server step, in words.
        seed: the seed of the server's random choices; None if it is not known.
        versions: package → version, None for one that is not installed.
    """

    plan: RunPlan
    rounds: int
    clients: int
    names: Sequence[str] = ()
    data: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    evaluated_after: int = 0
    noise: Noise | None = None
    statements: Sequence[Statement] = ()
    simulated: bool = False
    server_step: str = ""
    seed: int | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)


def sections(run: Provenance) -> str:
    """Return the sections of a model card after the one that loads the adapter, as Markdown."""
    made = (("Base model", _base(run)), ("Training", _training(run)), ("Data", run.data.strip() or NOT_DESCRIBED),
            ("Figures", _figures(run)), ("Privacy", _privacy(run)), ("Limits", _limits(run)),
            ("Versions", _versions(run)))
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in made)


def plain(text: str) -> str:
    """Return a text that somebody chose as plain text in Markdown: no line breaks, markup or table cells."""
    shown = "".join(one if one.isprintable() else " " for one in text)
    for mark in "\\`*_[]<>|#":
        shown = shown.replace(mark, "\\" + mark)
    return shown


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def _base(run: Provenance) -> str:
    model = run.plan.model
    return (f"{plain(model.title)}, checked by content on every machine:\n\n"
            + _table([(part, f"`{digest}`") for part, digest in (
                ("weights", model.weights_sha256), ("config.json", model.config_sha256),
                ("tokenizer", model.tokenizer_sha256))], ("part", "SHA-256")))


def _training(run: Provenance) -> str:
    plan = run.plan
    how = (f"A simulation on one machine: it dealt the data out to {run.clients} clients, which trained in turn."
           if run.simulated else
           f"Federated: {run.clients} {'client' if run.clients == 1 else 'clients'}, each with data of its own, "
           "trained the adapter where the data are and sent adapter values only; a server combined these.")
    named = f" They are {', '.join(map(plain, run.names))}." if run.names else ""
    trained = ", ".join(map(plain, plan.targets)) or "no layer"
    if plan.train_head:
        trained += ", and the classifier's last layer"
    rows = [("strategy", plain(plan.strategy) + (f" ({plain(run.server_step)})" if run.server_step else "")),
            ("adapter family", plain(plan.family)),
            ("rank, alpha", f"{plan.rank}, {plan.alpha:g}"), ("trained", trained),
            ("rounds", f"{run.rounds} of {plan.rounds} planned"),
            ("steps of a client in a round", f"{plan.local_steps}, each of {plan.expected_batch} records on average"),
            ("optimizer of the clients", f"{plain(plan.optimizer)}, learning rate {plan.lr:g} ({plan.lr_schedule})"),
            ("tokens kept of a record", f"{plan.max_length}"),
            ("differential privacy", f"required, clip norm {short(plan.clip_norm)}" if plan.private else "off")]
    if run.seed is not None:
        rows.append(("seed of the server", f"{run.seed}"))
    return f"{how}{named}\n\n" + _table([*rows, ("run", f"`{plan.run_id}`")], ("", ""))


def _figures(run: Provenance) -> str:
    if not run.figures:
        return "Not evaluated: the coordinator had no held-out rows. Evaluate it on rows of your own before you use it."
    rows = [(plain(name), *values) for name, *values in for_people(run.figures)]
    count = int(run.figures.get("count", 0))
    return (f"On {count:,} held-out rows of the coordinator, after round {run.evaluated_after}:\n\n"
            + _table(rows, ("figure", "value", "95 % interval"))
            + "\n\nThe intervals cover the choice of these rows, not other places, times or populations.")


# --- Privacy ---

_BOUNDS = ("(ε, δ) bounds what anybody can learn about one such unit of that client's data from this adapter, from all "
           "that the client sent, and from anything computed from them, whatever else they know. It assumes that the "
           "client's software ran as published.")
_BOUNDS_NOT = ("It says nothing about the data of other clients, about what holds of a whole group of patients or "
               "records, about what the base model was trained on, or about the rows that the figures were computed "
               "on. Where several clients hold data about the same person, their ε add up.")


def _privacy(run: Provenance) -> str:
    if not run.plan.private:
        return ("**No differential privacy.** The adapter may have memorised rows of its training data, and can be "
                "made to give them away. Guard it as you guard the data.")
    parts = [_mechanism(run)]
    if run.simulated:
        parts.append("**No ε.** In a simulation sampling and noise follow from a seed: whoever knows it can subtract "
                     "the noise.")
    elif run.statements:
        parts.append("\n\n".join(_stated(run)))
        parts.append(f"{_BOUNDS} {_BOUNDS_NOT}")
    else:
        parts.append("**No ε is stated here.** It follows from σ, q and the steps, and q is known to each client "
                     "alone. Ask the institutions for their signed privacy reports, which state "
                     "ε, δ and whom they cover, and check them with `fedlora-client verify`.")
    return "\n\n".join(parts)


def _mechanism(run: Provenance) -> str:
    plan, noise = run.plan, run.noise
    rows = [("clip norm (L2)", short(plan.clip_norm))]
    if noise is not None:
        rows = [("noise multiplier σ, as uploads stated it", _range(noise.noise_multipliers)),
                ("δ, as uploads stated it", _range(noise.deltas, up=True)), *rows,
                ("steps of the busiest client", f"{noise.most_steps}")]
    rows += [("most steps of a client", f"{plan.most_trainings * plan.local_steps} ({plan.most_trainings} trainings of "
              f"{plan.local_steps})"),
             ("sampling rate q", f"{plan.expected_batch} / the client's declared number of units")]
    return ("Each client trained under differential privacy, by the Poisson-subsampled Gaussian mechanism on its own "
            "machine: in each step every privacy unit (a record, or all records of a patient, as the client chose) "
            "took part with probability q, its gradient was clipped to the clip norm C, and noise of standard "
            "deviation σ·C was added to the sum.\n\n" + _table(rows, ("", "")))


def _range(ends: tuple[float, float], *, up: bool = False) -> str:
    low, high = (short(end, up=up) for end in ends)
    return low if low == high else f"{low} to {high}"


def _stated(run: Provenance) -> Iterator[str]:
    count = len(run.statements)
    clients = "client" if run.clients == 1 else "clients"
    yield (f"{count} of {run.clients} {clients} handed over a signed privacy report. The signatures and the "
           "arithmetic were verified when this adapter was exported:")
    rows = []
    sums = ("ε in the sums",) if run.plan.secure_aggregation else ()
    for number, one in enumerate(run.statements, start=1):
        held = "no guarantee" if one.epsilon is None else f"**{four_digits(one.epsilon)}**"
        in_sums = "not stated" if one.epsilon_in_sums is None else f"**{four_digits(one.epsilon_in_sums)}**"
        signer = f"`{one.public_key[:16]}…`" + ("" if one.pinned else " (key not confirmed)")
        rows.append((plain(one.client) or f"{number}", held, *(in_sums for _ in sums),
                     "" if one.delta is None else short(one.delta, up=True), plain(one.unit),
                     "" if one.noise_multiplier is None else short(one.noise_multiplier),
                     "" if one.sampling_rate is None else short(one.sampling_rate), f"{one.steps}", signer))
    yield _table(rows, ("client", "ε", *sums, "δ", "for", "σ", "q", "steps", "signed by"))
    if sums:
        yield (f"ε in the sums holds towards whoever sees this adapter, or the sums that it was made of. Each sum has "
               f"the noise of at least {honest(run.plan.least_members, run.plan.colluding)} honest members. "
               f"{mechanism_named(AGGREGATE).promise}")
    for number, one in enumerate(run.statements, start=1):
        if one.why_not:
            yield f"{plain(one.client) or f'Client {number}'}: {plain(one.why_not)}."
    if any(not one.pinned for one in run.statements):
        yield ("*Key not confirmed* means that nobody told the coordinator which key is the institution's: the "
               "report is unchanged since it was signed, by whomever.")
    if count < run.clients:
        yield f"Nothing is stated for the other {run.clients - count}."


# --- Limits and versions ---

def _limits(run: Provenance) -> str:
    plan = run.plan
    lines = [f"Texts beyond {plan.max_length} tokens are cut there: what follows was never learned and is not read."]
    if plan.labels:
        lines += ["It gives one of its labels to every text, also to one that fits none of them. The labels mean what "
                  "the institutions that trained it mean by them.",
                  "Its probabilities are not calibrated: 0.9 does not mean that 9 of 10 such answers are right."]
    else:
        lines.append("It can write what is false, and in a tone that does not show it.")
    if plan.private:
        lines.append("Memorisation of training rows is bounded as the section on privacy says, and not excluded. Rare "
                     "cases are learned least.")
    else:
        lines.append("It may reproduce rows of its training data.")
    lines += ["Languages, populations, devices and periods other than those of the data above were not tried, and "
              "FedLoRA does not record them.",
              "It keeps the biases and the licence of its base model.",
              "It is not a medical device. Decisions about people need a validation of their own, and a person who "
              "decides."]
    return "\n".join(f"- {line}" for line in lines)


def _versions(run: Provenance) -> str:
    found = ", ".join(f"{plain(name)} {number}" for name, number in run.versions.items() if number)
    return f"Plan by FedLoRA {plain(run.plan.fedlora_version)}, protocol {run.plan.protocol}." + (
        f" Written with {found}." if found else "")
