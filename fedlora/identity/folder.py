"""One side's identity on the disk: its key, its certificate, and the authority that it trusts.

    key.pem           the private key, made here, readable by its owner alone
    request.csr       what the authority is asked to sign
    certificate.pem   the certificate, followed by those of intermediate authorities
    ca.pem            the authority whose certificates the other side must have
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedlora.files import replace_file
from fedlora.identity.certificates import Certificate, fingerprint, parse_certificate, utc_now

KEY, REQUEST, CERTIFICATE, AUTHORITY = "key.pem", "request.csr", "certificate.pem", "ca.pem"


@dataclass(frozen=True)
class Identity:
    """A key with its certificate, and the authority that the other side's certificate must come from.

    Attributes:
        certificate: what the certificate says.
        key_pem: the private key in PEM.
        chain_pem: the certificate and those of intermediate authorities, in PEM.
        authority_pem: one or more trusted authorities, in PEM.
    """

    certificate: Certificate
    key_pem: bytes
    chain_pem: bytes
    authority_pem: bytes

    @property
    def key(self) -> EllipticCurvePrivateKey:
        """The private key."""
        key = load_pem_private_key(self.key_pem, password=None)
        assert isinstance(key, EllipticCurvePrivateKey), "read_identity has checked it"
        return key


def read_identity(folder: Path, *, now: datetime | None = None) -> Identity:
    """Read and check an identity.

    Args:
        folder: holds key.pem, certificate.pem and ca.pem.
        now: the time at which the certificate must be valid; None for this moment.

    Raises:
        ValueError: a file is missing or damaged, others can read the key, the key is not the certificate's, or the
            certificate has expired. The message says what to do.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with a key and a certificate; fedlora-server pki init makes the "
                         "server's, fedlora-client enroll a client's")
    key_pem, chain, authority = (_read(folder / name) for name in (KEY, CERTIFICATE, AUTHORITY))
    if (folder / KEY).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"others on this machine can read the private key {folder / KEY}; run chmod 600 on it")
    key = load_key(folder / KEY)
    certificate = _certificate(folder / CERTIFICATE, chain)
    _certificate(folder / AUTHORITY, authority)
    if fingerprint(key.public_key()) != certificate.fingerprint:
        raise ValueError(f"{folder / CERTIFICATE} was not issued for the key {folder / KEY}; put the certificate that "
                         f"answers {folder / REQUEST} there")
    if why := certificate.why_invalid(now or utc_now()):
        raise ValueError(f"{folder / CERTIFICATE}: {why}")
    return Identity(certificate, key_pem, chain, authority)


def make_request(folder: Path, name: str) -> bytes:
    """Make a key, if the folder has none, and a request for a certificate.

    Args:
        folder: made if absent; key.pem and request.csr are written there.
        name: the common name to ask for.

    Returns:
        The request in PEM. It holds no secret.

    Raises:
        ValueError: the name cannot be a common name, or a key that is there cannot be read.
    """
    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError as error:
        raise ValueError(f"the name {name!r} cannot stand in a certificate: {error}") from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_key(folder / KEY) if (folder / KEY).exists() else new_key(folder / KEY)
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = request.public_bytes(Encoding.PEM)
    replace_file(folder / REQUEST, pem, mode=0o644)
    return pem


def new_key(path: Path) -> EllipticCurvePrivateKey:
    """Make a P-256 key and write it to a file that only its owner can read."""
    key = generate_private_key(SECP256R1())
    replace_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_key(path: Path) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ValueError: it is missing, damaged or encrypted, or not ECDSA.
    """
    try:
        key = load_pem_private_key(_read(path), password=None)
    except TypeError:
        raise ValueError(f"{path} is encrypted; store the key without a passphrase, readable by its owner "
                         "alone") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a private key in PEM") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"{path} is not an ECDSA key; make one with fedlora-client enroll, or on P-256")
    return key


def _certificate(path: Path, pem: bytes) -> Certificate:
    """Return the certificate in a file.

    Raises:
        ValueError: it is damaged, or not for a key that TLS here can use.
    """
    if b"-----END CERTIFICATE-----" not in pem:
        raise ValueError(f"{path} holds no whole certificate in PEM; was it cut off while it was copied? Copy it again")
    try:
        return parse_certificate(pem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
