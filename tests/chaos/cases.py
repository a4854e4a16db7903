"""The table of cases: what happens, to whom, at which moment, and how the run must end.

A case says only what differs from the rule. The rule: every process ends with 0, started again by its supervisor if
need be and by no person; the adapter has the bits of a run to which nothing happens; no training is charged twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fnmatch import fnmatch
from itertools import cycle
from signal import SIGKILL, SIGSTOP, SIGTERM

from tests.chaos import clocks, disks, links
from tests.chaos.faults import Clock, Damage, Disk, Fault, Lapsed, Renewal, ShortLived, Signal, Weather
from tests.chaos.links import CUT, NO_ANSWER, NO_REQUEST, Link
from tests.chaos.observed import CLIENTS, EVERYONE, SERVER
from tests.kills import POINTS

KINDS = ("quiet", "kill", "stop", "link", "disk", "clock", "renewal")
LIMIT_S = 60.0
"""Seconds that a case may last, on an idle machine with two cores."""
OF_OTHERS = 5
"""Updates that the server has in round 2 while one client waits: three of round 1, and those of the other two."""
NOTICED_S = 40.0
"""Seconds after which a peer that does not answer has been given up (`fedlora.wire.NOTICED_WITHIN_S` is 35)."""


@dataclass(frozen=True)
class Step:
    """Faults that strike together, at a moment, and are mended some time later.

    Attributes:
        faults: what happens.
        who: the process whose passing of a point is the moment; "" for before any process starts.
        point: the point (`tests.kills.POINTS`, `SERVER_POINTS`, `tests.chaos.tested.OTHER_POINTS`).
        times: which passing of it, in one process's life.
        lasts_s: seconds until it is mended.
        after_updates: how many updates the server must have received before the faults strike; until then the process
            waits at the point, and the others go on.
    """

    faults: tuple[Fault, ...]
    who: str = ""
    point: str = ""
    times: int = 1
    lasts_s: float = 0.0
    after_updates: int = 0


@dataclass(frozen=True)
class Case:
    """One run and what happens to it.

    Attributes:
        name: what happens.
        kind: one of `KINDS`.
        steps: what happens when.
        without: clients of which an update may be missing in a round. A training that was charged and lost is not in
            the run's budget a second time, so that its client lacks one for the last round. The adapter must then be
            that of every other run with the same updates. If a person has to see to the client, the run may end
            before it is back.
        by_hand: processes that a person has to start again, once it is mended.
        untold: clients that may end without having learned that the run has ended.
        leaves: patterns of files that may be left behind, beside those of a quiet run.
        options: further options of the server.
        limit_s: seconds that it may last.
        setting: what else a quiet run needs, to be compared with: "plain", "links", "disks" or "clocks".
    """

    name: str
    kind: str
    steps: tuple[Step, ...] = ()
    without: frozenset[str] = frozenset()
    by_hand: frozenset[str] = frozenset()
    untold: frozenset[str] = frozenset()
    leaves: tuple[str, ...] = ()
    options: tuple[object, ...] = ()
    limit_s: float = LIMIT_S
    setting: str = "plain"

    @property
    def needs_links(self) -> bool:
        return self.setting == "links"

    @property
    def needs_disks(self) -> bool:
        return self.setting == "disks"

    @property
    def clocked(self) -> frozenset[str]:
        """Names of the processes with a clock of their own; they take some seconds longer to begin."""
        jumping = {who for step in self.steps for fault in step.faults if isinstance(fault, Clock) for who in fault.who}
        return frozenset(jumping or {SERVER} if self.setting == "clocks" else ())

    @property
    def why_skipped(self) -> str:
        """Why this machine cannot do it; "" if it can."""
        return {"links": links, "disks": disks, "clocks": clocks}[self.setting].why_none() if (
            self.setting != "plain") else ""

    def matches(self, pattern: str) -> bool:
        return fnmatch(f"{self.kind}: {self.name}", f"*{pattern}*")


SETTINGS = ("plain", "links", "disks", "clocks")
QUIET = {setting: Case("nothing happens" if setting == "plain" else f"nothing happens, with {setting} of our own",
                       "quiet", setting=setting) for setting in SETTINGS}

STORED = ("once that is noted", "before the witness", "after the witness", "before the release", "after the release",
          "before sending", "while sending", "after sending")
"""A client's points from which its update is sent again, and not trained again."""
OF_A_CLIENT = ("before it joins", "once it has read its certificate", "before it is ready", "before the charge",
               *POINTS, "once the run has ended")
