"""The ledger: a durable record, on the owner's own disk, of all privacy spent on each data set. It fails closed.

One training goes through five steps in this order. What a step writes is on the disk before the next step begins:

1. The charge is written to the ledger.
2. The first record is read.
3. The finished, noised update is stored, and the ledger records its SHA-256.
4. The witness beside the data is written, then the ledger records the release.
5. The update leaves.

So the epsilon on record is never below the epsilon spent, at whatever moment the process dies. A charge whose training
died is spent: it is never given back. Unit and relation of the guarantee, and the rule by which a run fits a budget,
are in `lifetime_budget`.

An event is one row: its sequence number, its canonical JSON, and the SHA-256 over the previous row's hash and this
text. Rows are only ever added; charges, runs and budgets are all derived from them. Two files lie beside the ledger:
`<ledger>-key`, which keys the fingerprints, and `<ledger>-runs/`, which has one lock file per unfinished run. The lock
tells a run of a live process from one whose process died.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.plan import ROW, check_unit, unit_column
from fedlora.privacy.ledger.anchor import seal, unseal
from fedlora.privacy.ledger.hash_chain import HashChain, beside, take_lock
from fedlora.privacy.ledger.lifetime_budget import (
    FILTER_ORDERS,
    Book,
    BudgetExhausted,
    Charge,
    LedgerError,
    Lifetime,
)
from fedlora.privacy.ledger.overlap_index import OverlapIndex
from fedlora.privacy.ledger.reservation import Reservation
from fedlora.privacy.ledger.rosters import RosterFacts
from fedlora.privacy.ledger.terms import RunTerms
from fedlora.privacy.ledger.witnesses import Witnesses
from fedlora.privacy.mechanisms.distributed_gaussian import ROUNDING_SHARE
from fedlora.privacy.spend import Spend


class Ledger:
    """One user's ledger on this machine. Any number of processes may have it open at once.

    Args:
        path: the SQLite file. It is created, with its folder, if it does not exist. None keeps the ledger in memory,
            which only a simulated one may be.
        simulated: whether the ledger is for a demo or a simulation. A simulated ledger never takes real charges, and a
            real one never takes simulated charges.
        new: the owner's --new-ledger: go on although a ledger or a witness is lost. A damaged ledger is moved aside,
            and the one begun in its place says for ever that it replaced another. An undamaged ledger is kept; if a
            witness contradicts it, it gets a permanent mark.
        trial: work on a copy in memory, to learn what would be said and refused. Nothing is written to the disk, and
            no run can begin.
        clock: returns seconds since 1970. Times are recorded and never trusted.

    Attributes:
        path: the file; None in memory.
        ledger_id: 32 random hexadecimal digits, fixed when the ledger was begun.
        created_anew: whether this ledger was begun in place of a lost one.
        simulated: as in the arguments.

    Raises:
        LedgerError: the file is damaged, of the other kind, on a network file system or not writable. The message names
            the path and the remedy.
    """

    def __init__(self, path: Path | None, *, simulated: bool = False, new: bool = False,
                 trial: bool = False, clock: Callable[[], float] = time.time) -> None:
        if path is None and not simulated:
            raise LedgerError("a ledger in memory forgets what was spent; give it a path, or mark it simulated")
        self.path = None if path is None else Path(path).absolute()
        anew = new and not (self.path is not None and self.path.exists()
                            and _is_whole(self.path, simulated, trial))
        self._chain = HashChain(self.path, simulated=simulated, new=anew, clock=clock, trial=trial)
        self._held: dict[tuple[str, str], int | None] = {}
        self._witnesses = Witnesses(self._chain, self.path, give_up=new)
        self._register = OverlapIndex(self._chain, self.path)
        with self._chain.transaction("DEFERRED") as book:
            self.ledger_id: str = book.ledger["ledger_id"]
            self.created_anew: bool = book.ledger["anew"]
            self.simulated: bool = book.ledger["simulated"]

    def close(self) -> None:
        """Close the file and release the locks of the runs held. From then on these runs count as a dead process's."""
        with self._chain.mutex:
            self._chain.db.close()
            for handle in self._held.values():
                if handle is not None:
                    os.close(handle)
            self._held.clear()

    # Datasets

    def declare(self, dataset: str, *, epsilon: float, delta: float, unit: str = ROW, distinct: Collection[str] = (),
                witness: Path | None = None) -> None:
        """Set the lifetime budget of a data set, and check its witness. Earlier budgets stay on record for ever.

        Args:
            dataset: the owner's id of the data set.
            epsilon: limit over all runs, for one unit under the zero-out relation; infinite for no limit.
            delta: the delta of that limit, in (0, 1).
            unit: "row" or "column:NAME": the unit that the limit protects. Runs that protect another one are refused.
            distinct: ids of data sets that share nobody with this one, whatever their fingerprints say.
            witness: the witness file, to be written before each update leaves; None for none.

        Raises:
            LedgerError: the witness is missing, names another ledger, or has seen more than this ledger holds.
            ValueError: a limit or the unit is out of range.
        """
        if not epsilon > 0:
            raise ValueError(f"epsilon is {epsilon!r}; a lifetime must be positive")
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta!r}; it must be in (0, 1)")
        check_unit(unit)
        if witness is not None:
            self.watch(dataset, witness)
        with self._chain.transaction() as book:
            last = book.declared(dataset)
            wanted = (float(epsilon), float(delta), tuple(sorted(set(distinct))), unit)
            if last is None or (last.epsilon, last.delta, last.distinct, last.unit) != wanted:
                self._chain.append("declare", dataset=dataset, epsilon=None if epsilon == math.inf else wanted[0],
                                   delta=wanted[1], orders=last.orders if last else FILTER_ORDERS, distinct=wanted[2],
                                   unit=unit)

    def watch(self, dataset: str, witness: Path) -> None:
        """Check a data set's witness file, and write it before each update that leaves from now on.

        Raises:
            LedgerError: the witness is missing, names another ledger, or has seen more than this ledger holds; or this
                ledger is simulated.
        """
        if self.simulated:
            raise LedgerError(f"{self._chain.name} is simulated: it neither reads nor writes a witness of real data")
        self._witnesses.watch(dataset, witness)

    def check_folder(self, folder: Path) -> None:
        """Check every witness file in a folder of data, whichever data set it was written for.

        Raises:
            LedgerError: a witness names another ledger or has seen more than this ledger holds, and no mark records
                that the owner accepted this.
        """
        self._witnesses.check_folder(folder)

    def anchor(self) -> bytes:
        """Return this ledger's number of rows and last hash, encrypted for a server to keep; b"" if simulated.

        Raises:
            LedgerError: the key is missing or is another one.
        """
        if self.simulated:
            return b""
        key = self.fingerprint_key()
        with self._chain.transaction("DEFERRED") as book:
            return seal(key, book.rows, book.head)

    def check_anchor(self, sealed: bytes) -> bool:
        """Check this ledger against an anchor that a server kept.

        Returns:
            False if the anchor was not made with this ledger's key, so that it tells nothing.

        Raises:
            LedgerError: the anchor has seen more than this ledger holds, and no mark records that the owner accepted
                this; or the key is missing or is another one.
        """
        known = unseal(self.fingerprint_key(), sealed)
        if known is not None:
            self._witnesses.check_anchor(*known)
        return known is not None

    def testify(self, dataset: str) -> None:
        """Write the data set's witness now, so that a folder that is not writable is noticed before anything is spent.

        Raises:
            LedgerError: the witness contradicts the ledger, or cannot be written.
        """
        with self._chain.transaction() as book:
            self._witnesses.testify(book, dataset)

    def marks(self) -> tuple[Mapping[str, Any], ...]:
        """Return the permanent marks: one for each contradiction that the owner accepted with --new-ledger.

        Returns:
            What each contradicting witness had seen, as {dataset, ledger_id, rows, head}. For an anchor, dataset is "".
        """
        with self._chain.transaction("DEFERRED") as book:
            return tuple(book.marks)

    def fingerprint_key(self) -> bytes:
        """Return the 32-byte key of the fingerprints. It is made once (file mode 0600) and never leaves the machine.

        Raises:
            LedgerError: the key is missing or is another one, so that overlaps could no longer be recognised.
        """
        return self._register.key()

    def datasets(self) -> dict[str, str | None]:
        """Return every data set's id, with the place where its data were last found; None if that is not known.

        Ids with a place come first, ordered by when the data were last recorded at that place.
        """
        with self._chain.transaction("DEFERRED") as book:
            ids = [*book.declarations, *book.registered, *(dataset for dataset, _ in book.runs)]
            return {**book.places, **{name: None for name in ids if name not in book.places}}

    def register(self, dataset: str, digests: Iterable[bytes], *, place: str | None = None) -> None:
        """Add the fingerprints of a data set's records. Fingerprints that were added before are kept.

        Args:
            dataset: the owner's id of the data set.
            digests: keyed hashes of the records and units, 16 bytes each (see `fingerprints`).
            place: where the data are, as policy.toml has it; None leaves that unknown.

        Raises:
            LedgerError: the stored fingerprints were changed.
            ValueError: a digest does not have 16 bytes.
        """
        self._register.add(dataset, digests, place)

    def overlapping(self, dataset: str) -> tuple[str, ...]:
        """Return the other data sets that share a record with this one, unless either declares the other distinct."""
        with self._chain.transaction("DEFERRED") as book:
            return book.overlapping(dataset)

    def distinct(self, dataset: str) -> tuple[str, ...]:
        """Return the data sets that this one declares distinct, and those that declare this one distinct."""
        with self._chain.transaction("DEFERRED") as book:
            return book.distinct(dataset)

    def lifetime(self, dataset: str) -> Lifetime:
        """Return a data set's limit, spent and remaining epsilon, counting the data sets that overlap it too."""
        with self._chain.transaction("DEFERRED") as book:
            return book.lifetime(dataset)

    def book(self) -> Book:
        """Return a copy of the ledger's derived state, to read and to try other limits on."""
        with self._chain.transaction("DEFERRED") as book:
            return copy.deepcopy(book)

    def current(self, dataset: str, run_id: str) -> Book:
        """End the runs whose process is gone, except this run, and return a copy of the ledger's derived state."""
        with self._chain.transaction() as book:
            self._end_dead(book, (dataset, run_id))
            return copy.deepcopy(book)

    # Runs

    def fits(self, dataset: str, terms: RunTerms) -> bool:
        """Return whether the run's planned maximum fits every lifetime budget it concerns, beside all other runs."""
        with self._chain.transaction() as book:
            self._end_dead(book, (dataset, terms.run_id))
            return book.admit(dataset, terms) is not None

    def begin_run(self, dataset: str, terms: RunTerms) -> None:
        """Reserve the most that a run can spend, until `end_run` or the end of this process.

        Beginning a run again in the process that holds it has no effect. A run that ended, or whose process died, may
        be begun again with the same terms if it still fits.

        Raises:
            BudgetExhausted: the run does not fit a lifetime budget.
            LedgerError: the run is known with other terms, or another live process holds it.
        """
        if self._chain.trial:
            raise LedgerError(f"{self._chain.name} was opened for a trial, and no run can be charged; open it again")
        key = (dataset, terms.run_id)
        fresh = key not in self._held
        with self._chain.mutex:
            try:
                with self._chain.transaction() as book:
                    known = book.runs.get(key)
                    if known is not None and known.terms != terms:
                        raise LedgerError(f"run {terms.run_id} of dataset {dataset!r} was begun with other terms "
                                          f"({_changes(known.terms, terms)}), and they cannot change within a run: "
                                          "start as before, or take part in a new run")
                    if fresh:
                        self._held[key] = self._hold(key)
                    self._end_dead(book, key)
                    if known is None or not known.active:
                        closes = admitted(book, dataset, terms)
                        self._chain.append("run", dataset=dataset, terms=terms.stored(), closes=sorted(closes))
            except BaseException:
                handle = self._held.pop(key, None) if fresh else None
                if handle is not None:
                    os.close(handle)
                raise

    def _hold(self, key: tuple[str, str]) -> int | None:
        if self.path is None:
            return None
        handle = take_lock(self._lock_file(key))
        if handle is None:
            raise LedgerError(f"run {key[1]} of dataset {key[0]!r} is held by another process with "
                              f"{self._chain.name}; stop that one, or give each client its own dataset id")
        return handle

    def _lock_file(self, key: tuple[str, str]) -> Path:
        assert self.path is not None
        return beside(self.path, "-runs") / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def _end_dead(self, book: Book, but: tuple[str, str]) -> None:
        """End the runs whose process is gone, and free the trainings that they reserved but did not begin.

        Only a live process holds a run's lock file, so a lock that can be taken belongs to a dead one.
        """
        for key, run in book.runs.items():
            if run.active and key != but and key not in self._held and self.path is not None:
                handle = take_lock(self._lock_file(key))
                if handle is not None:
                    self._chain.append("end", dataset=key[0], run_id=key[1])
                    self._let_go(key, handle)

    def _let_go(self, key: tuple[str, str], handle: int | None) -> None:
        """Delete a run's lock file and release its lock. Call this within a transaction only.

        Lock files are opened within transactions only, so no other process can have this one open while it is deleted.
        """
        if handle is not None:
            if not self._chain.trial:
                self._lock_file(key).unlink()
            os.close(handle)

    def end_run(self, dataset: str, run_id: str) -> None:
        """End a run that this process holds, and free the trainings that it has not begun.

        The run may be begun again if it still fits.

        Raises:
            LedgerError: this process does not hold the run.
        """
        key = (dataset, run_id)
        with self._chain.transaction() as book:
            if key not in self._held:
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is not held by this process; begin it first")
            if book.runs[key].active:
                self._chain.append("end", dataset=dataset, run_id=run_id)
            self._let_go(key, self._held.pop(key))

    def terms(self, dataset: str, run_id: str) -> RunTerms | None:
        """Return the terms with which a run was begun; None if the run is unknown."""
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            return run.terms if run else None

    def charges(self, dataset: str | None = None, run_id: str | None = None) -> tuple[Charge, ...]:
        """Return all charges in order, voided ones included; only those of one data set or run if given."""
        with self._chain.transaction("DEFERRED") as book:
            if dataset is not None and run_id is not None:
                return tuple(book.charges_of(dataset, run_id))
            return tuple(charge for charge in book.charges.values()
                         if dataset in (None, charge.dataset) and run_id in (None, charge.run_id))

    def history(self, dataset: str, run_id: str) -> tuple[Spend, ...]:
        """Return the steps that a run has begun so far, for `Accountant(history).epsilon(delta)`.

        Raises:
            ValueError: the run trained without noise, so that its epsilon is infinite.
        """
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            spends = run.terms.spends(run.begun) if run else ()
        if spends is None:
            raise ValueError(f"run {run_id} of dataset {dataset!r} trained without noise: its epsilon is infinite")
        return spends

    def epsilon(self, dataset: str, run_id: str, delta: float | None = None) -> float:
        """Return an upper bound on the epsilon of all that a run has begun; infinite if it trained without noise.

        The bound is for one unit of this run's data, under the zero-out relation.

        Args:
            dataset: the owner's id of the data set.
            run_id: the run; an unknown one has spent 0.
            delta: default the run's own.
        """
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            terms, begun = (run.terms, run.begun) if run else (None, 0)
        return terms.epsilon(begun, delta) if terms else 0.0

    def note_roster(self, dataset: str, run_id: str, roster: RosterFacts) -> None:
        """Record the roster of secure sums under which this client is about to train. Noting it again has no effect.

        Call this before the first charge under the roster.

        Raises:
            LedgerError: this process does not hold the run, its sums are charged and the roster does not keep what is
                charged, or another roster was noted by this digest.
        """
        key = (dataset, run_id)
        with self._chain.transaction() as book:
            run = book.runs.get(key)
            if run is None or not run.active or key not in self._held:
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is not held by this process; begin it first")
            known = run.rosters.get(roster.digest, roster)
            if known != roster:
                raise LedgerError(f"the roster {roster.digest} of run {run_id} was noted before with other facts; take "
                                  "part in a new run")
            if lacking := run.terms.lacks(roster):
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is charged for the noise of its sums, and "
                                  f"{lacking}; nothing may be trained under this roster")
            if roster.digest not in run.rosters:
                self._chain.append("roster", dataset=dataset, run_id=run_id, **asdict(roster))
                _check_rounding(book, dataset)

    def rosters(self, dataset: str, run_id: str) -> tuple[RosterFacts, ...]:
        """Return the rosters of secure sums under which a run's trainings were begun, in their order."""
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            return tuple(run.rosters.values()) if run else ()

    # Trainings

    def reserve(self, dataset: str, run_id: str, round: int, attempt: int) -> Reservation:
        """Charge one training before it reads a record. The charge is on the disk when this returns.

        Args:
            dataset: the owner's id of the data set.
            run_id: a run that this process holds (`begin_run`).
            round: round of the run; 0 is a private start.
            attempt: attempt at this round.

        Raises:
            BudgetExhausted: the run has begun its most participations, or the lifetime budget no longer allows it.
            LedgerError: this process does not hold the run, this training was charged before, the noise of sums is
                charged and no roster was noted for it, or the disk failed. Then nothing may be trained.
        """
        key = (dataset, run_id)
        with self._chain.transaction() as book:
            run = book.runs.get(key)
            if run is None or not run.active or key not in self._held:
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is not held by this process; begin it first")
            if run.terms.aggregate_noise_multiplier is not None and not (run.rosters or self.simulated):
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is charged for the noise of its sums, and no "
                                  "roster of members was noted; nothing may be trained before that")
            if book.charge(dataset, run_id, round, attempt) is not None:
                raise LedgerError(f"round {round}, attempt {attempt} of run {run_id} was charged before; it is not "
                                  "trained twice. Send its stored update, or train another attempt")
            if run.begun >= run.terms.max_participations:
                raise BudgetExhausted(f"run {run_id} of dataset {dataset!r} has begun {run.begun} trainings, the most "
                                      "that its noise was calibrated to; take part in a new run")
            closes = admitted(book, dataset, run.terms)
            _check_rounding(book, dataset)
            if not closes <= run.closes:  # since the run began, a limit was lowered or more data sets overlap
                self._chain.append("run", dataset=dataset, terms=run.terms.stored(), closes=sorted(closes))
            sequence = self._chain.append("reserved", dataset=dataset, run_id=run_id, round=round, attempt=attempt)
        return Reservation(self._chain, sequence, partial(self._release, dataset, sequence))

    def is_stored(self, dataset: str, run_id: str, round: int, attempt: int) -> bool:
        """Return whether this training's finished update was stored, so that it may be sent, or sent again."""
        with self._chain.transaction("DEFERRED") as book:
            charge = book.charge(dataset, run_id, round, attempt)
        return charge is not None and charge.sha256 is not None

    def released_again(self, dataset: str, run_id: str, round: int, attempt: int, sha256: str | None = None) -> None:
        """Record that a stored update is about to leave, even if an earlier process trained it. This costs nothing.

        Call this right before sending: first the witness is written, then the ledger.

        Args:
            dataset: the owner's id of the data set.
            run_id: the run.
            round: round of the training.
            attempt: attempt at this round.
            sha256: hash of the bytes about to be sent (64 hexadecimal digits); None skips this comparison.

        Raises:
            LedgerError: no update of this training was stored, its SHA-256 differs, or the witness cannot be written.
                Then nothing may leave.
        """
        with self._chain.transaction("DEFERRED") as book:
            charge = book.charge(dataset, run_id, round, attempt)
        if charge is None or charge.sha256 is None or sha256 not in (None, charge.sha256):
            raise LedgerError(f"{self._chain.name} has no record of this stored update of round {round}, attempt "
                              f"{attempt} of run {run_id}; it may not be sent")
        self._release(dataset, charge.sequence)

    def _release(self, dataset: str, sequence: int) -> None:
        with self._chain.transaction() as book:
            if book.charges[sequence].state not in ("stored", "released"):
                raise LedgerError(f"charge {sequence} is {book.charges[sequence].state}; only an update that is stored "
                                  "may leave")
            self._witnesses.testify(book, dataset)
            if book.charges[sequence].state == "stored":
                self._chain.append("released", charge=sequence)


