"""Where a user's own files are, by the XDG base directories: one ledger, policy and signing key per user."""

from __future__ import annotations

import os
from pathlib import Path


def ledger() -> Path:
    return _state() / "ledger.sqlite"


def signing_key() -> Path:
    return _state() / "signing-key.pem"


def policy() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fedlora" / "policy.toml"


def default_state(name: str) -> Path:
    """Where a client named `name` keeps its uploads and reports if --state is not given."""
    return _state() / name


def _state() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fedlora"
