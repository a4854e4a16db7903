"""The ledger: what was ever spent of each dataset on this machine, on the owner's own disk. It fails closed.

Order of events, each on the disk before the next: the charge, the first record read, the finished noised update, the
witness, the update leaves. So epsilon recorded is never below epsilon spent, whenever the process dies. What is
promised about whom, and when a run fits, stands in `lifetime`.

An event is one row (sequence, canonical JSON, SHA-256 of the row before and this one); rows are only ever added, and
all else (charges, runs, budgets) is read off them. Other files: `<ledger>-key` (for the fingerprints), and
`<ledger>-runs/`, with one lock per unfinished run that tells a live process from a dead one.
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

from fedlora.plan import ROW, check_unit, unit_column
from fedlora.privacy.accounting import Accountant, Spend
from fedlora.privacy.ledger.anchor import seal, unseal
from fedlora.privacy.ledger.hash_chain import HashChain, beside, take_lock
from fedlora.privacy.ledger.lifetime_budget import (
    FILTER_ORDERS,
    Book,
    BudgetExhausted,
    Charge,
    LedgerError,
    Lifetime,
    RunTerms,
)
from fedlora.privacy.ledger.overlap_index import OverlapIndex
from fedlora.privacy.ledger.reservation import Reservation
from fedlora.privacy.ledger.witnesses import Witnesses


class Ledger:
    """One user's ledger on this machine; any number of processes may hold it open.

    Args:
        path: the database; made, with its folder, where it does not exist. None keeps it in memory (simulated only).
        simulated: for demo and simulation. A simulated ledger is no place for real charges, nor the reverse.
        new: go on where a ledger or a witness is lost. A ledger that is damaged is moved aside, and the one begun in
            its place is marked for ever; one that is whole is kept, and marked where a witness contradicts it.
        clock: seconds since 1970, recorded and never trusted.

    Raises:
        LedgerError: damaged, of the other kind, on a network file system, or not writable; with path and remedy.
    """

    def __init__(self, path: Path | None, *, simulated: bool = False, new: bool = False,
                 clock: Callable[[], float] = time.time) -> None:
        if path is None and not simulated:
            raise LedgerError("a ledger in memory forgets what was spent; give it a path, or mark it simulated")
        self.path = None if path is None else Path(path).absolute()
        anew = new and not (self.path is not None and self.path.exists() and _is_whole(self.path, simulated))
        self._chain = HashChain(self.path, simulated=simulated, new=anew, clock=clock)
        self._held: dict[tuple[str, str], int | None] = {}
        self._witnesses = Witnesses(self._chain, self.path, give_up=new)
        self._register = OverlapIndex(self._chain, self.path)
        with self._chain.transaction("DEFERRED") as book:
            self.ledger_id: str = book.ledger["ledger_id"]
            self.created_anew: bool = book.ledger["anew"]
            self.simulated: bool = book.ledger["simulated"]

    def close(self) -> None:
        """Let go of the file and of the runs held: they count as a dead process's from then on."""
        with self._chain.mutex:
            self._chain.db.close()
            for handle in self._held.values():
                if handle is not None:
                    os.close(handle)
            self._held.clear()

    # Datasets

    def declare(self, dataset: str, *, epsilon: float, delta: float, unit: str = ROW, distinct: Collection[str] = (),
                witness: Path | None = None) -> None:
        """Set the lifetime budget of a dataset, and check its witness. A changed budget stays visible for ever.

        Args:
            dataset: the owner's id of it.
            epsilon: limit over all runs; infinite for none.
            delta: of that limit.
            unit: "row" or "column:NAME", for whom it is; runs that protect another unit are refused.
            distinct: datasets that share nobody with this one, whatever their fingerprints say.
            witness: the witness file, to be written before anything leaves.

        Raises:
            LedgerError: the witness is missing, names another ledger, or has seen more than this ledger holds.
            ValueError: a limit is out of range.
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
        """Check a dataset's witness, a file, and write it before each update leaves from now on.

        Raises:
            LedgerError: it is missing, names another ledger, or has seen more than this ledger holds; or the ledger is
                simulated.
        """
        if self.simulated:
            raise LedgerError(f"{self._chain.name} is simulated: it neither reads nor writes a witness of real data")
        self._witnesses.watch(dataset, witness)

    def check_folder(self, folder: Path) -> None:
        """Check every witness in a folder of data, whichever dataset it was written for.

        Raises:
            LedgerError: one names another ledger, or has seen more than this ledger holds, and no mark says so.
        """
        self._witnesses.check_folder(folder)

    def anchor(self) -> bytes:
        """How far this ledger has come, sealed for a server to keep; b"" where it is simulated.

        Raises:
            LedgerError: as `fingerprint_key`.
        """
        if self.simulated:
            return b""
        key = self.fingerprint_key()
        with self._chain.transaction("DEFERRED") as book:
            return seal(key, book.rows, book.head)

    def check_anchor(self, sealed: bytes) -> bool:
        """Hold this ledger against the last anchor that a server has of it.

        Returns:
            False where the anchor is not of this ledger's key, and tells nothing.

        Raises:
            LedgerError: it has seen more than this ledger holds, and no mark says so; or as `fingerprint_key`.
        """
        known = unseal(self.fingerprint_key(), sealed)
        if known is not None:
            self._witnesses.check_anchor(*known)
        return known is not None

    def testify(self, dataset: str) -> None:
        """Write the dataset's witness now, so that a folder that cannot be written is known before anything is spent.

        Raises:
            LedgerError: it contradicts the ledger, or cannot be written.
        """
        with self._chain.transaction() as book:
            self._witnesses.testify(book, dataset)

    def marks(self) -> tuple[Mapping, ...]:
        """What --new-ledger gave up: {dataset, ledger_id, rows, head} of each ledger that a witness still knew. Of an
        anchor the dataset is "".
        """
        with self._chain.transaction("DEFERRED") as book:
            return tuple(book.marks)

    def fingerprint_key(self) -> bytes:
        """The 32 bytes that key the fingerprints; made once, mode 0600. They never leave the machine.

        Raises:
            LedgerError: the key is missing or another one, so that overlaps could no longer be seen.
        """
        return self._register.key()

    def datasets(self) -> dict[str, str | None]:
        """Every id that the ledger holds anything of, and where its data were last; None where that is not known.

        Ids with a place come in the order in which they were last found there.
        """
        with self._chain.transaction("DEFERRED") as book:
            ids = [*book.declarations, *book.registered, *(dataset for dataset, _ in book.runs)]
            return {**book.places, **{name: None for name in ids if name not in book.places}}

    def register(self, dataset: str, digests: Iterable[bytes], *, place: str | None = None) -> None:
        """Add the keyed hashes (16 bytes each, see `fingerprints`) of a dataset's records; known ones are kept.

        Args:
            place: of the data, as policy.toml has it; None leaves it unknown.
        """
        self._register.add(dataset, digests, place)

    def overlapping(self, dataset: str) -> tuple[str, ...]:
        """The other datasets that share at least one record with it, less those declared distinct by either."""
        with self._chain.transaction("DEFERRED") as book:
            return book.overlapping(dataset)

    def distinct(self, dataset: str) -> tuple[str, ...]:
        """The datasets that this one declares distinct, and those that declare it so."""
        with self._chain.transaction("DEFERRED") as book:
            return book.distinct(dataset)

    def lifetime(self, dataset: str) -> Lifetime:
        """Limit, spent and remaining epsilon of a dataset, with all that overlaps it."""
        with self._chain.transaction("DEFERRED") as book:
            return book.lifetime(dataset)

    def book(self) -> Book:
        """A copy of all that the events say, to look at and to try other limits on."""
        with self._chain.transaction("DEFERRED") as book:
            return copy.deepcopy(book)

    def current(self, dataset: str, run_id: str) -> Book:
        """`book`, after the runs whose process is gone have ended, but for this one."""
        with self._chain.transaction() as book:
            self._end_dead(book, (dataset, run_id))
            return copy.deepcopy(book)

    # Runs

    def fits(self, dataset: str, terms: RunTerms) -> bool:
        """Whether the run's planned maximum is within every lifetime concerned, beside all other runs."""
        with self._chain.transaction() as book:
            self._end_dead(book, (dataset, terms.run_id))
            return book.admit(dataset, terms) is not None

    def begin_run(self, dataset: str, terms: RunTerms) -> None:
        """Hold what the run may spend at most, until `end_run` or the end of this process. Again: no effect.

        Raises:
            BudgetExhausted: it does not fit the lifetime.
            LedgerError: the run is known with other terms, or a live process holds it.
        """
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
                        self._chain.append("run", dataset=dataset, terms=asdict(terms), closes=sorted(closes))
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
        """End the runs whose process is gone: what they have not begun is free again."""
        for key, run in book.runs.items():
            if run.active and key != but and key not in self._held and self.path is not None:
                handle = take_lock(self._lock_file(key))
                if handle is not None:
                    self._chain.append("end", dataset=key[0], run_id=key[1])
                    self._let_go(key, handle)

    def _let_go(self, key: tuple[str, str], handle: int | None) -> None:
        """Within a transaction, for locks are taken within them only, so that nobody else has the file open."""
        if handle is not None:
            self._lock_file(key).unlink()
            os.close(handle)

    def end_run(self, dataset: str, run_id: str) -> None:
        """Free what the run has not begun. It may be begun again, where it still fits."""
        key = (dataset, run_id)
        with self._chain.transaction() as book:
            if key not in self._held:
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is not held by this process; begin it first")
            if book.runs[key].active:
                self._chain.append("end", dataset=dataset, run_id=run_id)
            self._let_go(key, self._held.pop(key))

    def terms(self, dataset: str, run_id: str) -> RunTerms | None:
        """The terms with which the run was begun; None for an unknown run."""
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            return run.terms if run else None

    def charges(self, dataset: str | None = None, run_id: str | None = None) -> tuple[Charge, ...]:
        """All charges, voided ones too, in order; of one dataset or run where given."""
        with self._chain.transaction("DEFERRED") as book:
            if dataset is not None and run_id is not None:
                return tuple(book.charges_of(dataset, run_id))
            return tuple(charge for charge in book.charges.values()
                         if dataset in (None, charge.dataset) and run_id in (None, charge.run_id))

    def history(self, dataset: str, run_id: str) -> tuple[Spend, ...]:
        """What the run has begun so far, for `Accountant(history).epsilon(delta)`.

        Raises:
            ValueError: it trained without noise, so no history bounds it; `epsilon` says infinite.
        """
        with self._chain.transaction("DEFERRED") as book:
            run = book.runs.get((dataset, run_id))
            spends = run.terms.spends(run.begun) if run else ()
        if spends is None:
            raise ValueError(f"run {run_id} of dataset {dataset!r} trained without noise: its epsilon is infinite")
        return spends

    def epsilon(self, dataset: str, run_id: str, delta: float | None = None) -> float:
        """Upper bound on epsilon of what the run has begun, at `delta` or its own; infinite where it had no noise."""
        terms = self.terms(dataset, run_id)
        if terms is None:
            return 0.0
        if terms.noise_multiplier is None:
            return math.inf if any(c.state != "voided" for c in self.charges(dataset, run_id)) else 0.0
        assert terms.delta is not None
        return Accountant(self.history(dataset, run_id)).epsilon(terms.delta if delta is None else delta)

    # Trainings

    def reserve(self, dataset: str, run_id: str, round: int, attempt: int) -> Reservation:
        """Charge one training before it reads a record. The charge is on the disk when this returns.

        Raises:
            BudgetExhausted: the run has begun its most participations, or the lifetime no longer allows it.
            LedgerError: the run is not held by this process, this training was charged before, or the disk failed;
                nothing may be trained then.
        """
        key = (dataset, run_id)
        with self._chain.transaction() as book:
            run = book.runs.get(key)
            if run is None or not run.active or key not in self._held:
                raise LedgerError(f"run {run_id} of dataset {dataset!r} is not held by this process; begin it first")
            if book.charge(dataset, run_id, round, attempt) is not None:
                raise LedgerError(f"round {round}, attempt {attempt} of run {run_id} was charged before; it is not "
                                  "trained twice. Send its stored update, or train another attempt")
            if run.begun >= run.terms.max_participations:
                raise BudgetExhausted(f"run {run_id} of dataset {dataset!r} has begun {run.begun} trainings, the most "
                                      "that its noise was calibrated to; take part in a new run")
            closes = admitted(book, dataset, run.terms)
            if not closes <= run.closes:  # a limit was lowered since, or more data overlap
                self._chain.append("run", dataset=dataset, terms=asdict(run.terms), closes=sorted(closes))
            sequence = self._chain.append("reserved", dataset=dataset, run_id=run_id, round=round, attempt=attempt)
        return Reservation(self._chain, sequence, partial(self._release, dataset, sequence))

    def is_stored(self, dataset: str, run_id: str, round: int, attempt: int) -> bool:
        """Whether the finished update of this training was stored, so that it may be sent again."""
        with self._chain.transaction("DEFERRED") as book:
            charge = book.charge(dataset, run_id, round, attempt)
        return charge is not None and charge.sha256 is not None

    def released_again(self, dataset: str, run_id: str, round: int, attempt: int, sha256: str | None = None) -> None:
        """Right before a stored update leaves, in this process or a later one. It costs nothing more.

        Raises:
            LedgerError: no update of this training was stored, its SHA-256 is another one, or the witness failed;
                nothing may leave then.
        """
        with self._chain.transaction("DEFERRED") as book:
            charge = book.charge(dataset, run_id, round, attempt)
        if charge is None or charge.sha256 is None or sha256 not in (None, charge.sha256):
            raise LedgerError(f"{self._chain.name} knows no such stored update of round {round}, attempt {attempt} of "
                              f"run {run_id}; it may not be sent")
        self._release(dataset, charge.sequence)

    def _release(self, dataset: str, sequence: int) -> None:
        with self._chain.transaction() as book:
            if book.charges[sequence].state not in ("stored", "released"):
                raise LedgerError(f"charge {sequence} is {book.charges[sequence].state}: only an update that is stored "
                                  "may leave")
            self._witnesses.testify(book, dataset)
            if book.charges[sequence].state == "stored":
                self._chain.append("released", charge=sequence)


