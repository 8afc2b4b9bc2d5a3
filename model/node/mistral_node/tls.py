"""A key and a certificate that a node makes for itself; the laptop fetches the certificate over SSH and trusts it alone."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from mistral_contract import files

DAYS = 365
# TLS 1.2 with forward secrecy and authenticated encryption; those of TLS 1.3 are good as they are, and there is nothing below 1.2.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def self_signed(names: list[str]) -> tuple[str, str]:
    """Private key and certificate, both PEM, for these addresses and host names, good for a year."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mistralctl")])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a laptop's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip
    return private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


def trusting(certificate: str) -> ssl.SSLContext:
    """What a client on this very machine needs: this certificate and no other, whatever names are in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context


def served(folder: Path) -> ssl.SSLContext:
    """What the server shows: the key and the certificate in the folder that it shares with the launcher."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(folder / files.CERTIFICATE.name, folder / files.PRIVATE_KEY.name)
    context.set_ciphers(CIPHERS)
    return context
