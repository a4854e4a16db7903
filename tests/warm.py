"""What both commands import, which takes about nine seconds: once here, for all processes that are forked from it.

Flower is left out, for a client must run without it.
"""

import argparse

from fedlora_client.cli import set_environment

set_environment(argparse.Namespace(allow_download=False))

import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401

import fedlora_client.app  # noqa: E402
import fedlora_client.connection  # noqa: E402, F401
