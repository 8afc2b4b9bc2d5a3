"""A throw-away authority and one certificate for the names of hosts that lead to simulated clouds.

It is trusted through the variables that clouds' tools read, inside a SimCloud and nowhere else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

AUTHORITY, SERVER = "authority.pem", "server.pem"
# Python's requests and ssl, curl, Google's httplib2, gRPC.
VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE", "HTTPLIB2_CA_CERTS", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")


def make(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Writes the authority's certificate and, with its key, the server's; returns the variables by which the laptop trusts it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder.mkdir(exist_ok=True)
    now = datetime.now(timezone.utc)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated clouds")])

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        draft = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        draft = draft.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
        draft = draft.not_valid_after(now + timedelta(days=90)).add_extension(extension, critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
        draft = draft.add_extension(identifier, critical=False).add_extension(authority, critical=False)
        return draft.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (folder / AUTHORITY).write_bytes(certificate(issuer, keys[0], x509.BasicConstraints(ca=True, path_length=0)))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a simulated cloud")])
    for_names = x509.SubjectAlternativeName([*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    private = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip
    (folder / SERVER).write_bytes(private + certificate(subject, keys[1], for_names))
    return dict.fromkeys(VARIABLES, str(folder / AUTHORITY))
