"""Checks of a run with secure aggregation before it begins: a start that would fail later is refused by name."""

from __future__ import annotations

from fedlora.config import ServerConfig
from fedlora.secure_sum.integers import Grid
from fedlora_strategies import FederatedLoRA

USUAL_NOISE = 1.0
"""Noise of a client, in units of the clip norm, for which an overflow is foreseen before any client has named its own.
"""


def check_options(options: ServerConfig, *, over_grpc: bool) -> None:
    """Check what secure aggregation asks of the options.

    Args:
        options: the command's options.
        over_grpc: whether clients connect to this server itself, and not to a SuperLink.

    Raises:
        ValueError: an option contradicts --secure-aggregation, or lacks.
    """
    if not options.secure_aggregation:
        return
    if not over_grpc:
        raise ValueError("--secure-aggregation works with fedlora-server alone: over a SuperLink, clients have no "
                         "certificates by which they know each other. Leave it out, or start fedlora-server")
    if options.tls is None:
        raise ValueError("--secure-aggregation needs --tls DIR: clients know each other by their certificates "
                         "(fedlora-server pki init makes the folder)")


def check_sum(strategy: FederatedLoRA) -> None:
    """Check that the sums of a run can be taken.

    Args:
        strategy: the run's strategy.

    Raises:
        ValueError: a sum could overflow.
    """
    if strategy.plan.secure_aggregation:
        foreseen_grid(strategy)


def foreseen_grid(strategy: FederatedLoRA) -> Grid:
    """Return the integers of a run with secure aggregation, for its fewest members with the usual noise.

    Args:
        strategy: the run's strategy.

    Raises:
        ValueError: a sum could overflow.
    """
    plan = strategy.plan
    return Grid.fitting(strategy.summed, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch,
                        members=plan.least_members, noise=max(plan.least_noise, USUAL_NOISE))
