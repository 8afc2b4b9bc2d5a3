"""Certificates of public deployments: the user's own, those that nodes make, and what clients trust."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mistralctl import own_files, state
from mistralctl.errors import Exit, UserError

if TYPE_CHECKING:
    from mistralctl.spec import DeploymentSpec

# Where systems keep the authorities that they trust; certifi's copy, which comes with httpx, is the last resort.
SYSTEMS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

LARGEST_PEM = 1 << 20


@dataclass(frozen=True)
class Certificate:
    """The user's own: its chain and private key as PEM, the name in it by which clients shall ask, and a hash of it."""

    chain: str
    key: str = field(repr=False)
    host: str
    id: str


def _pem(path: Path) -> str:
    """The text of a file; OSError or ValueError if it is none that can be PEM."""
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise ValueError(f"{path} is no plain file")
    with path.open("rb") as file:
        data = file.read(LARGEST_PEM + 1)
    if len(data) > LARGEST_PEM:
        raise ValueError(f"{path} is larger than 1 MiB")
    return data.decode("ascii")


def own(spec: DeploymentSpec) -> Certificate:
    """What --cert and --key name; UserError if they cannot be read, do not belong together, or name no host."""
    from mistralctl.tasks import digest

    cert, key = Path(spec.cert or "").expanduser(), Path(spec.key or "").expanduser()
    try:
        chain, private = _pem(cert), _pem(key)
    except (OSError, ValueError) as error:
        raise UserError(f"--cert, --key: {error}; both should be readable PEM files") from error

    def locked() -> str:
        raise UserError(f"--key: {key} is locked by a passphrase; a server cannot type it, give one without")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, locked)
    except (ssl.SSLError, OSError) as error:
        raise UserError(f"--cert, --key: {cert} and {key} are not a certificate and its private key ({error})") from error
    from cryptography import x509

    try:
        names = (
            x509.load_pem_x509_certificate(chain.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except (x509.ExtensionNotFound, ValueError) as error:
        raise UserError(f"--cert: {cert} names no host (subjectAltName); make one that does") from error
    hosts = [name for name in names.get_values_for_type(x509.DNSName) if "*" not in name]
    hosts += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    if not hosts:
        raise UserError(f"--cert: {cert} names no single host, only {', '.join(names.get_values_for_type(x509.DNSName))}")
    return Certificate(chain, private, hosts[0], digest([chain, private]))


def server_file(name: str) -> Path:
    """The certificate of a deployment, as it was fetched over SSH."""
    return state.folder(name) / "server.crt"


def bundle_file(name: str) -> Path:
    """What SSL_CERT_FILE of a deployment's clients names: the system's authorities and the deployment's certificate."""
    return state.folder(name) / "ca.pem"


def _systems() -> str:
    given = ssl.get_default_verify_paths().cafile
    for file in (given, *SYSTEMS):
        if file and Path(file).is_file() and Path(file).stat().st_size:
            return Path(file).read_text("utf-8", "replace")
    import certifi

    return Path(certifi.where()).read_text("utf-8")


def pin(name: str, certificate: str) -> None:
    """Keeps what a deployment's server shows, as it was read over SSH; UserError if that is no certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"{name}: its server has no certificate that can be read ({error}); see mistralctl logs {name}", Exit.SERVER
        ) from error
    state.write_private(server_file(name), certificate)
    state.write_private(bundle_file(name), f"{_systems().rstrip()}\n{certificate}")


def context(name: str) -> ssl.SSLContext:
    """What our own requests trust: this deployment's certificate and no other, for the name that is in it."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    found.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    own_files.require(server_file(name))
    try:
        found.load_verify_locations(server_file(name))
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"{name}: {server_file(name)} cannot be read ({error}); run {state.again(name)} again", Exit.CONFLICT
        ) from error
    return found
