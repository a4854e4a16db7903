"""fedlora-client check: all that a client does before it calls a server, and what it then would use, without a server.

The checks are the functions that a client calls, in the same order. Where a client ends with the first fault, the check
goes on with everything that does not depend on it. The ledger is a copy in memory, so that nothing is written.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from typing_extensions import override

from fedlora import data
from fedlora.config.client import CheckConfig
from fedlora.data import Overview, Rows
from fedlora.kit import Kit, read_kit
from fedlora.plan import ROW, Proposal, unit_column
from fedlora.privacy import Forbidden, Policy, RunTerms, four_digits, nominal_size, run_streams, short
from fedlora.tasks import task_named
from fedlora.training import check_computing

from . import check_report, paths, row_figures
from .admission import Cost, panel, what_is_trained
from .check_report import section
from .check_training import TrainingCheck
from .data_holder import check_named, check_noise, check_size, identified, read_data
from .kit_options import labels_to_take, with_kit
from .labels import check_with_kit
from .privacy_gate import PrivacyGate, limits_of, unit_count
from .steps import Steps
from .usual_plan import check_against, usual_plan

PERSONS = re.compile(r"patient|(person|subject|case)_?(id|no|number)$|^pid$|^mrn$|insured", re.IGNORECASE)
"""Names of columns that may say whose rows belong together."""


def check(options: CheckConfig, given: Collection[str], console: Console) -> int:
    """Check everything that a client needs, and show what it would use.

    Args:
        options: the options of `fedlora-client check`.
        given: names of the options that are given.
        console: where the report is printed. Records and labels that are not declared are shown on a terminal alone.

    Returns:
        The number of things that must be mended.
    """
    checked = _Check(options, given, console)
    with _remarks(console):
        checked.before_the_data()
        checked.data()
        checked.privacy()
        checked.training()
        checked.close()
    for what in checked.left_out:
        console.print(f"Left out: {what}.", style="yellow", soft_wrap=True)
    if faults := checked.steps.faults:
        console.print(f"\n{faults} {'thing' if faults == 1 else 'things'} must be mended (✗ above).", style="bold red")
    else:
        console.print("\nReady. Nothing was written, and nobody was called.", style="bold green")
    return faults


@contextmanager
def _remarks(console: Console) -> Iterator[None]:
    """Have warnings and errors that are logged printed as a part of the report."""
    class Remarks(logging.Handler):
        @override
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"! {record.getMessage()}", style="yellow", soft_wrap=True)

    root = logging.getLogger()
    before, root.handlers = root.handlers, [Remarks(logging.WARNING)]
    try:
        yield
    finally:
        root.handlers = before


class _Check:
    """The checks, in their order. Each group leaves what it found for the groups after it.

    Args:
        options: the options of `fedlora-client check`.
        given: names of the options that are given.
        console: where the report is printed.

    Attributes:
        options: the options, with the kit's values once it is read.
        steps: the steps that were made, which count the faults.
        left_out: what could not be checked, and why.
    """

    def __init__(self, options: CheckConfig, given: Collection[str], console: Console) -> None:
        self.options, self._given, self._console = options, frozenset(given), console
        self.steps, self.left_out = Steps(console), list[str]()
        self._kit: Kit | None = None
        self._gate: PrivacyGate | None = None
        self._rows: Rows | None = None
        self._overview = Overview()
        self._terms: RunTerms | None = None

    def close(self) -> None:
        """Give up the copy of the ledger."""
        if self._gate is not None:
            self._gate.ledger.close()

    def before_the_data(self) -> None:
        """Check the kit, the options, the policy with the ledger, and this client's identity."""
        if self.options.kit is not None and not self.steps.make("kit", self._read_kit) and self._kit is None:
            self.left_out.append("what the kit's run needs and costs, until the kit can be used")
        self.steps.make("options", self._check_options)
        if self.options.data is not None:
            self.steps.make("policy", self._open_gate)
        self.steps.make("identity", self._identify)

    def _read_kit(self) -> str:
        assert self.options.kit is not None, "the caller has asked"
        kit = read_kit(self.options.kit)
        self.options = with_kit(self.options, self._given, kit)
        self._kit = kit
        check_against(kit.plan, self.options, self._given)
        return f"{self.options.kit}, for the server at {kit.address}; fingerprint {kit.fingerprint}"

    def _check_options(self) -> str:
        options = self.options
        check_computing(options.device, options.precision, options.compile)
        check_noise(options, run_streams(options.name or ""), self._console)
        return ""

    def _open_gate(self) -> str:
        options = self.options
        policy = Policy.read(paths.named_policy(options.policy, options.simulated_ledger))
        assert options.data is not None, "the caller has asked"
        known = policy.dataset_at(options.data)
        if self._kit is not None and (labels := labels_to_take(options, known, self._kit)):
            self.options = options = dataclasses.replace(options, labels=labels)
        self._gate = gate = PrivacyGate(options, trial=True)
        check_size(limits_of(options, gate))
        if known is not None:
            return f"{policy.path}, [dataset.{known.id}]"
        return (f"{policy.path} has no table for these data; their first private run writes one"
                if policy.path.exists() else f"there is no {policy.path} yet; the first private run writes it")

    def _identify(self) -> str:
        policy = self._gate.policy if self._gate is not None else Policy(paths.policy())
        tls, name = identified(self.options, policy, self._console)
        return f"{name}, by the certificate in {tls.folder}" if tls is not None else ""

    def data(self) -> None:
        """Read the data, show what they hold, and hold them against the declarations and the ledger."""
        read = self.steps.make("data", self._read)
        if self._overview.files:
            section(self._console, "Files", check_report.files(self._overview))
        if not read or self._rows is None:
            self.left_out.append("labels, duplicates and all that follows from the rows, until the data can be read")
            return
        self._show_rows(self._rows)
        if self._gate is not None:
            self.steps.make("ledger", self._recognise)
        if self._kit is not None:
            self.steps.make("labels", self._hold_labels)

    def _read(self) -> str:
        check_named(self.options)
        self._rows = read_data(self.options, self._console, unit_column=unit_column(self._unit), labels=self._declared,
                               overview=self._overview)
        return ""

    @property
    def _unit(self) -> str:
        return self._gate.unit if self._gate is not None else self.options.privacy_unit or ROW

    @property
    def _declared(self) -> tuple[str, ...] | None:
        return self._gate.labels if self._gate is not None else self.options.labels

    def _show_rows(self, rows: Rows) -> None:
        console, options = self._console, self.options
        if rows.labels is not None:
            found = row_figures.labels(rows, self._overview, self._declared)
            section(console, "Labels", check_report.labels(found, len(rows), rows.labels.count(None),
                                                           private_place=console.is_terminal))
            if self._declared is None and self._kit is None:
                console.print("! The labels are not declared. Declare them with --labels or in policy.toml: a server "
                              "is told declared names alone, and every row is held against them.", style="yellow",
                              soft_wrap=True)
        if (units := row_figures.units(rows, options.rows_per_unit)) is not None:
            section(console, f"Units of privacy, by {data.shown(unit_column(self._unit))}",
                    check_report.units(units, options.rows_per_unit))
        elif columns := sorted({name for one in self._overview.files for name in one.columns
                                if PERSONS.search(name.strip())}):
            console.print(f"! Each row is protected by itself, and there is a column {data.shown(columns[0])}. If "
                          "several rows are one person's, protect the person: --privacy-unit "
                          f"column:{data.shown(columns[0])}", style="yellow", soft_wrap=True)
        section(console, "Duplicates: rows with a text that was there before, apart from capitals and blanks",
                check_report.duplicates(row_figures.duplicates(rows)))

    def _recognise(self) -> str:
        assert self._gate is not None and self._rows is not None, "the caller has asked"
        for line in self._gate.recognise(self._rows):
            self._console.print(line, soft_wrap=True)
        return ""

    def _hold_labels(self) -> str:
        assert self._kit is not None and self._rows is not None, "the caller has asked"
        if task_named(self._kit.plan.task).has_labels:
            check_with_kit(self._declared, self._kit.plan, self._rows if self._console.is_terminal else None)
        return ""

    def privacy(self) -> None:
        """Show the size that would be declared, and what the kit's run or a usual one costs."""
        rows, gate = self._rows, self._gate
        if rows is None or gate is None:
            if rows is not None:
                self.left_out.append("noise and ε, until the policy can be used")
            return
        count = unit_count(rows)
        size = gate.declared_size or nominal_size(count)
        title = "Privacy, in the run of the kit" if self._kit else "Privacy, in a usual run; the coordinator's kit " \
                                                                  "may say otherwise"
        counted = "records" if gate.unit == ROW else "units"
        section(self._console, title, [
            (counted, f"{count:,}", ""), ("declared size", f"{size:,}", "public, as declared" if gate.declared_size else
                                          "public: the number that would be proposed, rounded down")])
        self.steps.make("privacy", lambda: self._settle(gate, count, size))

    def _settle(self, gate: PrivacyGate, count: int, size: int) -> str:
        """Show the noise and the cost of the kit's run, or of a usual one.

        Args:
            gate: the policy and the ledger.
            count: number of units in the data.
            size: the declared size.

        Raises:
            Refused: the run is not private, or the policy does not allow the kit's plan; the log says why.
            ValueError: the policy or the lifetime budget does not allow the run, or δ does not fit the size.
        """
        plan = self._kit.plan if self._kit is not None else usual_plan(self.options)
        limits = dataclasses.replace(limits_of(self.options, gate), declared_size=size)
        limits.check(plan)
        if self._kit is not None:
            gate.check_proposal(Proposal(plan))
        if not plan.private:
            self._console.print(f"Without privacy, the run trains {what_is_trained(plan)}.", markup=False,
                                soft_wrap=True)
            return ""
        budget = limits.budget(count)
        try:
            self._terms, book = gate.terms_for(limits, budget, plan)
        except Forbidden as error:
            if self._kit is not None or self._given & {"rounds", "local_steps", "batch_size"}:
                raise
            self._console.print(f"! {error}", style="yellow", soft_wrap=True)  # a coordinator may choose otherwise
            return ""
        cost = Cost.of(book, gate.dataset, self._terms, pinned=gate.policy.members is not None)
        assert cost is not None, "what was settled fits"
        units = "records" if gate.unit == ROW else f"values of {gate.unit_column}"
        assert self._terms.noise_multiplier is not None, "private terms have noise"
        section(self._console, f"{plan.max_participations} rounds of {plan.local_steps} steps", [
            ("ε of the run", four_digits(cost.guarantee), f"at δ {short(budget.delta, up=True)}, of the "
                                                           f"{budget.epsilon:g} that --epsilon allows"),
            ("sampling rate", short(self._terms.sampling_rate), f"{plan.expected_batch:,} of {size:,} in a step"),
            ("noise multiplier σ", short(self._terms.noise_multiplier), "× the clip norm")])
        if self._kit is not None:
            self._console.print(panel(cost, gate.dataset, f"{size:,} {units}", plan))
        return ""

    def training(self) -> None:
        """Try the base model on the rows and this machine."""
        if self._kit is None and self.options.model is None:
            self.left_out.append("tokens, records as the model sees them, time and memory: name the base model with "
                                 "--model, or the coordinator's kit with --kit")
            return
        labels = self._declared or (data.label_names(self._rows) if self._rows is not None else ())
        training = TrainingCheck(self.options, self._kit, self._rows, labels, self._terms, self._console)
        if not self.steps.make("model", training.find):
            return
        if self._rows is None:
            self.left_out.append("tokens, time and memory, until the data can be read")
        elif self.steps.make("model", training.load) and self.steps.make("tokens", training.encode):
            if self.options.measure:
                self.steps.make("machine", training.measure)
            else:
                self.left_out.append("time and memory, by --no-measure")
