"""Imports all that the commands and the simulations' workers need, once for all processes forked from this one.

That takes about eight seconds. The client's modules are imported first, while importing Flower fails, because a client
must run without it.
"""

import gc
import sys

from fedlora_client.cli import set_environment

set_environment(allow_download=False)
sys.modules["flwr"] = None  # type: ignore[assignment]

import fedlora_client.app  # noqa: E402
import fedlora_client.connection  # noqa: E402, F401

del sys.modules["flwr"]

import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import fedlora_server.app  # noqa: E402, F401
import fedlora_simulations.worker  # noqa: E402, F401

get_checkpoint_conversion_mapping("bert")  # builds all models' mappings, else each process would
gc.freeze()  # so no fork scans the imported objects, which would copy their memory
