"""TLS to a server: its certificate is checked here, in words, and only that certificate is then trusted.

gRPC reports every failed handshake alike, and knows no pinned keys. So the client first shakes hands through Python's
`ssl`: TLS 1.3, the authority, the host name, and the key's fingerprint are checked, and the server shows whether it
takes this client's certificate. The gRPC channel that follows trusts that one certificate and no other, so that nothing
can change in between. Both are made anew for each connection, which takes up renewed certificates without a restart.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from fedlora.config import ClientConfig
from fedlora.identity import Certificate, Identity, parse_certificate, read_identity
from fedlora.identity.certificates import grouped, utc_now
from fedlora.identity.folder import CERTIFICATE, KEY
from fedlora.privacy import Policy
from fedlora.wire import is_loopback

HANDSHAKE_TIMEOUT_S = 10.0
AGAIN_AFTER_S = 0.5
"""Seconds after which a server that ended the connection in silence is asked once more: one that is being stopped does
so, too, and is gone then."""


class Untrusted(ValueError):
    """The server is not the one that this client may speak with, or does not take this client's certificate."""


class _Dropped(Exception):
    """The server ended the connection after the handshake without a word, as it does with a certificate it refuses."""


class Unreachable(OSError):
    """Nobody answered, or the connection broke during the handshake; it may be tried again."""


