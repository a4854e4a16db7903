"""Where a user's own files are, by the XDG base directories: one ledger, policy and signing key per user."""

from __future__ import annotations

from pathlib import Path

from fedlora.places import user_folder


def ledger() -> Path:
    return _state() / "ledger.sqlite"


def signing_key() -> Path:
    return _state() / "signing-key.pem"


def batch_invariance() -> Path:
    """What was shown of this machine's arithmetic; see `fedlora.training.batch_invariance`."""
    return _state() / "batch-invariance.json"


def policy() -> Path:
    return user_folder("XDG_CONFIG_HOME", ".config") / "policy.toml"


def named_policy(named: Path | None, simulated_ledger: Path | None) -> Path:
    """The policy that the command line asks for: the user's, a simulated ledger's own, or the one it names.

    Raises:
        ValueError: the one it names does not exist, and its limits would not hold.
    """
    if named is None:
        return simulated_ledger / "policy.toml" if simulated_ledger else policy()
    if not named.exists():
        raise ValueError(f"--policy {named}: there is no such file, so its limits would not hold. Correct the name, or "
                         "make an empty file to begin with")
    return named


def default_state(name: str) -> Path:
    """Where a client named `name` keeps its uploads and reports if --state is not given."""
    return _state() / name


def _state() -> Path:
    return user_folder("XDG_STATE_HOME", ".local", "state")
