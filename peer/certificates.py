"""The TLS certificate of one process: self-signed P-256, made at its start, its key never leaves memory.

It proves nothing by itself. Whoever dials trusts exactly the certificate that the member's signed record names: gRPC's
TLS refuses Ed25519 certificates, so the identity cannot be the certificate.
"""

import hashlib
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

SERVER_NAME = "swarmoe"
"""Every certificate's name, whatever the address: the pin says who it is."""

# The pin is the validity: a wrong clock at either end must not keep two members apart.
_NOT_BEFORE = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, 4.1.2.5: no expiry


@dataclass(frozen=True)
class Certificate:
    """A certificate with its private key."""

    der: bytes
    private_key_pem: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)  # its own root
            .sign(key, hashes.SHA256())
        )
        private_key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(certificate.public_bytes(serialization.Encoding.DER), private_key_pem)

    @property
    def pem(self) -> bytes:
        return pem_of(self.der)

    @property
    def sha256(self) -> bytes:
        return sha256_of(self.der)


def pem_of(certificate_der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(certificate_der).encode()


def sha256_of(certificate_der: bytes) -> bytes:
    return hashlib.sha256(certificate_der).digest()