def admitted(book: Book, dataset: str, terms: RunTerms) -> frozenset[str]:
    """Return the data sets whose budgets the run would close (usually none), by `Book.admit`.

    Raises:
        BudgetExhausted: the run does not fit; the message states what is left of each budget, and the remedy.
    """
    closes = book.admit(dataset, terms)
    if closes is not None:
        return closes
    left = []
    for name in (dataset, *book.overlapping(dataset)):
        if other := book.other_unit(name, terms):
            where, unit = other
            apart = f", or declare {where!r} distinct in policy.toml if it describes other people"
            raise BudgetExhausted(f"run {terms.run_id} of dataset {dataset!r} protects {_whom(terms.unit)}, and "
                                  f"the budget of {where!r} protects {_whom(unit)}; one budget cannot pay for both, "
                                  "since the cost of one to the other is not known. Take part with --privacy-unit "
                                  f"{unit}{apart if where != dataset else ''}")
        state = book.lifetime(name)
        if state.epsilon is not None:
            closed = f", closed by run {state.closed_by}" if state.closed_by else ""
            left.append(f"{name!r}: limit {state.epsilon:g} at delta {state.delta:g}, spent {state.spent:.4g} "
                        f"({state.committed:.4g} with all that unfinished runs may still begin), remaining "
                        f"{state.remaining:.4g}{closed}")
    apart = ", or declare the others distinct there if they describe other people" if len(left) > 1 else ""
    raise BudgetExhausted(f"run {terms.run_id} with at most {terms.max_participations} x {terms.local_steps} steps "
                          f"does not fit the lifetime of dataset {'; '.join(left)}. Ask for less epsilon, or raise "
                          f"epsilon in policy.toml, which the ledger records{apart}")