OF_THE_SERVER = ("before it listens", "before the run is written", "once the run is written",
                 "before it reads its certificate again", "before it reads the list of clients", "before it asks",
                 "once it has noted whom it asks", "while an upload comes", "once an upload is stored",
                 "before the aggregation", "after the aggregation", "before a round's line",
                 "before a round's checkpoint", "once a round's checkpoint is written", "before the report",
                 "before the report, after the adapter", "once the report is written", "before it says goodbye")
PASSED_AGAIN = frozenset(POINTS) | {"before it asks", "once it has noted whom it asks", "once an upload is stored",
                                    "before the aggregation", "after the aggregation", "before a round's line",
                                    "before a round's checkpoint", "once a round's checkpoint is written"}
"""Points that are passed in each round; the second passing is taken, so that something was done before."""


def at(who: str, point: str, *faults: Fault, lasts_s: float = 0.0, times: int = 0, after_updates: int = 0) -> Step:
    return Step(faults, who, point, times or (2 if point in PASSED_AGAIN else 1), lasts_s, after_updates)


def loser(who: str, point: str) -> frozenset[str]:
    """Return the client if its death at the point loses a training that is charged."""
    return frozenset({who} if point in POINTS and point not in STORED else ())


def left_out(who: str, point: str) -> frozenset[str]:
    """Return the client if no server is left for it at the point, from which it could learn that the run has ended."""
    return frozenset({who} if point == "once the run has ended" else ())


def cases() -> Sequence[Case]:
    """Return all cases; each name is there once."""
    return [*QUIET.values(), *_kills(), *_stops(), *_links(), *_disks(), *_clocks(), *_renewals()]


def _kills() -> Iterator[Case]:
    for point in OF_THE_SERVER:
        yield Case(f"the server is killed {point}", "kill", (at(SERVER, point, Signal((SERVER,), SIGKILL)),),
                   leaves=("server/run-interrupted-1/*",) if point == "before the run is written" else ())
    for who, point in zip(cycle(CLIENTS), OF_A_CLIENT):
        yield Case(f"{who} is killed {point}", "kill", (at(who, point, Signal((who,), SIGKILL)),),
                   without=loser(who, point), untold=left_out(who, point))
    yield Case("all are killed while north trains", "kill", (
        at("north", "during the training", Signal(EVERYONE, SIGKILL), times=3, after_updates=OF_OTHERS),),
        without=frozenset({"north"}))
    yield Case("all are killed before a round's checkpoint", "kill", (
        at(SERVER, "before a round's checkpoint", Signal(EVERYONE, SIGKILL)),))
    yield Case("all clients are killed while north sends", "kill", (
        at("north", "while sending", Signal(CLIENTS, SIGKILL), after_updates=OF_OTHERS),))
    yield Case("each client is killed, one in each round", "kill", tuple(
        at(who, "while sending", Signal((who,), SIGKILL), times=times) for times, who in enumerate(CLIENTS, 1)))
    yield Case("the server is killed in each round and at its end", "kill", tuple(
        at(SERVER, point, Signal((SERVER,), SIGKILL), times=1) for point in (
            "once an upload is stored", "before the aggregation", "before a round's line", "before the report")))
    yield Case("south is killed while north trains", "kill", (
        at("north", "during the training", Signal(("south",), SIGKILL), times=3, after_updates=OF_OTHERS),))
    yield Case("the server is killed while north trains", "kill", (
        at("north", "during the training", Signal((SERVER,), SIGKILL), times=3, after_updates=OF_OTHERS),))


