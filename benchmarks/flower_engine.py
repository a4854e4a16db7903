"""Rounds over Flower's own simulation engine (Ray), to measure beside FedLoRA's engine.

They run in a process of their own: Flower gives each process one identity, and FedLoRA's engines take that of the
measuring process. The clients are those of `federations.Echo`.
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
    """Start Flower's engine and yield a function that runs one round over it.

    A round sends the orders, receives the echoes and forms their mean, with the strategy and the client app that also
    run over FedLoRA's engine.

    Args:
        run: plan of the run.
        layout: adapters whose tensors travel.
        clients: number of clients.

    Raises:
        Unavailable: Ray is not installed.
        RuntimeError: Flower's engine ended during the measurement.
    """
    if importlib.util.find_spec("ray") is None:
        raise Unavailable("Flower's simulation engine needs Ray, which is not installed: "
                          "pip install 'fedlora[ray]'")
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs, run, layout, clients))
    process.start()
    theirs.close()  # so that the pipe ends when the process does

    def one_round(block: int) -> None:
        try:
            ours.send(block)
            assert ours.recv() == clients
        except (EOFError, OSError):
            raise RuntimeError("Flower's simulation engine ended during the measurement; its messages are above"
                               ) from None

    try:
        yield one_round
    finally:
        ours.close()
        process.join(60)  # time for Ray to end its own processes
        process.kill()


def _serve(connection: Connection, run: RunPlan, layout: AdapterLayout, clients: int) -> None:
    """Run the process: one round for each message, answered by the number of replies, until the pipe is closed."""
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
                   backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})  # one client on each core
