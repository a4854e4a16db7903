"""The ClientApp: FedLoRA's own client, with its privacy ledger, policy and privacy report.

The data holder configures it on the machine with the data, with the options of fedlora-client:

    flower-supernode --node-config 'data="notes.jsonl" epsilon=8 declared-size=1300 yes=true' …
"""

from fedlora_client.flower_app import app

__all__ = ["app"]