def admitted(book: Book, dataset: str, terms: RunTerms) -> frozenset[str]:
    """The budgets that the run would close, as `Book.admit`.

    Raises:
        BudgetExhausted: it does not fit; with what is left, and the remedy.
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
                                  f"the budget of {where!r} is or was spent for {_whom(unit)}; what one costs the "
                                  f"other is not known. Take part with --privacy-unit {unit}"
                                  f"{apart if where != dataset else ''}")
        state = book.lifetime(name)
        if state.epsilon is not None:
            closed = f", closed by run {state.closed_by}" if state.closed_by else ""
            left.append(f"{name!r}: limit {state.epsilon:g} at delta {state.delta:g}, spent {state.spent:.4g}, "
                        f"with all that unfinished runs may begin {state.committed:.4g}, remaining "
                        f"{state.remaining:.4g}{closed}")
    apart = ", or declare the others distinct there if they describe other people" if len(left) > 1 else ""
    raise BudgetExhausted(f"run {terms.run_id} with at most {terms.max_participations} x {terms.local_steps} steps "
                          f"does not fit the lifetime of dataset {'; '.join(left)}. Ask for less epsilon, or raise "
                          f"epsilon in policy.toml, which the ledger records{apart}")


def _is_whole(path: Path, simulated: bool) -> bool:
    """Whether the ledger at `path` can be trusted by itself, whatever witnesses say."""
    try:
        ledger = Ledger(path, simulated=simulated)
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
    return "single rows" if column is None else f"all rows with one value of {column!r} together"


def _changes(old: RunTerms, new: RunTerms) -> str:
    before, after = asdict(old), asdict(new)
    return ", ".join(f"{name} {before[name]!r}, now {after[name]!r}" for name in before if before[name] != after[name])
