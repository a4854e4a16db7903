"""Resident memory of a whole simulation with 1 to 1,000 clients.

Each simulation runs in a process of its own; its clients share the rows of one data set.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedlora.config import SimulationConfig, read_config
from fedlora.tasks import read

from ..fresh import in_fresh_process, peak_bytes
from ..measure import RATIO, Figure, Row, Settings, Unavailable, Value

ROWS_EACH = 10
"""Fewest rows of a client: with fewer, batches of two exceed the sampling rate that a private client allows."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each number of clients."""
    counts = (1, 4) if settings.quick else (1, 10, 100, 1000)
    there, needed = len(read(settings.data, "classification")), ROWS_EACH * counts[-1]
    if there < needed:
        raise Unavailable(f"--data has {there:,} rows, but {counts[-1]:,} clients need {needed:,}, {ROWS_EACH} each; "
                          "give more rows, or leave --data out for generated ones")
    with_one = None
    for clients in counts:
        argv = ["--strategy", "ffa-lora", "--rank", "8", "--clients", str(clients), "--data", str(settings.data),
                "--model", settings.model, "--device", settings.device, "--rounds", "1", "--local-steps", "1",
                "--batch-size", "2", "--max-length", "64"]
        held = [in_fresh_process(f"{__name__}:simulated", argv=argv, threads=settings.threads)
                for _ in range(settings.repeats(3))]
        with_one = with_one or Value.of(held, "bytes").median
        yield Row(f"{clients:,} clients", {
            "memory ÷ 1 client": Value.of([one / with_one for one in held], RATIO, better="lower", target=1.2),
            "memory": Value.of([one / 2**20 for one in held], "MiB")})


def simulated(argv: list[str], threads: int | None) -> int:
    """Run a simulation with these options; return the peak resident memory of this process in bytes."""
    from fedlora_server.run_setup import find_model
    from fedlora_simulations.population import Method, populate
    from fedlora_simulations.simulated_run import simulate

    argv = [*argv, *(["--threads", str(threads)] if threads else [])]
    options = read_config(SimulationConfig, argv)
    done = simulate(options, Method.parse("ffa-lora"), 0, find_model(options), populate(options, 0))
    assert done.result.ended == "finished" and len(done.epsilons) == options.clients
    return peak_bytes()


FIGURE = Figure(6, measure)
