"""The privacy report as one page, privacy.md, for a person to read and sign. Its figures are the JSON's, shortened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fedlora.plan.limits import AGGREGATE, LOCAL
from fedlora.privacy.accounting import four_digits, short
from fedlora.privacy.mechanisms import mechanism_named
from fedlora.privacy.report import hazards, plain_words
from fedlora.privacy.report.dsse import spelled
from fedlora.privacy.report.figures import LABELS, shown, whom
from fedlora.privacy.report.signing import Document
from fedlora.privacy.report.text import code, table, text

MOST_LINES = 12
"""The most lines in the page's table of trainings; the rest is in privacy.json."""


def markdown(report: Document) -> str:
    """Return the page for a report of the version that is written, as Markdown."""
    run = report["run"]
    parts = [f"# Privacy report: dataset {code(run['dataset'])}, run {code(run['id'])}",
             f"{text(run['client'])} trained for the server {code(run['server'])} (strategy {text(run['strategy'])}"
             f", base model {text(_named(run['base_model']))}). Written {report['made']}.",
             _statement(report), _sums(report), plain_words.attacker(report), plain_words.responsible(report),
             _mechanism(report), _trainings(report), _lifetime(report), _left(report), plain_words.measured(report),
             "## What this does not cover\n\n" + "\n".join(f"- {text(line)}" for line in report["not_covered"]),
             _closing(report), plain_words.terms(report), hazards.appendix(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _statement(report: Document) -> str:
    privacy, unit = report["privacy"], report["unit"]
    if privacy["no_guarantee"] is not None:
        return f"**No guarantee.** {text(privacy['no_guarantee'])}. No epsilon is printed."
    guarantee = privacy["guarantee"]
    rows = ["| | steps | ε | PRV | RDP | PLD (check) |", "|---|---|---|---|---|---|"]
    for kind, label in LABELS.items():
        found = privacy[kind]
        by = [shown(found["accountants"][name]) for name in ("PRV", "RDP", "PLD")]
        rows.append(f"| {label} | {found['steps']} | **{shown(found['epsilon'])}** | {' | '.join(by)} |")
    released = sum(training["state"] == "released" for training in report["trainings"])
    apart = (f"Updates released: {released}. Charged, for all trainings that were begun: "
             f"ε {shown(privacy['spent']['epsilon'])}. Reserved, for the most trainings that this run may begin: "
             f"ε {shown(guarantee['epsilon'])}.")
    notes = "; ".join(sorted({privacy[kind]["note"] for kind in LABELS if privacy[kind]["note"]}))
    return "\n\n".join(filter(None, [
        f"**ε = {shown(guarantee['epsilon'])} at δ = {_delta(privacy['delta'])}** (accountant "
        f"{guarantee['accountant']}) is guaranteed for {text(whom(unit))}, whatever else an attacker knows. Relation: "
        f"{text(unit['relation'])}. "
        "In words: with and without this unit, the probability of anything that an attacker may observe differs at "
        "most by the factor e^ε, plus δ. This covers the run's planned maximum, so a run that stops early is covered "
        "too. The second line of the table is what was spent so far.",
        "\n".join(rows),
        f"PRV and RDP are upper bounds on ε, and the smaller one is stated. PLD is an independent check. {apart}",
        text(notes) and f"{text(notes)}.",
        f"**Against whom.** {text(report['adversary'])}"]))


def _sums(report: Document) -> str:
    """Return the section on secure sums: both guarantees, and what each assumes; "" without secure sums."""
    sums, privacy = report.get("sums"), report["privacy"]
    if sums is None or privacy["no_guarantee"] is not None:
        return ""
    lines = []
    if sums["no_guarantee"] is None:
        rows = [[name, _delta(privacy["delta"]), *(f"**{shown(part[kind]['epsilon'])}**" for kind in LABELS),
                 shown(part["guarantee"]["accountants"]["PLD"])]
                for name, part in (("by own noise, as above", privacy), ("in the sums", sums))]
        lines += [table(["", "δ", *(f"ε, {label}" for label in LABELS.values()), "PLD (check)"], rows), ""]
    lines += [f"- **By own noise.** {mechanism_named(LOCAL).promise}",
              f"- **In the sums.** {mechanism_named(AGGREGATE).promise}"]
    if sums["no_guarantee"] is not None:
        lines.append(f"- **No ε is stated for the sums.** {text(_sentence(sums['no_guarantee']))}.")
    which = "the noise of the sums" if sums["charged"] == "aggregate" else "this client's own noise"
    lines.append(f"- The budget of this data set is charged for {which}, as the owner's policy says (trust = "
                 f'"{text(sums["charged"])}").')
    lines += [f"- Roster {code(one['digest'][:16])}…: at least {one['honest']} of {one['members']} members honest in a "
              f"sum, {one['colluding']} may collude; noise of the sum {short(one['noise_multiplier'])} × this client's "
              f"sensitivity; the members' keys are {'pinned' if one['pinned'] else 'not pinned'} in policy.toml."
              for one in sums["rosters"][:MOST_LINES]]
    if len(sums["rosters"]) > MOST_LINES:
        lines.append(f"- {len(sums['rosters']) - MOST_LINES} more rosters are in privacy.json.")
    sent, opened = sum(one["state"] == "released" for one in report["trainings"]), len(sums["revealed"])
    lines.append(f"- Of {sent} masked uploads that left, this client revealed its shares of {opened}, so that their "
                 f"sums could be opened. It revealed no share of {sent - opened}: other members may have opened sums "
                 "that hold them. All are charged.")
    if sums["hold_out"]:
        lines.append(f"- A share of {short(sums['hold_out'])} of the units is held out: a drawn one adds how well the "
                     "model does on it to the sum, in place of a gradient and within the same bound, so that the "
                     "figures above cover it.")
    if sums["no_guarantee"] is None:
        lines += [f"- One person's records at two clients: ε = {shown(sums['two_clients'])} in the sums at the run's "
                  "maximum, if the other samples as this one does and clips to the plan's clip norm or less; by own "
                  "noise the two clients' ε add up.",
                  f"- Rounding to the grid adds {short(sums['rounding_delta'], up=True)} to δ, which is included."]
    return "## Two guarantees: by this client's own noise, and in the sums\n\n" + "\n".join(lines)


def _sentence(reason: str) -> str:
    return reason[0].upper() + reason[1:]


def _mechanism(report: Document) -> str:
    mechanism, unit, source = report["mechanism"], report["unit"], report["randomness"]
    scales = ", ".join(f"{text(name)} × {short(value)}" for name, value in mechanism["scales"].items())
    lines = [f"- {text(mechanism['name'])}. {text(mechanism['sampler'])}.",
             f"- Declared size {_size(unit['declared_size'])}, expected batch {mechanism['expected_batch']}, "
             f"sampling rate {_or_none(mechanism['sampling_rate'])}, noise multiplier (standard deviation / clip norm) "
             f"{_or_none(mechanism['noise_multiplier'])}. Clip norm (L2) {short(mechanism['clip_norm'])} over all "
             f"groups of tensors together, after scaling their gradients ({scales or 'no scales'}). At most "
             f"{mechanism['max_participations']} trainings of {mechanism['local_steps']} steps.",
             f"- Computed in {text(mechanism['precision'])}. {_independence(mechanism['batch_invariance'])}"
             if mechanism["noise_multiplier"] is not None else "",
             _round_0(mechanism) if any(training["round"] == 0 for training in report["trainings"]) else "",
             f"- A step uses at most {unit['rows_per_unit']} rows of one unit." if unit["rows_per_unit"] else "",
             f"- Randomness: {text(source['generator'])}; key: {text(source['key'])}; {text(source['gaussian'])}."]
    return "## Mechanism\n\n" + "\n".join(filter(None, lines))


def _round_0(mechanism: Document) -> str:
    if mechanism["noise_multiplier"] is None:
        return ("- Round 0 released gradients, or random projections of them, from which the adapters start. They were "
                "neither clipped nor noised.")
    return ("- Round 0 released random projections of the gradient, from which the adapters start: each record's are "
            "scaled to the clip norm, and their sum is noised as in any other round.")


def _independence(found: Document) -> str:
    """Return how it was shown that no record's arithmetic depends on another's, and for which shapes."""
    rows = ", ".join(f"{length} tokens × {rows}" for length, rows in sorted(
        found["rows"].items(), key=lambda item: int(item[0])))
    alone = f" One record at a time: {text(found['one_at_a_time'])}." if found["one_at_a_time"] else ""
    return f"Shown {text(found['shown'])} ({rows}).{alone}"


def _trainings(report: Document) -> str:
    """Return the table of trainings, with one line for each stretch of consecutive trainings that are alike."""
    stretches: list[list[Document]] = []
    for training in report["trainings"]:
        if stretches and _kind(stretches[-1][-1]) == _kind(training):
            stretches[-1].append(training)
        else:
            stretches.append([training])
    lines = ["| rounds (attempt) | state | noise multiplier | sampling rate | steps each |", "|---|---|---|---|---|"]
    for group in stretches[:MOST_LINES]:
        rounds = ", ".join(f"{t['round']} ({t['attempt']})" for t in group[:2 if len(group) > 3 else 3])
        if len(group) > 3:
            rounds += f", … {group[-1]['round']} ({group[-1]['attempt']}): {len(group)} in all"
        state, sigma, q, steps = _kind(group[0])
        lines.append(f"| {rounds} | {state} | {_or_none(sigma)} | {_or_none(q)} | {steps} |")
    if len(stretches) > MOST_LINES:
        lines.append(f"| {len(stretches) - MOST_LINES} more lines in privacy.json | | | | |")
    sent = [t["upload"] for t in report["trainings"] if t["state"] == "released" and t["upload"]]
    size = sum(u["bytes"] or 0 for u in sent)
    said = f"{len(sent)} uploads left this client, {size} bytes in all; the SHA-256 of each is in privacy.json."
    states = "What each state means stands in appendix A. " if stretches else ""
    return "## Every training that was begun\n\n" + ("\n".join(lines) if stretches else "None.") + f"\n\n{states}{said}"


def _kind(training: Document) -> tuple[Any, ...]:
    return tuple(training[name] for name in ("state", "noise_multiplier", "sampling_rate", "steps"))


def _lifetime(report: Document) -> str:
    account = report["lifetime"]
    if account is None:
        return ""
    lines = []
    if report["privacy"]["no_guarantee"] is None:
        limit = "No limit was declared" if account["epsilon"] is None else f"Limit ε = {short(account['epsilon'])}"
        left = "" if account["remaining"] is None else f", remaining {four_digits(account['remaining'], down=True)}"
        lines.append(f"- {limit} at δ = {_delta(account['delta'])}; counted {shown(account['spent'])}{left} "
                     f"({text(account['accountant'])}).")
    for name, words in (("overlapping", "Data sets that share records with this one; counted too"),
                        ("distinct", "Data sets that the owner declared to be about other people; not counted")):
        if account[name]:
            lines.append(f"- {words}: {', '.join(code(other) for other in account[name])}.")
    if account["closed_by"]:
        lines.append(f"- Closed by run {code(account['closed_by'])}, whose planned maximum counts in full; no further "
                     "run fits.")
    if account["new_ledger"]:
        lines.append(f"- **An earlier ledger was given up:** {text(account['new_ledger'])}. Spending that only that "
                     "ledger knew is not counted here.")
    if account["simulated"]:
        lines.append("- The ledger is a simulation's; it stands for no real data.")
    return "## The dataset's budget over all runs\n\n" + ("\n".join(lines) or "Nothing to state.")


def _left(report: Document) -> str:
    lines = [f"- {text(item['what'])}: {text(item['value'])}" for item in report["left_without_noise"]]
    return "## What left this client without noise\n\n" + "\n".join(lines)


def _closing(report: Document) -> str:
    found = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    digest = hashlib.sha256(spelled(report)).hexdigest()
    author = report.get("public_key")
    signed = f"Ed25519 public key `{author}`, signature in privacy.dsse.json." if author else "Not signed."
    return (f"---\n\n{text(found)}. SHA-256 of privacy.json: `{digest}`. {signed} `fedlora-client verify privacy.json` "
            "checks the signature and recomputes every ε, and what an attacker can learn, from the history in that "
            "file; this proves the arithmetic, not that noise was added.\n\n"
            "Read and approved, with appendices A and B: ______________________________   Date: ______________")


def _named(model: Mapping[str, str]) -> str:
    """Return a base model's name; for a model from a local folder, the first digits of its weights' hash instead."""
    name = model.get("name", "not named")
    return f"{name}:{model['weights_sha256'][:12]}" if name == "local" and "weights_sha256" in model else name


def _or_none(value: float | None) -> str:
    return "not stated" if value is None else short(value)


def _delta(value: float | None) -> str:
    return "not stated" if value is None else short(value, up=True)


def _size(value: int | None) -> str:
    return "not stated" if value is None else str(value)
