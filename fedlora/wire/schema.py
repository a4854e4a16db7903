"""What both sides hold against each other when they meet: the protocol's number, and a digest of the .proto itself.

A number says what somebody meant, the digest what the code reads: a field that was added without raising the number
would be dropped in silence by whoever does not know it.
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
    """A .proto's messages and calls as text: what decides how bytes are read, and neither comments nor order."""
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
"""Of this version's .proto, 32 bytes. It changes with every field; raise `fedlora.plan.PROTOCOL` with it."""


def is_spoken(greeting: Greeting) -> bool:
    """Whether the other side reads and writes the very frames that this one does."""
    return (greeting.protocol, greeting.schema) == (PROTOCOL, SCHEMA)


def spoken_by(greeting: Greeting) -> str:
    """The other side's protocol, as a person compares it with `SPOKEN`."""
    return _named(greeting.protocol, greeting.schema)


def _named(protocol: int, schema: bytes) -> str:
    return f"protocol {protocol}, schema {schema[:4].hex() or 'unnamed'}"


SPOKEN = _named(PROTOCOL, SCHEMA)
"""This side's."""
