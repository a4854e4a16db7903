"""What a run can be doing, and how that is called."""

from __future__ import annotations

STARTING, WAITING, TRAINING, SUMMING, AGGREGATING, HELD_UP, ENDING = PHASES = (
    "starting", "waiting", "training", "summing", "aggregating", "held-up", "ending")
"""All that a run can be doing."""
DOING = {STARTING: "starting", WAITING: "waiting for clients", TRAINING: "clients train",
         SUMMING: "agreeing on a secure sum",
         AGGREGATING: "combining and evaluating uploads", HELD_UP: "held up", ENDING: "ending"}
"""Phase → what is shown for it."""