def _stops() -> Iterator[Case]:
    for point in ("before it listens", "once the run is written", "once it has noted whom it asks",
                  "while an upload comes", "before the aggregation", "before a round's checkpoint",
                  "before the report, after the adapter"):
        yield Case(f"the server gets SIGTERM {point}", "stop", (at(SERVER, point, Signal((SERVER,), SIGTERM)),))
    for who, point in zip(cycle(CLIENTS), ("before it joins", "before it is ready", "before the charge",
                                           "during the training", "before the update is kept", "while sending",
                                           "once the run has ended")):
        yield Case(f"{who} gets SIGTERM {point}", "stop", (at(who, point, Signal((who,), SIGTERM)),),
                   without=loser(who, point), untold=left_out(who, point))
    yield Case("all get SIGTERM while north trains", "stop", (
        at("north", "during the training", Signal(EVERYONE, SIGTERM), times=3, after_updates=OF_OTHERS),),
        without=frozenset({"north"}))
    for point in ("once the run is written", "while an upload comes", "before the aggregation",
                  "before a round's checkpoint", "before it says goodbye"):
        yield Case(f"the server is stopped for 3 s {point}", "stop", (
            at(SERVER, point, Signal((SERVER,), SIGSTOP), lasts_s=3),))
    for who, point in zip(cycle(CLIENTS), ("before it is ready", "during the training", "before the update is kept",
                                           "while sending", "after sending")):
        yield Case(f"{who} is stopped for 3 s {point}", "stop", (at(who, point, Signal((who,), SIGSTOP), lasts_s=3),))
    long = replace(QUIET["plain"], kind="stop", limit_s=LIMIT_S + 2 * NOTICED_S)
    yield replace(long, name=f"the server is stopped for {NOTICED_S:g} s while an upload comes", steps=(
        at(SERVER, "while an upload comes", Signal((SERVER,), SIGSTOP), lasts_s=NOTICED_S),))
    yield replace(long, name=f"south is stopped for {NOTICED_S:g} s while it sends", steps=(
        at("south", "while sending", Signal(("south",), SIGSTOP), lasts_s=NOTICED_S),))