def _check_rounding(book: Book, dataset: str) -> None:
    """Check that rounding in all secure sums that are charged leaves what is set aside for it of each lifetime's delta.

    Raises:
        LedgerError: it adds more.
    """
    for name in (dataset, *book.overlapping(dataset)):
        limit, added = book.declared(name), book.rounding(name)
        if limit is not None and limit.epsilon < math.inf and added > ROUNDING_SHARE * limit.delta:
            raise LedgerError(f"rounding to the grid of secure sums would add {added:.2g} to the delta of {name!r}, "
                              f"{limit.delta:g}, at the epsilon that is spent or reserved; a hundredth of it is set "
                              'aside. Take part with a lower --epsilon, or with trust = "local"')


def _is_whole(path: Path, simulated: bool, trial: bool) -> bool:
    """Return whether the ledger at `path` is undamaged by itself; its witnesses are not looked at."""
    try:
        ledger = Ledger(path, simulated=simulated, trial=trial)
    except LedgerError:
        return False
    try:
        ledger.fingerprint_key()
        with ledger._chain.transaction("DEFERRED") as book:
            ledger._register.check(book)
        return True
    except LedgerError:
        return False
    finally:
        ledger.close()


def _whom(unit: str) -> str:
    column = unit_column(unit)
    return "single rows" if column is None else f"all rows that share a value of {column!r}, together"


def _changes(old: RunTerms, new: RunTerms) -> str:
    before, after = asdict(old), asdict(new)
    return ", ".join(f"{name} {before[name]!r}, now {after[name]!r}" for name in before if before[name] != after[name])
