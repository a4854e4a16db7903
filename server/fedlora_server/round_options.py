"""The options of the round loop, from those of fedlora-server."""

from __future__ import annotations

from fedlora.config import ServerConfig

from .round_state import RoundOptions
from .run_setup import fewest_uploads


def round_options(options: ServerConfig) -> RoundOptions:
    """Return how a server runs its rounds.

    Raises:
        ValueError: an option is out of its range or contradicts another.
    """
    return RoundOptions(seed=options.seed, clients_per_round=options.clients_per_round, min_clients=options.min_clients,
                        min_replies=options.min_replies, round_timeout_s=options.round_timeout,
                        wait_timeout_s=options.wait_timeout, evaluate_every=options.eval_every,
                        fewest_uploads=fewest_uploads(options, options.strategy, options.min_clients, "--min-clients"),
                        client_ranks=dict(options.client_ranks))