def _links() -> Iterator[Case]:
    quiet = replace(QUIET["links"], kind="link")

    def bad(name: str, link: Link, who: Sequence[str], *moment: str, lasts_s: float, **more: object) -> Case:
        step = at(*moment, Weather(tuple(who), link), lasts_s=lasts_s) if moment else (
            Step((Weather(tuple(who), link),), lasts_s=lasts_s))
        return replace(quiet, name=name, steps=(step,), **more)

    for who, point in zip(cycle(CLIENTS), ("before it joins", "before it is ready", "during the training",
                                           "while sending", "after sending")):
        yield bad(f"the link of {who} is cut for 3 s {point}", CUT, [who], who, point, lasts_s=3)
    for point in ("once it has noted whom it asks", "while an upload comes", "before the aggregation",
                  "before it says goodbye"):
        yield bad(f"all links are cut for 3 s {point} (at the server)", CUT, CLIENTS, SERVER, point, lasts_s=3,
                  untold=frozenset(CLIENTS if point == "before it says goodbye" else ()))
    long = LIMIT_S + 2 * NOTICED_S
    yield bad(f"the link of east is cut for {NOTICED_S:g} s while it sends", CUT, ["east"], "east", "while sending",
              lasts_s=NOTICED_S, limit_s=long)
    yield bad("every packet takes 200 ms", Link(delay_s=0.2), CLIENTS, lasts_s=1e9)
    yield bad("2 % of the packets are lost", Link(loss=0.02), CLIENTS, lasts_s=1e9)
    yield bad("200 ms, and 2 % are lost", Link(delay_s=0.2, loss=0.02), CLIENTS, lasts_s=1e9)
    yield bad("20 % of the packets are lost", Link(loss=0.2), CLIENTS, lasts_s=1e9, limit_s=long)
    yield bad("20 kB/s", Link(bytes_per_s=20_000), CLIENTS, lasts_s=1e9)
    yield bad("1 byte/s for 5 s while north sends", Link(bytes_per_s=1), ["north"], "north", "while sending", lasts_s=5)
    yield bad("1 byte/s for 5 s while south joins", Link(bytes_per_s=1), ["south"], "south", "before it joins",
              lasts_s=5)
    yield bad(f"1 byte/s for {NOTICED_S:g} s while east sends", Link(bytes_per_s=1), ["east"], "east", "while sending",
              lasts_s=NOTICED_S, limit_s=long)
    yield bad("north hears nothing for 5 s while it sends", NO_ANSWER, ["north"], "north", "while sending", lasts_s=5)
    yield bad("nothing of south arrives for 5 s while it sends", NO_REQUEST, ["south"], "south", "while sending",
              lasts_s=5)
    yield bad(f"east hears nothing for {NOTICED_S:g} s after sending", NO_ANSWER, ["east"], "east", "after sending",
              lasts_s=NOTICED_S, limit_s=long)
    yield bad(f"nothing of north arrives for {NOTICED_S:g} s while it trains", NO_REQUEST, ["north"], "north",
              "during the training", lasts_s=NOTICED_S, limit_s=long)
    yield replace(quiet, name="the server is killed while no link carries anything", steps=(
        at(SERVER, "once an upload is stored", Weather(CLIENTS, CUT), Signal((SERVER,), SIGKILL), lasts_s=4),),
        limit_s=long)
    yield replace(quiet, name="north's link comes and goes in each round", steps=tuple(
        at("north", point, Weather(("north",), CUT), lasts_s=1.5, times=times) for times, point in (
            (1, "while sending"), (1, "before sending"), (1, "during the training"))))
    yield replace(quiet, name="a link of 1 byte/s outlasts the round, and the others go on", steps=(
        at("south", "before sending", Weather(("south",), Link(bytes_per_s=1)), lasts_s=12),),
        options=("--round-timeout", 6), limit_s=long, without=frozenset({"south"}), untold=frozenset({"south"}))


def _disks() -> Iterator[Case]:
    quiet = replace(QUIET["disks"], kind="disk")

    def disk(who: str, what: str, *moment: str, lasts_s: float = 3, **more: object) -> Case:
        fault = Disk(who, what)
        step = at(who, *moment, fault, lasts_s=lasts_s) if moment else Step((fault,), lasts_s=lasts_s)
        return replace(quiet, name=f"the disk of {'the server' if who == SERVER else who} is {what} for {lasts_s:g} s "
                       f"{moment[0] if moment else 'when it starts'}", steps=(step,), **more)

    yield disk(SERVER, "full")
    for point in ("before the run is written", "before it asks", "while an upload comes", "before a round's line",
                  "before a round's checkpoint", "before the report"):
        yield disk(SERVER, "full", point)
    for who, point in zip(cycle(CLIENTS), ("before the charge", "during the training", "before the update is kept",
                                           "before that is noted", "before the witness", "before the release")):
        yield disk(who, "full", point, without=frozenset({who}), by_hand=frozenset({who}))
    yield disk("south", "full", "once the run has ended")
    yield disk("north", "full", by_hand=frozenset({"north"}))
    yield disk(SERVER, "read-only", by_hand=frozenset({SERVER}))
    for point in ("while an upload comes", "before a round's checkpoint"):
        yield disk(SERVER, "read-only", point, by_hand=frozenset({SERVER}))
    yield disk("south", "read-only", by_hand=frozenset({"south"}))
    for who, point in (("north", "before the charge"), ("south", "before the update is kept"),
                       ("east", "before the witness")):
        yield disk(who, "read-only", point, without=frozenset({who}), by_hand=frozenset({who}))


