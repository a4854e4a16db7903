"""What was ever spent of each data set on this machine: a hash-chained file of events, and the lifetime filter."""

from fedlora.privacy.ledger.ledger import Ledger, Reservation
from fedlora.privacy.ledger.lifetime import BudgetExhausted, Charge, Declaration, LedgerError, Lifetime, RunTerms

__all__ = ["BudgetExhausted", "Charge", "Declaration", "Ledger", "LedgerError", "Lifetime", "Reservation", "RunTerms"]
