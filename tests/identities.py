"""Identities for tests of mutual TLS: clients that an authority has signed, and channels that show a certificate."""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc

from fedlora.identity import make_request
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY
from fedlora.plan import RunPlan
from fedlora_client.connection import Connection
from fedlora_client.tls import Tls
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.authority import Authority


def enrolled(authority: Authority, folder: Path, name: str = "north", trusts: Authority | None = None,
             **options) -> Path:
    """Return the folder of a client that the authority has signed, which trusts the same or another one."""
    issued = authority.sign(make_request(folder, name), **options)
    (folder / CERTIFICATE).write_bytes(issued.pem)
    shutil.copy((trusts or authority).folder / AUTHORITY, folder / AUTHORITY)
    return folder


def connected(engine: GrpcEngine, folder: Path, name: str = "north", *, report=lambda line: None,
              **options) -> Connection:
    """Return a connection of this name to the engine, which shows the folder's certificate. `options` are `Tls`'s."""
    return Connection(engine.address, name, private=True, tls=Tls(folder, **options), connect_timeout_s=3,
                      report=report)


def joined(engine: GrpcEngine, folder: Path, name: str = "north", **options) -> RunPlan:
    """Join and leave; return the plan that the server told."""
    connection = connected(engine, folder, name, **options)
    try:
        return connection.join().plan
    finally:
        connection.leave()


def channel_of(address: str, folder: Path, options=()) -> grpc.Channel:
    """Return a channel that shows the certificate of a client's folder, without any check of this client's own."""
    authority, key, chain = ((folder / name).read_bytes() for name in (AUTHORITY, KEY, CERTIFICATE))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options=options)