def _clocks() -> Iterator[Case]:
    quiet = replace(QUIET["clocks"], kind="clock", limit_s=1.5 * LIMIT_S)
    hours, days = timedelta(hours=2), timedelta(days=500)

    def jump(who: Sequence[str], ahead: timedelta, *moment: str, lasts_s: float = 1e9, **more: object) -> Case:
        how = f"{abs(ahead) // timedelta(days=1)} days" if abs(ahead) >= timedelta(days=1) else "2 hours"
        return replace(quiet, name=f"the clock of {'all' if len(who) > 1 else who[0]} jumps {how} "
                       f"{'ahead' if ahead > timedelta(0) else 'back'}{f' for {lasts_s:g} s' if lasts_s < 1e9 else ''} "
                       f"{moment[1]}", steps=(at(*moment, Clock(tuple(who), ahead), lasts_s=lasts_s),), **more)

    for ahead in (hours, -hours):
        yield jump([SERVER], ahead, SERVER, "once it has noted whom it asks")
        yield jump(["north"], ahead, "north", "during the training")
    yield jump(EVERYONE, hours, SERVER, "before the aggregation")
    yield jump([SERVER], days, SERVER, "once it has noted whom it asks", lasts_s=4)
    yield jump([SERVER], -days, SERVER, "once it has noted whom it asks", lasts_s=4)
    yield jump(["south"], days, "south", "during the training", lasts_s=4)
    yield jump(["south"], -days, "south", "during the training", lasts_s=4)
    yield jump(["east"], days, "east", "before it joins", lasts_s=4, by_hand=frozenset({"east"}))
    # not "while sending", which holds only the connection's thread: the clock takes a second, and round 3 would begin
    yield replace(quiet, name="north is killed, and started again with its clock 2 hours back", steps=(
        at("north", "before sending", Clock(("north",), -hours), Signal(("north",), SIGKILL), lasts_s=1e9),))


def _renewals() -> Iterator[Case]:
    quiet = replace(QUIET["plain"], kind="renewal")

    def renewal(name: str, *steps: Step, **more: object) -> Case:
        return replace(quiet, name=name, steps=steps, **more)

    def killed(*who: str) -> Signal:
        return Signal(who, SIGKILL)

    for who in ("north", SERVER):
        yield renewal(f"the certificate of {who} is renewed while north trains",
                      at("north", "during the training", Renewal(who), times=3))
        yield renewal(f"the renewal of {who} is killed, and given again",
                      at("south", "while sending", Renewal(who, killed=True)))
    yield renewal("north is killed after its renewal", at(
        "north", "while sending", Renewal("north"), killed("north")))
    yield renewal("the server is killed after its renewal", at(
        SERVER, "while an upload comes", Renewal(SERVER), killed(SERVER)))
    yield renewal("the server is killed as it reads its renewed certificate", at(
        "north", "while sending", Renewal(SERVER), killed("north")), at(
        SERVER, "before it reads its certificate again", killed(SERVER), times=4))
    yield renewal("the certificate of north ends while it trains, and is renewed 3 s later",
                  at("north", "before it joins", ShortLived("north")),
                  at("north", "during the training", Lapsed("north"), lasts_s=3))
    yield renewal("the certificate of the server has ended when south comes back, and is renewed 3 s later",
                  at(SERVER, "before it listens", ShortLived(SERVER)),
                  at("south", "before sending", Lapsed(SERVER), killed("south"), lasts_s=3),
                  by_hand=frozenset({"south"}))
    yield renewal("the server's certificate is damaged for 3 s while north connects again", at(
        "north", "while sending", Damage(SERVER), killed("north"), lasts_s=3))
    yield renewal("the server is killed while its certificate is damaged", at(
        SERVER, "while an upload comes", Damage(SERVER), killed(SERVER), lasts_s=3), by_hand=frozenset({SERVER}))
    yield renewal("the list of clients is damaged for 3 s while east connects again", at(
        "east", "while sending", Damage(SERVER, "clients.toml"), killed("east"), lasts_s=3))
    yield renewal("east's certificate is damaged for 3 s as it is started again", at(
        "east", "while sending", Damage("east"), killed("east"), lasts_s=3), by_hand=frozenset({"east"}))