@dataclass(frozen=True)
class Tls:
    """How this client proves who it is, and whom it trusts.

    Attributes:
        folder: this client's identity (`fedlora.identity.folder`).
        servers: fingerprints of the server keys that the owner's policy allows; None allows every server whose
            certificate comes from the authority.
        proxy: host:port of an HTTP proxy to go through, or None.
        shown: each pair of certificates, this client's and the server's, by which a connection was begun so far. A
            renewal adds one.
    """

    folder: Path
    servers: Collection[str] | None = None
    proxy: str | None = None
    shown: list[tuple[Certificate, Certificate]] = field(default_factory=list, compare=False)

    def identity(self) -> Identity:
        """Read the identity as it is on the disk now.

        Raises:
            ValueError: a file is missing, damaged or open to others, or the certificate has expired.
        """
        return read_identity(self.folder)

    @property
    def options(self) -> tuple[tuple[str, int | str], ...]:
        """The channel options that have gRPC go through the proxy."""
        if self.proxy is None:
            return ()
        return ("grpc.enable_http_proxy", 1), ("grpc.http_proxy", f"http://{self.proxy}")

    def credentials(self, server: str) -> tuple[grpc.ChannelCredentials, Certificate]:
        """Check the server and return the credentials of a channel to it, with its certificate.

        Args:
            server: host:port.

        Raises:
            Untrusted: the server's certificate or key is not trusted, or the server refuses this client's certificate.
            Unreachable: nobody answered.
            ValueError: this client's identity cannot be used.
        """
        identity = self.identity()
        try:
            certificate = self._check(server, identity)
        except _Dropped:
            time.sleep(AGAIN_AFTER_S)
            try:
                certificate = self._check(server, identity)
            except _Dropped:
                raise _refused(server, identity) from None
        if (pair := (identity.certificate, certificate)) not in self.shown:
            self.shown.append(pair)
        return grpc.ssl_channel_credentials(certificate.pem, identity.key_pem, identity.chain_pem), certificate

    def _check(self, server: str, identity: Identity) -> Certificate:
        host, _, port = server.rpartition(":")
        host = host.strip("[]")
        context = self._context(identity)
        try:
            with (self._dial(host, int(port)) as plain,
                  context.wrap_socket(plain, server_hostname=host) as channel):
                certificate = parse_certificate(ssl.DER_cert_to_PEM_cert(channel.getpeercert(True) or b"").encode())
                self._check_certificate(server, certificate)
                if not channel.recv(1):  # HTTP/2's first frame comes at once where this client's certificate is taken
                    raise _Dropped
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(_why_untrusted(server, host, error)) from None
        except (ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
            raise _failed(server, identity, error) from None
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from None
        return certificate

    def _context(self, identity: Identity) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.hostname_checks_common_name = False  # the names that a server is called by stand in its SANs alone
        context.set_alpn_protocols(["h2"])
        context.load_verify_locations(cadata=identity.authority_pem.decode("ascii"))
        context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        return context

    def _check_certificate(self, server: str, certificate: Certificate) -> None:
        if self.servers is not None and certificate.fingerprint not in self.servers:
            raise Untrusted(f"the key of {server} is not one that the policy allows (server-fingerprints). Its "
                            f"fingerprint is {grouped(certificate.fingerprint)}; ask the coordinator by another way "
                            "whether that is right")
        if why := certificate.why_invalid(utc_now()):
            raise Untrusted(f"{server}: {why}")

    def _dial(self, host: str, port: int) -> socket.socket:
        if self.proxy is None:
            return socket.create_connection((host, port), HANDSHAKE_TIMEOUT_S)
        by_host, _, by_port = self.proxy.rpartition(":")
        plain = socket.create_connection((by_host.strip("[]"), int(by_port)), HANDSHAKE_TIMEOUT_S)
        try:
            target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            plain.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                piece = plain.recv(1)
                if not piece or len(answer) > 16384:
                    raise Unreachable(f"the proxy {self.proxy} gave no answer in HTTP")
                answer += piece
            status = answer.split(b"\r\n", 1)[0].decode("latin-1")
            if status.split(" ")[1:2] != ["200"]:
                raise Unreachable(f"the proxy {self.proxy} answered {status!r}")
        except BaseException:
            plain.close()
            raise
        return plain


def tls_of(options: ClientConfig, policy: Policy) -> Tls | None:
    """Return how the options of fedlora-client have the connection encrypted; None if they do not.

    Args:
        options: the options of fedlora-client.
        policy: the owner's policy, which may name the servers' keys.

    Raises:
        ValueError: the identity cannot be used, its name is not --name, or --proxy or the policy needs --tls.
    """
    if options.tls is None:
        if policy.server_fingerprints is not None:
            raise ValueError(f"the policy {policy.path} allows certain server keys alone (server-fingerprints), and "
                             "only --tls DIR shows which key a server has")
        if options.proxy is not None:
            raise ValueError(f"--proxy {options.proxy} could read a connection that is not encrypted; add --tls DIR")
        return None
    if options.proxy is not None:
        is_loopback(options.proxy)  # raises where it is not host:port
    tls = Tls(options.tls, policy.server_fingerprints, options.proxy)
    name = tls.identity().certificate.name
    if options.name not in (None, name):
        raise ValueError(f"--name {options.name} is not the name in the certificate, {name}; leave --name out")
    return tls


def _why_untrusted(server: str, host: str, error: ssl.SSLCertVerificationError) -> str:
    why = error.verify_message
    if "Hostname mismatch" in why or "IP address mismatch" in why:
        return (f"the certificate of {server} is not for {host}. Name the server as its certificate does, or ask the "
                f"coordinator for one with --host {host}")
    if "expired" in why:
        return f"the certificate of {server} has expired; ask the coordinator to renew it"
    if "not yet valid" in why:
        return f"the certificate of {server} is not valid yet; check this machine's clock"
    return (f"the certificate of {server} does not come from the authority in ca.pem ({why}); ask the coordinator for "
            "the right ca.pem, by another way than this connection")


def _refused(server: str, identity: Identity) -> Untrusted:
    return Untrusted(f"{server} does not take the certificate of {identity.certificate.name}; it comes from another "
                     "authority than the server's, or the server's clock is wrong. Ask the coordinator about the "
                     "clock; if it is right, send request.csr and put what comes back into certificate.pem")


def _failed(server: str, identity: Identity, error: OSError) -> Exception:
    """Return what a handshake failed by: a refused certificate, a server without TLS 1.3, or a broken connection."""
    reason = getattr(error, "reason", "") or ""
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
        return Untrusted(f"what listens at {server} does not speak TLS; it may be a server that was started without "
                         "--tls, or another program")
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return Untrusted(f"{server} does not speak TLS 1.3")
    if "ALERT" in reason:
        return _refused(server, identity)
    return Unreachable(f"the connection broke during the handshake ({reason or error})")
