"""Differential privacy: accounting, the owner's policy, the ledger of what was spent, and the random streams."""

from fedlora.privacy.about import About
from fedlora.privacy.accounting import (
    MOST_SAMPLING_RATE,
    SIGMA_STEP,
    Accountant,
    Budget,
    calibrate,
    four_digits,
    nominal_size,
    short,
)
from fedlora.privacy.ledger import BudgetExhausted, Charge, Ledger, LedgerError, Lifetime, RosterFacts, RunTerms
from fedlora.privacy.policy import DatasetPolicy, Forbidden, Policy
from fedlora.privacy.rng import INSECURE_SEED_VARIABLE, RandomStream, RunStreams, run_streams
from fedlora.privacy.spend import Spend

__all__ = [
    "INSECURE_SEED_VARIABLE",
    "MOST_SAMPLING_RATE",
    "SIGMA_STEP",
    "About",
    "Accountant",
    "Budget",
    "BudgetExhausted",
    "Charge",
    "DatasetPolicy",
    "Forbidden",
    "Ledger",
    "LedgerError",
    "Lifetime",
    "Policy",
    "RandomStream",
    "RosterFacts",
    "RunStreams",
    "RunTerms",
    "Spend",
    "calibrate",
    "four_digits",
    "nominal_size",
    "run_streams",
    "short",
]
