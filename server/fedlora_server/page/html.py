"""The page report.html in HTML: what the run does, its figures, rounds, clients, disclosures and options.

Whatever a client can choose, such as its name or a refusal's text, is escaped and shortened. The page has no script and
loads nothing. While the run lasts, browsers load it anew every `REFRESH_S` seconds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import fedlora
from fedlora import figures, style, svg
from fedlora.config import flag, shown
from fedlora.figures import MAJORITY
from fedlora.plan import to_scalars
from fedlora.quantities import decimal, duration, quantity
from fedlora_server.observer import RoundRecord
from fedlora_server.phases import AGGREGATING, DOING, TRAINING
from fedlora_server.progress import Asked, Now

from .account import DECLINED, LEFT_OUT, LOST, MARKS, NOT_ASKED, REPLIED, Account, Member
from .charts import charts

REFRESH_S = 10
"""Seconds after which a browser loads the page again."""
LONGEST = 160
"""Most characters of a text that a client can choose."""
OPEN_ROUNDS, FOLDED_ROUNDS = 20, 480
"""Number of the last rounds in the table, and of those before them that can be unfolded."""
OPEN_CLIENTS, MOST_CLIENTS = 20, 500
"""Number of clients in a table that is not folded, and in all."""
MOST_ASKED = 200
"""Number of clients of the open round that are listed."""

BRIEF = ("strategy", "model", "task", "privacy", "rank", "local_steps", "batch_size", "lr", "clip_norm")
"""The options that are named before the rest is unfolded."""

ENDED = {"finished": "finished", "stopped": "stopped before its last round", "diverged": "ended: training diverged",
         "wait-timeout": "ended: too few clients"}
MARKED = {REPLIED: "replied", LEFT_OUT: "replied, left out", DECLINED: "declined", LOST: "lost or late",
          NOT_ASKED: "not asked"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(account: Account, now: Now, *, title: str, run_id: str = "", options: Mapping[str, object] | None = None,
         joined: Mapping[str, Mapping[str, object]] | None = None) -> str:
    """Return the page.

    Args:
        account: what happened so far.
        now: what the run does.
        title: the run in a few words.
        run_id: the run's id; "" for none.
        options: the command's options by name, with the preset's values.
        joined: client name → what it disclosed when it joined.
    """
    goes_on = not account.closed
    state = _state(account, now)
    finished = f"round {now.finished} of {now.planned}" if now.planned else "no round yet"
    parts = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta http-equiv="refresh" content="{REFRESH_S}">' if goes_on else "",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">', '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(title)}: {_text(state)}, {finished}</title>", f"<style>{STYLE}</style>", "</head>",
        "<body>", f"<h1>{_text(title)}</h1>",
        f'<p class="about">{"run <code>" + _text(run_id) + "</code>, " if run_id else ""}as of '
        f"{_at(time.time())}{'. The page is loaded anew every few seconds' if goes_on else ''}</p>",
        _tiles(account, now, state), _under_way(now) if goes_on else "", _notes(account)]
    drawn = charts(account.records)
    if drawn:
        parts.append(_section("Curves", f'<div class="charts">{"".join(drawn)}</div>{_recalls(account.records)}'))
    parts += [_rounds(account), _sums(account), _clients(account), _disclosed(account, joined or {}),
              _settings(account, options or {}),
              f"<footer>Written by FedLoRA {_text(fedlora.__version__)}. ε is not on this page: each client accounts "
              "for its own, in its own privacy report, and does not tell the server.</footer>", "</body>", "</html>\n"]
    return "\n".join(filter(None, parts))


def _state(account: Account, now: Now) -> str:
    if account.ended:
        return ENDED.get(account.ended, account.ended)
    return "ended before its last round" if account.closed else DOING[now.phase]


def _tiles(account: Account, now: Now, state: str) -> str:
    records, planned = account.records, now.planned
    resumed = f"resumed after round {account.resumed_after}" if account.resumed_after is not None else ""
    tiles = [("now" if not account.closed else "run", state, resumed),
             ("rounds finished", f"{now.finished} of {planned}" if planned else "none yet", "")]
    tiles += _figure(records)
    if now.run_left_s is not None and not account.closed:
        tiles.append(("time left", f"about {duration(now.run_left_s)}", "if rounds go on as they did"))
    trained = [record for record in records if record.round or record.cohort]
    if trained:
        tiles += [("time of the rounds", duration(sum(r.seconds for r in trained)), ""),
                  ("bytes up, down", f"{quantity(sum(r.bytes_up for r in trained))}, "
                   f"{quantity(sum(r.bytes_down for r in trained))}", "of all clients")]
    return "<dl class=tiles>" + "".join(
        f"<div><dt>{_text(title)}</dt><dd>{_text(value)}</dd><dd class=small>{_text(more)}</dd></div>"
        for title, value, more in tiles) + "</dl>"


def _figure(records: Sequence[RoundRecord]) -> list[tuple[str, str, str]]:
    """Return the tile of the task's first figure: (title, value, its interval and what to compare it with)."""
    evaluated = [record for record in records if record.evaluation]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    name, value = next(iter(figures.headline(last.evaluation).items()), ("", math.nan))
    if not name:
        return []
    low, high, majority = (last.evaluation.get(f"{name}/{end}") for end in ("low", "high", "majority"))
    beside = [f"{decimal(low)} to {decimal(high)}"] if low is not None and high is not None else []
    beside += [f"majority {decimal(majority)}"] if majority is not None else []
    if last.round and not first.round and name in first.evaluation:
        beside.append(f"{decimal(first.evaluation[name])} before")
    told = f"after round {last.round}" if last.round else "before training"
    return [(f"{figures.title(name)} {told}", decimal(value), "; ".join(beside))]


