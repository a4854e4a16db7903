"""The ServerApp: a plain Flower run with a FedLoRA strategy (here FedSVD; any other works the same way)."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora_strategies import FedSVD

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train under differential privacy, and write the adapter in PEFT's format."""
    config = context.run_config
    ready = FedSVD.for_model(str(config["model"]), labels=str(config["labels"]).split(","), private=True,
                             min_nodes=int(config["clients"]), rank=int(config["rank"]), rounds=int(config["rounds"]),
                             local_steps=2, batch_size=16)
    result = ready.strategy.start(grid, ready.arrays, num_rounds=int(config["rounds"]))
    ready.export(result.arrays, Path(str(config["out"])))
