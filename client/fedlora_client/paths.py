"""Paths of a user's own files (XDG base directories): one ledger, one policy and one signing key per user."""

from __future__ import annotations

from pathlib import Path

from fedlora.places import user_folder


def ledger() -> Path:
    """Return the path of the user's ledger."""
    return _state() / "ledger.sqlite"


def signing_key() -> Path:
    """Return the path of the private key that signs privacy reports."""
    return _state() / "signing-key.pem"


def batch_invariance() -> Path:
    """Return the path of the record of what was shown about this machine's arithmetic.

    See `fedlora.training.batch_invariance`.
    """
    return _state() / "batch-invariance.json"


def policy() -> Path:
    """Return the path of the user's policy."""
    return user_folder("XDG_CONFIG_HOME", ".config") / "policy.toml"


def named_policy(named: Path | None, simulated_ledger: Path | None) -> Path:
    """Return the policy to use: the named one, else the simulated ledger's own, else the user's.

    Args:
        named: the value of --policy; None if it is not given.
        simulated_ledger: the value of --simulated-ledger; None if it is not given.

    Raises:
        ValueError: the named file does not exist. To go on without it would drop its limits.
    """
    if named is None:
        return simulated_ledger / "policy.toml" if simulated_ledger else policy()
    if not named.exists():
        raise ValueError(f"--policy {named}: there is no such file, so its limits would not hold. Correct the path, or "
                         "make an empty file to begin with")
    return named


def default_state(name: str) -> Path:
    """Return the folder where a client of this name keeps its uploads and reports if --state is not given."""
    return _state() / name


def _state() -> Path:
    return user_folder("XDG_STATE_HOME", ".local", "state")