def _under_way(now: Now) -> str:
    """Return the section about the open round; "" between rounds."""
    if not now.asked or (now.phase not in (TRAINING, AGGREGATING) and not now.why):
        return f"<p>{_text(now.why)}</p>" if now.why else ""
    replied = sum(one.outcome == "uploaded" for one in now.asked)
    working = sum(not one.outcome for one in now.asked)
    lost = sum(one.outcome in ("lost", "late") for one in now.asked)
    told = [f"{replied} of {len(now.asked)} clients have replied", f"{working} working" if working else "",
            f"{lost} lost or late" if lost else "",
            f"{duration(now.round_left_s)} left for the clients asked so far" if now.round_left_s is not None else "",
            now.why]
    order = sorted(now.asked, key=lambda one: (one.outcome == "uploaded", bool(one.outcome), -one.seconds, one.name))
    rows = [(_name(one.name), *_doing(one)) for one in order[:MOST_ASKED]]
    more = _more(len(order) - len(rows), "clients")
    return _section(f"Round {now.current}", f"<p>{_text(', '.join(filter(None, told)))}.</p>"
                    + _folded(_table(("client", "state", "for", "asked at"), rows, "llrr"), len(rows) > OPEN_CLIENTS,
                              f"{len(rows)} clients") + more)


def _doing(one: Asked) -> tuple[str, str, str]:
    state = {"": "working", "uploaded": "replied", "lost": "lost", "late": "late"}.get(one.outcome)
    told = f"declined: {_text(one.outcome)}" if state is None else state
    return told, duration(one.seconds), f"{datetime.fromtimestamp(one.since):%H:%M:%S}"


def _notes(account: Account) -> str:
    if not account.notes:
        return ""
    lines = "".join(f"<li><time>{datetime.fromtimestamp(at):%H:%M:%S}</time> {_text(line, 400)}</li>"
                    for at, line in reversed(account.notes))
    return _section("Noticed", f"<ul class=notes>{lines}</ul>")


def _recalls(records: Sequence[RoundRecord]) -> str:
    """Return the recall of each label after the last evaluation, with its interval."""
    last = next((record for record in reversed(records) if record.evaluation), None)
    found = {} if last is None else {name.removeprefix("recall/"): value for name, value in last.evaluation.items()
                                     if name.startswith("recall/") and not name.endswith(("/low", "/high"))}
    if last is None or not found:
        return ""
    rows = []
    for label, value in found.items():
        low, high = (last.evaluation.get(f"recall/{label}/{end}", math.nan) for end in ("low", "high"))
        rows.append((_text(label), decimal(value), f"{decimal(low)} to {decimal(high)}"))
    return f"<h3>Recall of each label after round {last.round}</h3>" + _table(
        ("label", "recall", "95 % interval"), rows, "lrr")


def _sums(account: Account) -> str:
    """Return the section about secure sums; "" in a run without secure aggregation."""
    opened = [record for record in account.records if record.roster]
    if not opened:
        return ""
    rosters, unopened = len({record.roster for record in opened}), sum(record.unopened for record in opened)
    phases = ", ".join(f"{phase} {statistics.median(record.phases.get(phase, 0.0) for record in opened):.2f} s"
                       for phase in opened[-1].phases)
    told = (f"{len(opened)} sums were opened, with {rosters} roster{'s' * (rosters != 1)}; {unopened} "
            f"attempt{'s' * (unopened != 1)} ended unopened. The last roster's digest is {opened[-1].roster[:16]}….")
    return _section("Secure sums", f"<p>{_text(told)}</p>" + (f"<p>{_text(f'Median of a round: {phases}.')}</p>"
                                                              if phases else ""))


