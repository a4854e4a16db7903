"""X.509 certificates: what they say, and the fingerprint by which allow lists and policies name a key."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

EXPIRES_SOON = timedelta(days=30)
"""How long before its end a certificate is warned about."""


@dataclass(frozen=True)
class Certificate:
    """What FedLoRA reads of an X.509 certificate.

    Attributes:
        name: the subject's common name; a client's name at the server.
        fingerprint: SHA-256 of the public key (see `fingerprint`).
        not_before: when its validity begins, in UTC.
        not_after: when its validity ends, in UTC.
        pem: the certificate itself, in PEM.
    """

    name: str
    fingerprint: str
    not_before: datetime
    not_after: datetime
    pem: bytes

    def why_invalid(self, now: datetime) -> str | None:
        """Return why the certificate is not valid at `now`, in words for its owner; None if it is valid."""
        if now > self.not_after:
            return f"the certificate of {self.name} expired on {day(self.not_after)}; have it renewed"
        if now < self.not_before:
            return (f"the certificate of {self.name} is valid from {day(self.not_before)} on; check this machine's "
                    "clock")
        return None

    def expiry_warning(self, now: datetime) -> str | None:
        """Return a warning if the certificate ends within `EXPIRES_SOON` of `now`, else None."""
        left = self.not_after - now
        if left > EXPIRES_SOON:
            return None
        return f"The certificate of {self.name} ends on {day(self.not_after)}, in {left.days} days: have it renewed."


def utc_now() -> datetime:
    """Return the time now, with its time zone."""
    return datetime.now(UTC)


def day(moment: datetime) -> str:
    """Return a date as people read it, for example 2026-11-28."""
    return f"{moment:%Y-%m-%d}"


def fingerprint(key: PublicKeyTypes) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo, as 64 hexadecimal digits.

    A renewed certificate keeps its key, and so its fingerprint.
    """
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def grouped(digits: str) -> str:
    """Return a fingerprint in groups of four digits, to be read aloud and compared."""
    return " ".join(digits[i:i + 4] for i in range(0, len(digits), 4))


def common_name(subject: x509.Name) -> str:
    """Return the one common name of a subject.

    Raises:
        ValueError: there is none, or more than one.
    """
    names = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1:
        raise ValueError(f"the subject has {len(names)} common names and must have exactly one")
    return names[0]


def parse_certificate(pem: bytes) -> Certificate:
    """Read the first certificate of a PEM text.

    Raises:
        ValueError: it is no certificate, has not exactly one common name, or its key is not ECDSA on P-256.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    name = common_name(certificate.subject)
    key = key_of(certificate)
    if key is None:
        raise ValueError(f"the certificate of {name} has a key that is not ECDSA on P-256 (secp256r1), which TLS 1.3 "
                         "here needs; have it issued for such a key")
    return Certificate(name, fingerprint(key), certificate.not_valid_before_utc, certificate.not_valid_after_utc,
                       certificate.public_bytes(Encoding.PEM))


def key_of(document: x509.Certificate | x509.CertificateSigningRequest) -> EllipticCurvePublicKey | None:
    """Return the public key of a certificate or request if it is ECDSA on P-256, else None."""
    try:
        key = document.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1" else None


def comes_from(chain: bytes, authority: bytes) -> bool:
    """Return whether a certificate is signed by one of an authority's, over the intermediate ones that follow it.

    Dates and purposes are not looked at.

    Args:
        chain: the certificate and those of intermediate authorities, in PEM.
        authority: one or more certificates of the authority, in PEM.

    Raises:
        ValueError: a certificate is damaged.
    """
    trusted = x509.load_pem_x509_certificates(authority)
    certificate, *between = x509.load_pem_x509_certificates(chain)
    while not any(_issued(certificate, one) for one in trusted):
        issuer = next((one for one in between if _issued(certificate, one)), None)
        if issuer is None:
            return False
        between.remove(issuer)
        certificate = issuer
    return True


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def names_host(pem: bytes, host: str) -> bool:
    """Return whether a server's certificate is for a host, so that clients that call it there trust it.

    Args:
        pem: the certificate, in PEM.
        host: a name or an IP address, without a port.

    Raises:
        ValueError: the certificate is damaged.
    """
    try:
        names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
            x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    try:
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    except ValueError:
        pass
    first, _, rest = host.lower().partition(".")
    return any(name.lower() in (f"{first}.{rest}".rstrip("."), f"*.{rest}")
               for name in names.get_values_for_type(x509.DNSName))
