"""Server aggregation from 10 to 1,000 clients: time against a bare sum of the same arrays, and memory.

Uploads have the shape of a 7B model's adapters (FedAvg-LoRA, 32 layers, queries and values of 4096², r = 16: 8.4
million values, 34 MB). They come one after the other, as from an engine, and are never together in memory.

The target refers to the bare sum in float64, in which the strategy sums too. One in float32, beside it, moves fewer
bytes; its rounding grows with the clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message

from fedlora.plan import Released, Upload
from fedlora_strategies import FedAvgLoRA
from fedlora_strategies.messages import assign_id, assume_identity, reply, to_record

from ..federations import SEVEN_B, layout, plan, tensors
from ..fresh import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from ..measure import RATIO, Figure, Row, Settings, Value, interleaved

DIFFERENT = 4
"""Uploads that are made; the clients' are these in turn."""


class Server:
    """A strategy in its first round, and its clients' uploads.

    Args:
        copied: each upload has memory of its own, as from an engine, so that one that is kept is seen.
    """

    def __init__(self, layers: int, width: int, rank: int, clients: int, *, copied: bool = False) -> None:
        self.copied = copied
        run = plan("fedavg-lora", "lora", rank=rank, private=False)
        assume_identity(run.run_id)
        self.clients, self.run_id = clients, run.run_id
        self.strategy = FedAvgLoRA(run, layout("lora", layers=layers, width=width, rank=rank))
        self.uploads = [tensors(self.strategy.layout.trained, seed) for seed in range(min(DIFFERENT, clients))]
        self.records = [to_record(upload) for upload in self.uploads]
        self.start = self.records[0]

    def aggregate(self, block: int = 0) -> None:
        """One round: orders out, uploads in, the next state."""
        nodes = ConfigRecord({"nodes": list(range(1, self.clients + 1))})
        orders = self.strategy.configure_train(1, self.start, nodes, None)  # type: ignore[arg-type]
        self.orders = list(orders)
        _, metrics = self.strategy.aggregate_train(1, self)  # read one at a time, as from an engine
        assert metrics is not None and metrics["replies"] == self.clients

    def __iter__(self) -> Iterator[Message]:
        for number, order in enumerate(self.orders):
            assign_id(order, str(number))
            message = reply(Upload(self.run_id, 1, 0, tensors=Released({}), steps=1), order)
            chosen = number % len(self.records)
            message.content["arrays"] = to_record(self.uploads[chosen]) if self.copied else self.records[chosen]
            yield message

    def bare_sum(self, dtype: type, block: int = 0) -> dict[str, np.ndarray]:
        """The mean of the same arrays, summed up in float64 as by the strategy or in float32, without any check."""
        sums: dict[str, np.ndarray] = {name: np.zeros(array.shape, dtype) for name, array in self.uploads[0].items()}
        for number in range(self.clients):
            for name, array in self.uploads[number % len(self.uploads)].items():
                sums[name] += array
        return {name: (total / self.clients).astype(np.float32) for name, total in sums.items()}


def measure(settings: Settings) -> Iterator[Row]:
    shape: dict[str, Any] = {"layers": 2, "width": 64, "rank": 4} if settings.quick else {**SEVEN_B, "rank": 16}
    counts = (2, 4) if settings.quick else (10, 100, 1000)
    least = None
    for clients in counts:
        server = Server(**shape, clients=clients)
        times = interleaved({"float64": partial(server.bare_sum, np.float64),
                             "float32": partial(server.bare_sum, np.float32),
                             "aggregation": server.aggregate}, settings.repeats(max(1, 50 // clients)))
        del server
        memory = {}
        if forget_peak():  # else the peak may be that of making the uploads
            peaks = [in_fresh_process(f"{__name__}:peak", **shape, clients=clients) for _ in range(settings.repeats(3))]
            least = least or max(1.0, Value.of(peaks, "bytes").median)  # tiny ones may fit into what is there
            memory = {f"memory ÷ {counts[0]} clients": Value.of([peak / least for peak in peaks], RATIO, better="lower",
                                                                target=1.05),
                      "memory": Value.of([peak / 2**20 for peak in peaks], "MiB")}
        yield Row(f"{clients:,} clients", {
            "time ÷ bare sum": times["aggregation"].over(times["float64"], target=2.0),
            "time ÷ float32 sum": times["aggregation"].over(times["float32"]),
            "CPU time": times["aggregation"].cpu_over(times["float64"]),
            "a client": Value.of([1e3 * second / clients for second in times["aggregation"].wall], "ms"),
            **memory}, "" if memory else "memory takes a system that can forget its peak, as Linux does")


def peak(layers: int, width: int, rank: int, clients: int) -> int:
    """The most bytes that one round of aggregation takes, an upload at a time in them."""
    server = Server(layers, width, rank, clients, copied=True)
    forget_peak()
    before = resident_bytes()
    server.aggregate()
    return peak_bytes() - before


FIGURE = Figure(8, measure)
