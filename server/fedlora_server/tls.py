"""TLS at the server: its identity, which clients may take part, and who is at the other end of a stream.

Both are read again while the server runs: a renewed certificate is used from the next handshake on, and a client that
was taken off the list is disconnected within seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import grpc

from fedlora.identity import Certificate, Identity, parse_certificate, read_identity
from fedlora.identity.certificates import utc_now

from .pki.allow_list import AllowList

log = logging.getLogger(__name__)

CIPHER_SUITES = "ECDHE-RSA-AES128-GCM-SHA256"
"""gRPC has no option for the least version of TLS. A server with an ECDSA certificate and none of TLS 1.2's suites for
ECDSA can agree with nobody on TLS 1.2; TLS 1.3 has suites of its own, which this setting does not touch."""


def require_tls_1_3() -> None:
    """Have gRPC's servers in this process accept TLS 1.3 alone. Call it before gRPC is first used."""
    os.environ["GRPC_SSL_CIPHER_SUITES"] = CIPHER_SUITES


class ServerTls:
    """What a server needs for mutual TLS.

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

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for gRPC that read the identity again at each handshake."""
        return grpc.dynamic_ssl_server_credentials(_configuration(self._identity), self._renewed,
                                                   require_client_authentication=True)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            identity = read_identity(self._folder)
        except ValueError as error:
            log.warning("The renewed certificate cannot be used: %s. The one from before stays in use", error)
            return None
        if identity == self._identity:
            return None
        self._identity = identity
        return _configuration(identity)

    def why_refused(self, client: Certificate, now: datetime | None = None) -> str | None:
        """Return why a client may not take part, in words for it; None if it may.

        Args:
            client: its certificate.
            now: when it must be valid; None for this moment.
        """
        if why := client.why_invalid(now or utc_now()):
            return why
        if not self._allowed.allows(client.name, client.fingerprint):
            return (f"the certificate of {client.name} is not on the server's list of clients, or no longer; ask the "
                    "coordinator to run fedlora-server pki sign")
        return None


def client_certificate(context: grpc.ServicerContext) -> Certificate | None:
    """Return the certificate that the client of a stream has shown; None on a connection without TLS.

    Raises:
        ValueError: the certificate is not one that FedLoRA takes, or the connection is not TLS 1.3.
    """
    about: Mapping[str, list[bytes]] = context.auth_context()
    if "x509_pem_cert" not in about:
        return None
    if about.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise ValueError("the connection is not TLS 1.3")
    return parse_certificate(about["x509_pem_cert"][0])


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.chain_pem)],
                                                     root_certificates=identity.authority_pem)
