"""Imports all that the commands and the simulations' workers need, once for all processes forked from this one.

That takes about eight seconds. The client's modules are imported first, while importing Flower, `datasets` and
matplotlib fails, because a client must run without them.
"""

import gc
import sys

from fedlora_client.cli import set_environment

set_environment(allow_download=False)
without = ("flwr", "datasets", "matplotlib")
sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]

import fedlora_client.app  # noqa: E402
import fedlora_client.connection  # noqa: E402, F401

for name in without:
    del sys.modules[name]

import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import fedlora_server.app  # noqa: E402, F401
import fedlora_simulations.worker  # noqa: E402, F401

get_checkpoint_conversion_mapping("bert")  # builds all models' mappings, else each process would
gc.freeze()  # so no fork scans the imported objects, which would copy their memory
