"""Fed-SB with momentum at the server: move R along the direction of the last rounds.

    server        m ← β m + (Σ p_k R_k − R),   R ← R + m

Everything else is Fed-SB's.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora_strategies.recipes import fed_sb
from fedlora_strategies.server_optimizers.momentum import Momentum

RECIPE = replace(fed_sb.RECIPE, optimizer=Momentum(beta1=0.5))
