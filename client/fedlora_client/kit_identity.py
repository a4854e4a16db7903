"""A client's key and certificate, held against the coordinator's kit; and the request for a certificate."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from fedlora.config import ClientConfig
from fedlora.files import replace_file
from fedlora.identity.certificates import comes_from, common_name, day, grouped
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, REQUEST
from fedlora.kit import Kit, certificates
from fedlora.privacy import Policy

from .enroll import enroll
from .steps import Awaiting
from .tls import tls_of


def check_authority(kit: Kit, folder: Path, *, write: bool) -> None:
    """Compare the authority that this client trusts with the kit's.

    Args:
        kit: the coordinator's kit.
        folder: the folder of key and certificate.
        write: whether to write the kit's authority as ca.pem if there is none.

    Raises:
        ValueError: ca.pem is another authority's.
        OSError: the folder cannot be written.
    """
    path = folder / AUTHORITY
    if not path.exists():
        if write:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, kit.authority.encode(), mode=0o644)
        return
    try:
        same = certificates(path.read_text("ascii")) == certificates(kit.authority)
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{path} is not the kit's authority. Ask the coordinator by telephone which is right; for "
                         "another federation name another folder with --tls")


def check_certificate(kit: Kit, options: ClientConfig, policy: Policy) -> tuple[str, str]:
    """Check this client's certificate, and that the policy allows the key of the kit's server.

    Args:
        kit: the coordinator's kit.
        options: the options of fedlora-client; --tls is given.
        policy: the owner's policy.

    Returns:
        The name in the certificate, and until when it is valid, in words.

    Raises:
        ValueError: the certificate cannot be used, is another authority's or another name's, or the policy allows
            other servers alone.
    """
    if policy.server_fingerprints is not None and kit.server_fingerprint not in policy.server_fingerprints:
        raise ValueError(f"the policy {policy.path} allows other servers alone (server-fingerprints), and the key of "
                         f"the kit's server is {grouped(kit.server_fingerprint)}. Ask the coordinator by telephone "
                         "which is right")
    tls = tls_of(options, policy)
    assert tls is not None, "--tls is given"
    identity = tls.identity()
    if not comes_from(identity.chain_pem, kit.authority.encode()):
        raise ValueError(f"{tls.folder / CERTIFICATE} does not come from the kit's authority, so that the server would "
                         f"not take it. Send {tls.folder / REQUEST} to the coordinator, and put what comes back there")
    return identity.certificate.name, f"valid until {day(identity.certificate.not_after)}"


def ask_for_certificate(folder: Path, name: str) -> Awaiting:
    """Make a key, if there is none, and a request for a certificate; return what its owner has to do.

    Args:
        folder: the folder of key and certificate.
        name: this client's name at the server.

    Raises:
        ValueError: the name cannot be a client's, or the key that is there cannot be used.
        OSError: the folder cannot be written.
    """
    digits = enroll(folder, name)
    return Awaiting(f"{name} has a key, and needs a certificate for it:\n"
                    f"  1. Send {folder / REQUEST} to the coordinator. It holds no secret.\n"
                    f"  2. Tell the coordinator this fingerprint by telephone:\n     {digits}\n"
                    f"  3. Put the certificate that comes back into {folder}, as {CERTIFICATE}.\n"
                    "  4. Start the same command again.")


def requested_name(folder: Path) -> str | None:
    """Return the name for which a certificate was asked already; None if there is no request that can be read."""
    try:
        return common_name(x509.load_pem_x509_csr((folder / REQUEST).read_bytes()).subject)
    except (OSError, ValueError):
        return None
