"""What was ever spent of each data set on this machine: a hash-chained file of events, and the lifetime filter."""

from fedlora.privacy.ledger.ledger import Ledger
from fedlora.privacy.ledger.lifetime_budget import BudgetExhausted, Charge, Declaration, LedgerError, Lifetime, RunTerms
from fedlora.privacy.ledger.reservation import Reservation

__all__ = ["BudgetExhausted", "Charge", "Declaration", "Ledger", "LedgerError", "Lifetime", "Reservation", "RunTerms"]
