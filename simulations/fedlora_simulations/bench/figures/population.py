"""Resident memory of a whole simulation with 1 to 1,000 clients, each in a process of its own.

The clients share one data set's rows. llama-1b is no folder that a simulation could load; MiniLM takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedlora.options import SIMULATE, build_parser, read_options

from ..fresh import in_fresh_process, peak_bytes
from ..measure import RATIO, Figure, Row, Settings, exactly
from ..subjects import RANDOM_LLAMA


def measure(settings: Settings) -> Iterator[Row]:
    model = "minilm" if settings.model == RANDOM_LLAMA else settings.model
    with_one = None
    for clients in (1, 4) if settings.quick else (1, 10, 100, 1000):
        argv = ["--strategy", "ffa-lora", "--rank", "8", "--clients", str(clients), "--data", str(settings.data),
                "--model", model, "--device", settings.device, "--rounds", "1", "--local-steps", "1",
                "--batch-size", "2", "--max-length", "64"]
        held = in_fresh_process(f"{__name__}:simulated", argv=argv, threads=settings.threads)
        with_one = with_one or held
        yield Row(f"{clients:,} clients", {
            "memory ÷ 1 client": exactly(held / with_one, RATIO, better="lower", target=1.2),
            "memory": exactly(held / 2**20, "MiB")})


def simulated(argv: list[str], threads: int | None) -> int:
    """Run the simulation; the most bytes that its process held."""
    from fedlora_server.planning import find_model

    from ...simulate import Method, populate, simulate

    argv = [*argv, *(["--threads", str(threads)] if threads else [])]
    options = read_options(build_parser(SIMULATE, "one round of each client"), SIMULATE, argv)
    options.data = Path(options.data)
    done = simulate(options, Method.parse("ffa-lora"), 0, find_model(options), populate(options, 0))
    assert done.result.ended == "finished" and len(done.epsilons) == options.clients
    return peak_bytes()


FIGURE = Figure(6, measure)
