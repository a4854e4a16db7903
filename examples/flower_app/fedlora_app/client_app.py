"""The ClientApp: FedLoRA's own client, with its ledger, policy and privacy report.

It is configured where the data are, with the options of fedlora-client:

    flower-supernode --node-config 'data="notes.jsonl" epsilon=8 declared-size=1300 yes=true' …
"""

from fedlora_client.flower_app import app

__all__ = ["app"]