def _rounds(account: Account) -> str:
    records = account.records
    if not records:
        return ""
    measured = list(dict.fromkeys(name for record in records for name in figures.headline(record.evaluation)))
    losses = any(record.train_loss is not None for record in records)
    secure = any(record.roster for record in records)
    heads = ("round", "in the sum" if secure else "replied", *map(figures.title, measured), "update norm",
             *(("training loss",) if losses else ()), "up", "down", "seconds")

    def row(record: RoundRecord) -> tuple[str, ...]:
        values = (decimal(record.evaluation[name]) if name in record.evaluation else "" for name in measured)
        asked = f"{len(record.uploaded)} of {len(record.cohort)}" if record.cohort else ""
        loss = ("" if record.train_loss is None else decimal(record.train_loss),) if losses else ()
        return (str(record.round), asked, *values, "" if record.update_norm is None else f"{record.update_norm:.3g}",
                *loss, *((quantity(record.bytes_up), quantity(record.bytes_down), f"{record.seconds:.1f}")
                         if record.cohort else ("", "", "")))

    last = [row(record) for record in reversed(records[-OPEN_ROUNDS:])]
    before = [row(record) for record in reversed(records[-OPEN_ROUNDS - FOLDED_ROUNDS:-OPEN_ROUNDS])]
    earlier = len(records) - len(last) - len(before)
    rates = [record.evaluation[MAJORITY] for record in records if MAJORITY in record.evaluation]
    told = f"<p>The most frequent label alone gives an accuracy of {decimal(rates[-1])}.</p>" if rates else ""
    return _section("Rounds", told + _table(heads, last, "r" * len(heads)) + (
        _folded(_table(heads, before, "r" * len(heads)), True, f"{len(before)} earlier rounds") if before else "")
        + _more(earlier, "rounds, which are in metrics.jsonl"))


def _clients(account: Account) -> str:
    if not account.members:
        return ""
    members = sorted(account.members.items())
    rows = [_member_row(name, member) for name, member in members[:MOST_CLIENTS]]
    marks = "".join(f"<li><b>{mark}</b> {MARKED[mark]}</li>" for mark in MARKS)
    table = _table(("client", "replied", "left out", "lost", "declined", "last reply", "last rounds"), rows, "lrrrllr")
    more = _more(len(members) - len(rows), "clients")
    if account.unfollowed:
        more += f"<p>{account.unfollowed:,} orders to further clients are not counted here.</p>"
    return _section("Clients", f"<ul class=marks>{marks}</ul>" + _folded(
        table, len(rows) > OPEN_CLIENTS, f"{len(rows)} clients") + more)


def _member_row(name: str, member: Member) -> tuple[str, ...]:
    refused = ", ".join(f"{code} {count}" for code, count in member.refused.items())
    return (_name(name), f"{member.uploaded} of {member.asked}", str(member.left_out or ""), str(member.lost or ""),
            _text(refused), "" if member.last is None else f"round {member.last}",
            f"<span class=strip>{''.join(member.marks)}</span>")


def _disclosed(account: Account, joined: Mapping[str, Mapping[str, object]]) -> str:
    names = sorted(joined.keys() | {name for name, member in account.members.items() if member.spans})
    if not names:
        return ""
    rows = []
    for name in names[:MOST_CLIENTS]:
        member = account.members.get(name, Member())
        spans = [f"{member.earlier} earlier rounds: in report.json"] if member.earlier else []
        spans += [f"round{'s' if span.last > span.first else ''} {span.first}"
                  + (f" to {span.last}" if span.last > span.first else "") + f": {_told(span.said)}"
                  for span in member.spans]
        rows.append((_name(name), _text(_told(joined.get(name, {})), 800), "<br>".join(
            _text(span, 400) for span in spans)))
    return _section("Disclosed", "<p>All that clients told this server beside their updates' tensors. "
                    "report.json has it in full.</p>" + _folded(
                        _table(("client", "when it joined", "with its uploads"), rows, "lll"),
                        len(rows) > OPEN_CLIENTS, f"{len(rows)} clients")
                    + _more(len(names) - len(rows), "clients"))


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else (
        f"{value:.4g}" if isinstance(value, float) else str(value))


