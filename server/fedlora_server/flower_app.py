"""fedlora-server as a Flower ServerApp: the same run, with a SuperLink's SuperNodes as clients.

The keys of its run configuration are the options of fedlora-server. Paths are paths on the SuperLink's machine.
"""

from __future__ import annotations

from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import ServerConfig, config_from
from fedlora.console import messages

from .app import serve
from .superlink_engine import SuperLinkEngine

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation. Flower's run fails if the federation does not reach its last round.

    Args:
        grid: reaches the SuperNodes.
        context: holds the run's configuration.

    Raises:
        ValueError: an option is wrong, or does not fit the others, the model or the data.
        RuntimeError: the run ended early. The finished rounds are in --out.
    """
    options = config_from(context.run_config, ServerConfig, "--run-config")
    if options.dry_run:
        raise ValueError("dry-run works only with fedlora-server; leave it out of the run configuration")
    served = serve(options, messages(), listen=partial(SuperLinkEngine, grid), run_id=f"{context.run_id:016x}")
    if served.result is None or served.result.ended != "finished":
        ended = (served.result.why or served.result.ended) if served.result else "stopped"
        raise RuntimeError(f"the run ended early: {ended}; what was finished is in {served.out}")
