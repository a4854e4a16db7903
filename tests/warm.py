"""What the commands and the workers of simulations import, which takes about eight seconds: once here, for all
processes that are forked from it.

First the client's part, in which importing Flower fails: a client must run without it.
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

get_checkpoint_conversion_mapping("bert")  # builds those of all models, once a process
gc.freeze()  # no fork looks through what was imported, nor copies it
