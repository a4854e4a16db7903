"""Server aggregation from 10 to 1,000 clients: time against a bare sum of the same arrays, and memory.

Uploads have the shape of a 7B model's adapters (FedAvg-LoRA, 32 layers, queries and values of 4096², r = 16: 8.4
million values, 34 MB). They arrive one after the other, as from an engine, and are never in memory together.

The target is for the ratio to a bare sum in float64, the type in which the strategy sums. The sum in float32 beside it
moves fewer bytes, but its rounding error grows with the number of clients.
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
"""Number of different uploads; the clients send them in turn."""


class Server:
    """A strategy in its first round, with the uploads of its clients.

    Args:
        layers: number of layers of the model.
        width: rows and columns of each projection.
        rank: rank of the adapters.
        clients: number of clients.
        copied: give each upload memory of its own, as an engine does, so that an upload kept too long shows in the
            peak.
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
        """Run one round: send the orders, read the uploads, form the next state."""
        nodes = ConfigRecord({"nodes": list(range(1, self.clients + 1))})
        orders = self.strategy.configure_train(1, self.start, nodes, None)  # type: ignore[arg-type]
        self.orders = list(orders)
        _, metrics = self.strategy.aggregate_train(1, self)  # uploads are read one at a time, as from an engine
        assert metrics is not None and metrics["replies"] == self.clients

    def __iter__(self) -> Iterator[Message]:
        for number, order in enumerate(self.orders):
            assign_id(order, str(number))
            message = reply(Upload(self.run_id, 1, 0, tensors=Released({}), steps=1), order)
            chosen = number % len(self.records)
            message.content["arrays"] = to_record(self.uploads[chosen]) if self.copied else self.records[chosen]
            yield message

    def bare_sum(self, dtype: type, block: int = 0) -> dict[str, np.ndarray]:
        """Return the unchecked mean of the same arrays, summed in float64 as the strategy does, or in float32."""
        sums: dict[str, np.ndarray] = {name: np.zeros(array.shape, dtype) for name, array in self.uploads[0].items()}
        for number in range(self.clients):
            for name, array in self.uploads[number % len(self.uploads)].items():
                sums[name] += array
        return {name: (total / self.clients).astype(np.float32) for name, total in sums.items()}


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each number of clients."""
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
        if forget_peak():  # otherwise the peak may be that of making the uploads
            peaks = [in_fresh_process(f"{__name__}:peak", **shape, clients=clients) for _ in range(settings.repeats(3))]
            least = least or max(1.0, Value.of(peaks, "bytes").median)  # tiny uploads fit into memory already held
            memory = {f"memory ÷ {counts[0]} clients": Value.of([peak / least for peak in peaks], RATIO, better="lower",
                                                                target=1.05),
                      "memory": Value.of([peak / 2**20 for peak in peaks], "MiB")}
        yield Row(f"{clients:,} clients", {
            "time ÷ bare sum": times["aggregation"].over(times["float64"], target=2.0),
            "time ÷ float32 sum": times["aggregation"].over(times["float32"]),
            "CPU time": times["aggregation"].cpu_over(times["float64"]),
            "a client": Value.of([1e3 * second / clients for second in times["aggregation"].wall], "ms"),
            **memory}, "" if memory else "memory is measured only on systems that can reset the peak, such as Linux")


def peak(layers: int, width: int, rank: int, clients: int) -> int:
    """Return the peak memory in bytes that one round of aggregation adds, which includes one upload at a time."""
    server = Server(layers, width, rank, clients, copied=True)
    forget_peak()
    before = resident_bytes()
    server.aggregate()
    return peak_bytes() - before


FIGURE = Figure(8, measure)
