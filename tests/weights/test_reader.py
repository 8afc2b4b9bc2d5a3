"""The fast reader over TLS, and what it does with answers that it does not know."""

from __future__ import annotations

import datetime
import ipaddress
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import hub as hubs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mistral_weights.address import Address
from mistral_weights.digests import blake3_of
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.http_reader import HttpReader, Links
from mistral_weights.patience import Patience
from mistral_weights.secrets import Secrets
from mistral_weights.stores import Link, Opening, StoredFile
from mistral_weights.stores.file import FileStore, open_store


def _certificate(folder: Path) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


@contextmanager
def _serving(data: bytes, certificate: Path | None = None, chunked: bool = False) -> Iterator[str]:
    """The URL of a server whose every answer is a range of `data`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = hubs.Server(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/file"
    server.shutdown()
    server.server_close()


class _Linked(FileStore):
    """A folder whose files have a link, too."""

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        self.url = url

    def link(self, file: StoredFile) -> Link | None:
        return Link(self.url)


DATA = random.Random(1).randbytes(3_000_001)


def _read(url: str, folder: Path, patience: Patience, start: int, stop: int) -> bytes:
    (folder / "file").write_bytes(b"!" * len(DATA))
    store = _Linked(folder, url)
    reader = HttpReader(store, Links(store), patience)
    buffer = bytearray(stop - start)
    for _ in range(2):  # the second time on the connection that was kept
        assert reader.read_into(store.stored("file"), start, memoryview(buffer)) == blake3_of(buffer)
    reader.close()
    return bytes(buffer)


def test_ranges_over_tls(tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = _certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with _serving(DATA, certificate) as url:
        for start, stop in ((0, len(DATA)), (5, 6), (1_000_000, 2_999_999)):
            assert _read(url, tmp_path, patience, start, stop) == DATA[start:stop]


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, patience: Patience) -> None:
    with (
        _serving(DATA, _certificate(tmp_path)) as url,
        pytest.raises(WeightsError, match="is not trusted .* SSL_CERT_FILE") as caught,
    ):
        _read(url, tmp_path, patience, 0, 10)
    assert caught.value.kind is Kind.REFUSED


def test_an_answer_in_chunks_goes_the_plain_way(tmp_path: Path, patience: Patience) -> None:
    with _serving(DATA, chunked=True) as url:
        assert _read(url, tmp_path, patience, 0, 1000) == b"!" * 1000


def test_closing_wakes_a_reader_that_waits(tmp_path: Path, patience: Patience) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
    (tmp_path / "file").write_bytes(b"!" * 100)
    store = _Linked(tmp_path, url)
    reader = HttpReader(store, Links(store), replace(patience, stall=30.0))
    threading.Timer(0.2, reader.close).start()
    with pytest.raises(WeightsError) as caught:
        reader.read_into(store.stored("file"), 0, memoryview(bytearray(100)))
    assert caught.value.kind is Kind.UNREACHABLE
    listener.close()


def test_a_folder_is_a_store(tmp_path: Path, patience: Patience) -> None:
    store = open_store(Address("file", str(tmp_path)), Opening(Secrets(), tmp_path, patience))
    assert store.link(StoredFile("a", 1, "v")) is None
