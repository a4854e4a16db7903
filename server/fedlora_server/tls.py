"""TLS at the server: its identity, which clients may take part, and who is at the other end of a stream.

Both are read again while the server runs: a renewed certificate is used from the next handshake on, and a client that
was taken off the list is disconnected within seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import grpc

from fedlora.identity import Certificate, Identity, parse_certificate, read_identity
from fedlora.identity.certificates import day, grouped, utc_now

from .pki.allow_list import AllowList

log = logging.getLogger(__name__)


class ServerTls:
    """What a server needs for mutual TLS.

    gRPC has no option for the least version of TLS: `fedlora_server.cli` leaves its servers no cipher suite of TLS 1.2,
    and `client_certificate` takes none that was shown over it.

    Args:
        folder: holds key.pem, certificate.pem, ca.pem and clients.toml (`fedlora-server pki init` makes them).

    Raises:
        ValueError: a file is missing or damaged, or the certificate has expired.

    Attributes:
        certificate: the server's certificate as it was read last.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._identity = read_identity(folder)
        self._allowed = AllowList(folder)

    @property
    def certificate(self) -> Certificate:
        """The server's certificate as it was read last."""
        return self._identity.certificate

    @property
    def authority_pem(self) -> bytes:
        """The certificates of the authority that clients' certificates must come from, in PEM."""
        return self._identity.authority_pem

    def told(self) -> str:
        """Return what the coordinator reads at the start: who may take part, the fingerprint, and when it ends."""
        lines = [f"Clients must show a certificate (TLS 1.3); {len(self._allowed)} are listed in {self._allowed.path}.",
                 f"This server's fingerprint: {grouped(self.certificate.fingerprint)}",
                 self.certificate.expiry_warning(utc_now()) or
                 f"Its certificate is valid until {day(self.certificate.not_after)}."]
        return "\n".join(lines)

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for gRPC that read the identity again at each handshake."""
        return grpc.dynamic_ssl_server_credentials(_configuration(self._identity), self._renewed,
                                                   require_client_authentication=True)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            identity = read_identity(self._folder)
        except ValueError as error:
            log.warning("The renewed certificate cannot be used: %s. The one from before stays in use", error,
                        extra={"peer": "", "kind": "renewal"})  # read at each handshake, so said once a minute
            return None
        if identity == self._identity:
            return None
        self._identity = identity
        return _configuration(identity)

    def why_refused(self, client: Certificate) -> str | None:
        """Return why a client with a valid certificate may not take part, in words for it; None if it may."""
        if not self._allowed.allows(client.name, client.fingerprint):
            return (f"the certificate of {client.name} is not on the server's list of clients, or no longer; ask the "
                    "coordinator to run fedlora-server pki sign")
        return None


def client_certificate(context: grpc.ServicerContext) -> Certificate | None:
    """Return the certificate that the client of a stream has shown.

    None stands for a connection without TLS 1.3, and for a certificate that FedLoRA does not take.
    """
    about: Mapping[str, list[bytes]] = context.auth_context()
    if about.get("ssl_tls_version") != [b"TLSv1.3"] or "x509_pem_cert" not in about:
        return None
    try:
        return parse_certificate(about["x509_pem_cert"][0])
    except ValueError as error:
        log.warning("A client's certificate was not taken: %s", error, extra={"peer": "", "kind": "certificate"})
        return None


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.chain_pem)],
                                                     root_certificates=identity.authority_pem)