def _settings(account: Account, options: Mapping[str, object]) -> str:
    given = {f"--{flag(name)}": shown(value) for name, value in sorted(options.items())
               if value not in (None, (), False, "")}
    parts = []
    if account.plan is not None:
        parts.append(_folded(_pairs({name: _value(value) for name, value in to_scalars(account.plan).items()
                                     if value not in ("", [], ())}), True, "the plan, as clients are told"))
    if given:
        parts.insert(0, _folded(_pairs(given), True, "the command's options, with the preset's values"))
    brief = [f"{name.replace('_', ' ')} {shown(options[name])}" for name in BRIEF if options.get(name) is not None]
    return _section("Configuration", (f"<p>{_text('; '.join(brief), 800)}.</p>" if brief else "") + "".join(parts)
                    ) if parts else ""


def _pairs(values: Mapping[str, str]) -> str:
    return "<dl class=pairs>" + "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value, 800)}</dd></div>"
                                        for name, value in values.items()) + "</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _folded(content: str, fold: bool, title: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>" if fold else content


def _more(count: int, what: str) -> str:
    return f"<p>and {count:,} more {what}</p>" if count > 0 else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    """Return a table.

    Args:
        heads: the columns' titles.
        rows: the cells, in HTML.
        sides: for each column "l" or "r", the side that its cells are aligned to.
    """
    classes = ["" if side == "l" else " class=r" for side in sides]
    head = "".join(f"<th scope=col{c}>{_text(title)}</th>" for title, c in zip(heads, classes, strict=True))
    body = "\n".join("<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True)) + "</tr>"
                     for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _name(name: str) -> str:
    return f"<bdi>{_text(name)}</bdi>"


def _text(text: str, longest: int = LONGEST) -> str:
    return svg.written(text if len(text) <= longest else text[:longest - 1] + "…")


def _at(moment: float) -> str:
    return f"<time>{datetime.fromtimestamp(moment).astimezone():%Y-%m-%d %H:%M:%S %Z}</time>"


def _variables(of: Callable[[str], str]) -> str:
    used = dict.fromkeys((*style.COLOURS, style.UP, style.DOWN, style.TIME))
    colours = "".join(f"--c{colour[1:]}:{of(colour)};" for colour in used)
    return f"--ink:{of(style.INK)};--paper:{of(style.PAPER)};--grid:{of(style.GRID)};{colours}"


STYLE = (":root{" + _variables(str) + "--quiet:#5c6570;--tile:#f5f6f8}"
         "@media (prefers-color-scheme:dark){:root{" + _variables(lambda colour: style.ON_DARK.get(colour, colour))
         + "--quiet:#a7aeb7;--tile:#20252b}}" """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:1.2rem 1rem 3rem;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,'DejaVu Sans',Helvetica,Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.45rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}h3{font-size:.95rem;margin:1.2rem 0 .4rem}
.about,footer,.small{color:var(--quiet)}.about{margin:.2rem 0 1rem}footer{margin-top:2.5rem;font-size:.85rem}
p{margin:.4rem 0 .7rem}code{font-size:.92em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:.6rem;margin:0}
.tiles div{background:var(--tile);border-radius:6px;padding:.55rem .75rem}
.tiles dt{font-size:.8rem;color:var(--quiet)}.tiles dd{margin:0;font-size:1.08rem;font-weight:600}
.tiles dd.small{font-size:.8rem;font-weight:400}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.2rem 1.6rem}
figure{margin:0}figcaption{font-size:.9rem;margin-bottom:.2rem}figure>svg{width:100%;height:auto;display:block}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
.legend,.marks{list-style:none;margin:.3rem 0 0;padding:0;font-size:.82rem;display:flex;flex-wrap:wrap;gap:.15rem .9rem}
.legend svg{vertical-align:-1px}.marks{margin-bottom:.6rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:40%}
th,td{padding:.28rem .8rem .28rem 0;text-align:left;vertical-align:top;overflow-wrap:normal}
th{color:var(--quiet);font-weight:500;border-bottom:1px solid var(--grid);white-space:nowrap}
tbody tr+tr td{border-top:1px solid var(--grid)}th.r,td.r{text-align:right}td.r{white-space:nowrap}
td bdi{display:inline-block;min-width:6rem;max-width:22rem;overflow-wrap:anywhere}
.strip{font-family:ui-monospace,'DejaVu Sans Mono',monospace;letter-spacing:.05em}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--quiet);font-size:.9rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:.15rem 1.2rem;
margin:.4rem 0;font-size:.85rem}.pairs div{display:flex;gap:.6rem}
.pairs dt{color:var(--quiet);white-space:nowrap}.pairs dd{margin:0}
.notes{list-style:none;margin:0;padding:0;font-size:.9rem}.notes li{padding:.15rem 0}.notes time{color:var(--quiet)}
@media print{body{max-width:none;padding:0;font-size:11px}.tiles div{border:1px solid var(--grid)}
section,figure,tr{break-inside:avoid}details::details-content{content-visibility:visible;display:block}
.wide{overflow:visible}}
""")
