"""What privacy costs, who allows it, where it is written down, and where randomness comes from."""

from fedlora.privacy.accounting import (
    MOST_SAMPLING_RATE,
    SIGMA_STEP,
    Accountant,
    Budget,
    Spend,
    calibrate,
    four_digits,
    nominal_size,
)
from fedlora.privacy.ledger import BudgetExhausted, Charge, Ledger, LedgerError, Lifetime, RunTerms
from fedlora.privacy.policy import DatasetPolicy, Forbidden, Policy
from fedlora.privacy.rng import INSECURE_SEED_VARIABLE, RandomStream, RunStreams, run_streams

__all__ = [
    "INSECURE_SEED_VARIABLE",
    "MOST_SAMPLING_RATE",
    "SIGMA_STEP",
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
    "RunStreams",
    "RunTerms",
    "Spend",
    "calibrate",
    "four_digits",
    "nominal_size",
    "run_streams",
]
