"""A certificate authority in a folder: for coordinators whose institutions have none in common.

    ca.pem, ca-key.pem           the authority; its key signs certificates and nothing else
    certificate.pem, key.pem     the server's own identity (`fedlora.identity.folder`)
    clients.toml                 which clients may take part (`allow_list`)
    issued/NAME.pem              the certificates of clients, as they were sent to them
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora import wire
from fedlora.files import replace_file
from fedlora.identity.certificates import Certificate, common_name, fingerprint, key_of, parse_certificate, utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY, load_key, new_key

from . import allow_list

AUTHORITY_KEY, ISSUED = "ca-key.pem", "issued"
AUTHORITY_DAYS, DAYS = 3650, 365
EARLIER = timedelta(hours=1)
"""How far a certificate's beginning lies back, for machines whose clocks are late."""
SERVER_NAME = "fedlora-server"


@dataclass(frozen=True)
class Authority:
    """A certificate authority, its folder, and the clients that it has issued certificates for.

    Attributes:
        folder: holds the files that the module names.
        certificate: the authority's own.
        key: the authority's private key.
    """

    folder: Path
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str], *, now: datetime | None = None) -> Self:
        """Make an authority, the server's certificate, and an empty list of clients.

        Args:
            folder: made if absent; must not hold an authority yet.
            hosts: names and IP addresses at which clients reach the server.
            now: when the certificates begin; None for this moment.

        Raises:
            ValueError: the folder holds an authority already, or a host is not a name or an address.
        """
        if (folder / AUTHORITY).exists() or (folder / AUTHORITY_KEY).exists():
            raise ValueError(f"{folder} holds an authority already; certificates of a new one would shut out every "
                             "client that has enrolled. Choose another folder, or go on with this one")
        alternatives = [_alternative(host) for host in hosts]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, now = new_key(folder / AUTHORITY_KEY), now or utc_now()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA authority")])
        certificate = (_builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
                       .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                       .add_extension(_usage(signs_certificates=True), critical=True)
                       .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                       .sign(key, hashes.SHA256()))
        replace_file(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM), mode=0o644)
        authority = cls(folder, certificate, key)
        authority.issue_server(alternatives, now=now)
        allow_list.write(folder / allow_list.FILE, {})
        return authority

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an authority that `create` made.

        Raises:
            ValueError: the folder holds none, or a file of it is damaged.
        """
        try:
            certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{folder} holds no authority ({AUTHORITY}: {why}); make one with fedlora-server pki "
                             "init") from None
        return cls(folder, certificate, load_key(folder / AUTHORITY_KEY))

    def issue_server(self, alternatives: Sequence[x509.GeneralName], *, days: int = DAYS,
                     now: datetime | None = None) -> Certificate:
        """Issue the server's certificate, for its key if it has one and else for a new one.

        Args:
            alternatives: host names and addresses that clients may call it by.
            days: how long it is valid.
            now: when it begins; None for this moment.
        """
        path = self.folder / KEY
        key = load_key(path) if path.exists() else new_key(path)
        return self._issue(SERVER_NAME, key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH, self.folder / CERTIFICATE,
                           days, now, alternatives)

    def sign(self, request: bytes, *, days: int = DAYS, now: datetime | None = None) -> Certificate:
        """Sign a client's request and put the client on the list.

        Args:
            request: what `fedlora-client enroll` made, in PEM.
            days: how long the certificate is valid.
            now: when it begins; None for this moment.

        Raises:
            ValueError: it is no request, its signature is wrong, its key is not ECDSA on P-256, or another key is
                listed under its name.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
        except ValueError:
            raise ValueError("this is not a request for a certificate in PEM; send what fedlora-client enroll "
                             "made") from None
        name, key = common_name(asked.subject), key_of(asked)
        wire.check_name(name)
        if key is None:
            raise ValueError(f"the request of {name} is for a key that is not ECDSA on P-256; make it with "
                             "fedlora-client enroll")
        if not asked.is_signature_valid:
            raise ValueError(f"the request of {name} is not signed by its own key; it was changed on its way")
        return self.admit(name, key, days=days, now=now)

    def admit(self, name: str, key: EllipticCurvePublicKey, *, days: int = DAYS,
              now: datetime | None = None) -> Certificate:
        """Issue a client's certificate and put the client on the list.

        Args:
            name: the client's name.
            key: its public key, ECDSA on P-256.
            days: how long the certificate is valid.
            now: when it begins; None for this moment.

        Raises:
            ValueError: another key is listed under this name.
        """
        entries = self.listed()
        if entries.get(name, fingerprint(key)) != fingerprint(key):
            raise ValueError(f"{name} is listed with another key. If its owner has made a new one, run "
                             f"fedlora-server pki revoke {name} first")
        issued = self._issue(name, key, ExtendedKeyUsageOID.CLIENT_AUTH, self.file_of(name), days, now)
        self._list({**entries, name: issued.fingerprint})
        return issued

    def renew(self, name: str, *, days: int = DAYS, now: datetime | None = None) -> Certificate:
        """Issue a certificate for the key that a listed client, or the server, has already.

        Args:
            name: the client's name, or `SERVER_NAME`.
            days: how long the new certificate is valid.
            now: when it begins; None for this moment.

        Raises:
            ValueError: nothing was issued under this name, or the client is not listed any more.
        """
        path = self.folder / CERTIFICATE if name == SERVER_NAME else self.file_of(name)
        try:
            old = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            raise ValueError(f"no certificate was issued for {name!r} here; fedlora-server pki list shows "
                             "which were") from None
        if name == SERVER_NAME:
            names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            return self.issue_server(list(names), days=days, now=now)
        if name not in self.listed():
            raise ValueError(f"{name} was revoked; let it enroll again, or put its fingerprint back into "
                             f"{self.folder / allow_list.FILE}")
        key = old.public_key()
        assert isinstance(key, EllipticCurvePublicKey)  # no other was issued
        return self.admit(name, key, days=days, now=now)

    def revoke(self, name: str) -> None:
        """Take a client from the list. A running server disconnects it within seconds.

        Raises:
            ValueError: the client is not listed.
        """
        entries = dict(self.listed())
        if name not in entries:
            raise ValueError(f"{name!r} is not on the list; fedlora-server pki list shows who is")
        del entries[name]
        self._list(entries)

    def listed(self) -> Mapping[str, str]:
        """Return the clients that may take part: name → fingerprint."""
        return allow_list.read(self.folder / allow_list.FILE)

    def issued(self) -> Mapping[str, Certificate]:
        """Return the newest certificate that was issued for each name, the server's among them."""
        found = [parse_certificate(path.read_bytes())
                 for path in (self.folder / CERTIFICATE, *sorted((self.folder / ISSUED).glob("*.pem")))]
        return {certificate.name: certificate for certificate in found}

    def _issue(self, name: str, key: EllipticCurvePublicKey, usage: x509.ObjectIdentifier, path: Path, days: int,
               now: datetime | None, alternatives: Sequence[x509.GeneralName] = ()) -> Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (_builder(subject, self.certificate.subject, key, now or utc_now(), days)
                   .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                   .add_extension(_usage(signs_certificates=False), critical=True)
                   .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                                  critical=False))
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        pem = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        replace_file(path, pem, mode=0o644)
        return parse_certificate(pem)

    def _list(self, entries: Mapping[str, str]) -> None:
        allow_list.write(self.folder / allow_list.FILE, entries)

    def file_of(self, name: str) -> Path:
        """Return the file of a client's certificate; any name fits into a file name."""
        return self.folder / ISSUED / (re.sub(r"^\.|[^\w.-]", lambda odd: f"%{ord(odd[0]):x}", name) + ".pem")


def _alternative(host: str) -> x509.GeneralName:
    """Return the entry of a server's certificate for a name or address at which it is called.

    Raises:
        ValueError: it is neither a host name nor an IP address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", host):
        raise ValueError(f"{host!r} is neither a host name nor an IP address; leave out the port")
    return x509.DNSName(host)


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePublicKey, now: datetime,
             days: int) -> x509.CertificateBuilder:
    return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER).not_valid_after(now + timedelta(days=days)))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
                         data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates,
                         crl_sign=signs_certificates, encipher_only=False, decipher_only=False)
