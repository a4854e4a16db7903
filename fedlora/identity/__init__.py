"""Who is at the other end: keys, certificates and their fingerprints, for mutual TLS between institutions.

The common name of a client's certificate is the client's name. Keys are P-256, because gRPC's TLS takes no Ed25519
certificate, and never leave the machine that made them.
"""

from fedlora.identity.certificates import Certificate, fingerprint, parse_certificate
from fedlora.identity.folder import Identity, make_request, read_identity

__all__ = ["Certificate", "Identity", "fingerprint", "make_request", "parse_certificate", "read_identity"]
