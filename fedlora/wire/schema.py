"""The protocol's identity, which both sides compare when they meet: its number, and a digest of the .proto file.

The number is set by hand; the digest follows from the code. It catches a field that somebody added without raising the
number: the other side would drop such a field silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

from fedlora.plan import PROTOCOL

from . import fedlora_pb2 as pb


class Greeting(Protocol):
    """A Join or a Welcome."""

    protocol: int
    schema: bytes


def canonical(file: FileDescriptor) -> str:
    """Return a .proto file's messages and calls as text.

    The text has all that decides how bytes are read. It has neither comments nor the order of the file.
    """
    return "".join(f"{line}\n" for line in sorted(_lines(file)))


def _lines(file: FileDescriptor) -> Iterator[str]:
    for message in file.message_types_by_name.values():
        yield from _message(message)
    for enum in file.enum_types_by_name.values():
        yield from _enum(enum)
    for service in file.services_by_name.values():
        for method in service.methods:
            yield (f"{service.full_name} {method.name} {method.input_type.full_name} {method.client_streaming} "
                   f"{method.output_type.full_name} {method.server_streaming}")


def _message(message: Descriptor) -> Iterator[str]:
    yield message.full_name
    for field in message.fields:
        named = field.message_type or field.enum_type
        kind = named.full_name if named else f"type {field.type}"
        label = "repeated" if field.is_repeated else "optional" if field.has_presence else "always"
        one_of = field.containing_oneof.name if field.containing_oneof else "-"
        yield f"{message.full_name} {field.number:05} {field.name} {kind} {label} {one_of}"
    for nested in message.nested_types:
        yield from _message(nested)
    for enum in message.enum_types:
        yield from _enum(enum)


def _enum(enum: EnumDescriptor) -> Iterator[str]:
    for value in enum.values:
        yield f"{enum.full_name} {value.number} {value.name}"


SCHEMA = hashlib.sha256(canonical(pb.DESCRIPTOR).encode()).digest()
"""SHA-256 of this version's .proto in canonical form, 32 bytes. Every change of a field changes it; raise
`fedlora.plan.PROTOCOL` with it."""


def is_spoken(greeting: Greeting) -> bool:
    """Return whether the other side has exactly this version's protocol."""
    return (greeting.protocol, greeting.schema) == (PROTOCOL, SCHEMA)


def spoken_by(greeting: Greeting) -> str:
    """Return the other side's protocol as text, for a message beside `SPOKEN`."""
    return _named(greeting.protocol, greeting.schema)


def _named(protocol: int, schema: bytes) -> str:
    return f"protocol {protocol}, schema {schema[:4].hex() or 'unnamed'}"


SPOKEN = _named(PROTOCOL, SCHEMA)
"""This side's protocol as text, for messages."""
