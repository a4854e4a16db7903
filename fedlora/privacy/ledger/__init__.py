"""The ledger of privacy spending: a hash-chained file of events per machine, and each data set's lifetime budget."""

from fedlora.privacy.ledger.ledger import Ledger
from fedlora.privacy.ledger.lifetime_budget import BudgetExhausted, Charge, Declaration, LedgerError, Lifetime
from fedlora.privacy.ledger.reservation import Reservation
from fedlora.privacy.ledger.rosters import RosterFacts
from fedlora.privacy.ledger.terms import RunTerms

__all__ = ["BudgetExhausted", "Charge", "Declaration", "Ledger", "LedgerError", "Lifetime", "Reservation",
           "RosterFacts", "RunTerms"]
