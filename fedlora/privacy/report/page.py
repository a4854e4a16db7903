"""A privacy report as one page that a person can read and sign. It has the JSON's figures and no others."""

from __future__ import annotations

from collections.abc import Mapping

from fedlora.privacy.accounting import four_digits
from fedlora.privacy.report.figures import LABELS, shown, whom
from fedlora.privacy.report.signing import document_digest

MOST_LINES = 12
"""Of trainings; the rest is in privacy.json."""


def markdown(report: Mapping) -> str:
    """The page, in Markdown."""
    run = report["run"]
    parts = [f"# Privacy report: dataset {_code(run['dataset'])}, run {_code(run['id'])}",
             f"{_text(run['client'])} trained for the server {_code(run['server'])} (strategy {_text(run['strategy'])}"
             f", base model {_text(_named(run['base_model']))}). Written {report['made']}.",
             _statement(report), _mechanism(report), _trainings(report), _lifetime(report), _left(report),
             "## What this does not cover\n\n" + "\n".join(f"- {_text(line)}" for line in report["not_covered"]),
             _closing(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _statement(report: Mapping) -> str:
    privacy, unit = report["privacy"], report["unit"]
    if privacy["no_guarantee"] is not None:
        return f"**No guarantee.** {_text(privacy['no_guarantee'])}. No epsilon is printed."
    guarantee = privacy["guarantee"]
    rows = ["| | steps | ε | PRV | RDP | PLD (check) |", "|---|---|---|---|---|---|"]
    for kind, label in LABELS.items():
        found = privacy[kind]
        by = [shown(found["accountants"][name]) for name in ("PRV", "RDP", "PLD")]
        rows.append(f"| {label} | {found['steps']} | **{shown(found['epsilon'])}** | {' | '.join(by)} |")
    released = sum(training["state"] == "released" for training in report["trainings"])
    apart = (f"Updates released: {released}. Charged for what was begun: ε {shown(privacy['spent']['epsilon'])}. "
             f"Reserved, the most that this run may begin: ε {shown(guarantee['epsilon'])}.")
    notes = "; ".join(sorted({privacy[kind]["note"] for kind in LABELS if privacy[kind]["note"]}))
    return "\n\n".join(filter(None, [
        f"**ε = {shown(guarantee['epsilon'])} at δ = {privacy['delta']!r}** ({guarantee['accountant']}) is guaranteed "
        f"for {_text(whom(unit))}, whatever else is known. Relation: {_text(unit['relation'])}. Stopping early is "
        "covered by it; the smaller figure is what was spent so far.",
        "\n".join(rows), apart, _text(notes) and f"{_text(notes)}.",
        f"**Against whom.** {_text(report['adversary'])}"]))


def _mechanism(report: Mapping) -> str:
    mechanism, unit, source = report["mechanism"], report["unit"], report["randomness"]
    scales = ", ".join(f"{_text(name)} × {value!r}" for name, value in mechanism["scales"].items())
    lines = [f"- {_text(mechanism['name'])}. {_text(mechanism['sampler'])}.",
             f"- declared size {_or_none(unit['declared_size'])}, expected batch {mechanism['expected_batch']}, "
             f"sampling rate {_or_none(mechanism['sampling_rate'])}, "
             f"noise multiplier {_or_none(mechanism['noise_multiplier'])}, clip norm "
             f"{mechanism['clip_norm']!r} on all groups together ({scales or 'no scales'}); at most "
             f"{mechanism['max_participations']} rounds of {mechanism['local_steps']} steps.",
             f"- computed in {_text(mechanism['precision'])}. {_independence(mechanism['batch_invariance'])}"
             if mechanism["noise_multiplier"] is not None else "",
             "- Round 0 released random projections of the gradient, for the adapters to start from: every record's "
             "are scaled to the clip norm, and their sum is noised as in any round."
             if any(training["round"] == 0 for training in report["trainings"]) else "",
             f"- at most {unit['rows_per_unit']} rows of one unit in a step." if unit["rows_per_unit"] else "",
             f"- Randomness: {_text(source['generator'])}; key: {_text(source['key'])}; {_text(source['gaussian'])}."]
    return "## Mechanism\n\n" + "\n".join(filter(None, lines))


def _independence(found: Mapping) -> str:
    """That no record's arithmetic depends on another's, and in which shapes."""
    rows = ", ".join(f"{length} tokens × {rows}" for length, rows in sorted(
        found["rows"].items(), key=lambda item: int(item[0])))
    alone = f" One record at a time: {_text(found['one_at_a_time'])}." if found["one_at_a_time"] else ""
    return f"Shown {_text(found['shown'])} ({rows}).{alone}"


def _trainings(report: Mapping) -> str:
    """One line for each stretch of trainings that are alike."""
    stretches: list[list[Mapping]] = []
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
    said = f"{len(sent)} uploads left, {size} bytes in all; the SHA-256 of each is in privacy.json."
    return "## Every training that was begun\n\n" + ("\n".join(lines) if stretches else "None.") + f"\n\n{said}"


def _kind(training: Mapping) -> tuple:
    return tuple(training[name] for name in ("state", "noise_multiplier", "sampling_rate", "steps"))


def _lifetime(report: Mapping) -> str:
    account = report["lifetime"]
    if account is None:
        return ""
    lines = []
    if report["privacy"]["no_guarantee"] is None:
        limit = "no limit was declared" if account["epsilon"] is None else f"limit ε = {account['epsilon']!r}"
        left = "" if account["remaining"] is None else f", remaining {four_digits(account['remaining'], down=True)}"
        lines.append(f"- {limit} at δ = {account['delta']!r}; counted {shown(account['spent'])}{left} "
                     f"({_text(account['accountant'])}).")
    for name, words in (("overlapping", "shares records with, and is charged for"),
                        ("distinct", "declared distinct by the owner, and not charged for")):
        if account[name]:
            lines.append(f"- {words}: {', '.join(_code(other) for other in account[name])}.")
    if account["closed_by"]:
        lines.append(f"- closed by run {_code(account['closed_by'])}, whose planned maximum counts in full.")
    if account["new_ledger"]:
        lines.append(f"- **An earlier ledger was given up:** {_text(account['new_ledger'])}. What it had counted is "
                     "not counted here.")
    if account["simulated"]:
        lines.append("- The ledger is a simulation's; it stands for no real data.")
    return "## The dataset's budget over all runs\n\n" + ("\n".join(lines) or "Nothing to state.")


def _left(report: Mapping) -> str:
    lines = [f"- {_text(item['what'])}: {_text(item['value'])}" for item in report["left_without_noise"]]
    return "## What left this client without noise\n\n" + "\n".join(lines)


def _closing(report: Mapping) -> str:
    found = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    signature = report.get("signature")
    signed = f"Ed25519 public key `{signature['public_key']}`." if signature else "Not signed."
    return (f"---\n\n{_text(found)}. SHA-256 of privacy.json without its signature (canonical form): "
            f"`{document_digest(report)}`. {signed} `fedlora-client verify privacy.json` recomputes every ε above from "
            "the signed history; that proves the arithmetic, not that noise was added.\n\n"
            "Read and approved: ______________________________   Date: ______________")


def _named(model: Mapping[str, str]) -> str:
    """A base model by its name; a folder, which has none that travels, by what the hash of its weights begins with."""
    name = model.get("name", "not named")
    return f"{name}:{model['weights_sha256'][:12]}" if name == "local" and "weights_sha256" in model else name


def _or_none(value: float | None) -> str:
    return "not stated" if value is None else repr(value)


def _text(value: str) -> str:
    """A name that somebody chose, as plain text: no line breaks, no markup, no table cells."""
    plain = "".join(c if c.isprintable() else " " for c in value)
    for mark in "\\`*_[]<>|#":
        plain = plain.replace(mark, "\\" + mark)
    return plain


def _code(value: str) -> str:
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in value) + "`"
