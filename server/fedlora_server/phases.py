"""What a run can be doing, and how that is called."""

from __future__ import annotations

STARTING, WAITING, TRAINING, AGGREGATING, HELD_UP, ENDING = PHASES = (
    "starting", "waiting", "training", "aggregating", "held-up", "ending")
"""All that a run can be doing."""
DOING = {STARTING: "starting", WAITING: "waiting for clients", TRAINING: "clients train",
         AGGREGATING: "combining and evaluating uploads", HELD_UP: "held up", ENDING: "ending"}
"""Phase → what is shown for it."""
