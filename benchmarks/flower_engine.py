"""Rounds over Flower's own simulation engine (Ray), with the clients of `federations.Echo`, in a process of their own.

A process has one identity among Flower's, and the engines of FedLoRA take it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from fedlora.adapters import AdapterLayout
from fedlora.plan import RunPlan

from .federations import Echo, tensors
from .measure import Unavailable


@contextlib.contextmanager
def flower_engine(run: RunPlan, layout: AdapterLayout, clients: int) -> Iterator[Callable[[int], None]]:
    """Gives one round of `clients`: orders, echoes and the mean, by the same strategy and client app as over ours.

    Raises:
        Unavailable: Ray is not installed.
        RuntimeError: Flower's engine ended during the measurement.
    """
    if importlib.util.find_spec("ray") is None:
        raise Unavailable("Flower's simulation engine, to be measured beside ours, needs Ray: "
                          "pip install 'fedlora[ray]'")
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs, run, layout, clients))
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe

    def one_round(block: int) -> None:
        try:
            ours.send(block)
            assert ours.recv() == clients
        except (EOFError, OSError):
            raise RuntimeError("Flower's simulation engine ended during the measurement; what it said is above"
                               ) from None

    try:
        yield one_round
    finally:
        ours.close()
        process.join(60)  # Ray ends its own processes meanwhile
        process.kill()


def _serve(connection: Connection, run: RunPlan, layout: AdapterLayout, clients: int) -> None:
    """The process: for each message one round, answered by how many replies it had, until the pipe is closed."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")
    from flwr.app import ConfigRecord
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedlora_client.flower_app import client_app
    from fedlora_strategies import FFALoRA
    from fedlora_strategies.messages import to_record

    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = ServerApp()
    start = to_record(tensors(layout.state, 0))

    @server.main()
    def main(grid: Any, context: Any) -> None:
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        config = ConfigRecord({"nodes": nodes})
        with contextlib.suppress(EOFError):
            while True:
                connection.recv()
                strategy = FFALoRA(run, layout)
                replies = grid.send_and_receive(strategy.configure_train(1, start, config, grid))
                _, metrics = strategy.aggregate_train(1, replies)
                connection.send(metrics and metrics["replies"])

    run_simulation(server, client_app(lambda context: Echo(layout)), clients,
                   backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})  # a client on each core
