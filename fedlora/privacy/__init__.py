"""What privacy costs and where randomness comes from."""

from fedlora.privacy.accounting import Accountant, Budget, Spend, calibrate, nominal_size
from fedlora.privacy.streams import INSECURE_SEED_VARIABLE, RunStreams, Stream, run_streams

__all__ = ["INSECURE_SEED_VARIABLE", "Accountant", "Budget", "RunStreams", "Spend", "Stream", "calibrate",
           "nominal_size", "run_streams"]
