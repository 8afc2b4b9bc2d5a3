"""Certificates of public deployments: which of the user's own are taken, and what a client trusts."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from mistral_node.tls import self_signed
from mistralctl import certificates, connection, state
from mistralctl.config import load
from mistralctl.errors import UserError
from mistralctl.spec import DeploymentSpec
from mistralctl.state import Record


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(tmp_path / "home"))


def files(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """A certificate for these names and its key, in two files."""
    folder.mkdir(exist_ok=True)
    key, certificate = self_signed(names)
    (folder / "cert.pem").write_text(certificate)
    (folder / "key.pem").write_text(key)
    return folder / "cert.pem", folder / "key.pem"


def spec(cert: Path | str, key: Path | str) -> DeploymentSpec:
    return load({"public": True, "cert": str(cert), "key": str(key)}, {}, None).spec


def test_the_users_own(tmp_path: Path) -> None:
    cert, key = files(tmp_path / "own", ["llm.example.org", "203.0.113.7"])
    found = certificates.own(spec(cert, key))
    assert (found.host, found.chain, found.key) == ("llm.example.org", cert.read_text(), key.read_text())
    assert len(found.id) == 12
    assert "PRIVATE KEY" not in repr(found)
    assert certificates.own(spec(*files(tmp_path / "ip", ["203.0.113.7"]))).host == "203.0.113.7"


def test_what_is_refused(tmp_path: Path) -> None:
    cert, key = files(tmp_path / "own", ["llm.example.org"])
    _, other = files(tmp_path / "other", ["llm.example.org"])
    wild, wild_key = files(tmp_path / "wild", ["*.example.org"])
    (tmp_path / "noise").write_text("noise")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    os.mkfifo(tmp_path / "pipe")
    for given, why in (
        ((cert, other), "are not a certificate and its private key"), ((tmp_path / "noise", key), "are not a certificate"),
        ((tmp_path / "missing", key), "No such file"), ((tmp_path / "binary", key), "both should be readable PEM files"),
        ((wild, wild_key), r"names no single host, only \*\.example\.org"),
        ((Path("/dev/zero"), key), "/dev/zero is no plain file"), ((cert, tmp_path / "pipe"), "pipe is no plain file"),
        ((tmp_path / "large", key), "is larger than 1 MiB"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            certificates.own(spec(*given))


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = files(tmp_path / "own", ["llm.example.org"])
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"word")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(UserError, match="is locked by a passphrase"):
        certificates.own(spec(cert, key))


@contextmanager
def serving(cert: Path, key: Path) -> Iterator[int]:
    """A server with a certificate that says 200 to each of its connections; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                client, _ = listener.accept()
                with context.wrap_socket(client, server_side=True) as safe:
                    safe.recv(65536)
                    safe.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=run, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()


def record(port: int, host: str = "") -> Record:
    return Record("pinned", "aws", "up", "m", "m", port, "~", "id", 0.0, public=True, address="127.0.0.1", host=host)


def test_only_the_pinned_certificate_is_trusted(tmp_path: Path) -> None:
    cert, key = files(tmp_path / "own", ["127.0.0.1"])
    other = files(tmp_path / "other", ["127.0.0.1"])
    certificates.pin("pinned", cert.read_text())
    with serving(cert, key) as port, connection.client(record(port), 300) as client:
        assert client.get("/").status_code == 200
        assert record(port).base_url == f"https://127.0.0.1:{port}/v1"
    with (
        serving(*other) as port,
        connection.client(record(port), 300) as client,
        pytest.raises(httpx.ConnectError, match="certificate"),
    ):
        client.get("/")


def test_a_name_in_the_certificate_is_what_clients_expect_wherever_the_machine_is(tmp_path: Path) -> None:
    cert, key = files(tmp_path / "own", ["llm.example.org"])
    certificates.pin("pinned", cert.read_text())
    with serving(cert, key) as port:
        with connection.client(record(port, "llm.example.org"), 300) as client:
            assert client.get("/").status_code == 200
        with connection.client(record(port), 300) as client, pytest.raises(httpx.ConnectError, match="certificate"):
            client.get("/")
        assert record(port, "llm.example.org").base_url == f"https://llm.example.org:{port}/v1"


def test_other_clients_trust_it_beside_the_systems_authorities_also_by_the_strictest_rules(tmp_path: Path) -> None:
    cert, key = files(tmp_path / "own", ["127.0.0.1"])
    certificates.pin("pinned", cert.read_text())
    bundle = certificates.bundle_file("pinned")
    assert bundle.read_text().count("BEGIN CERTIFICATE") > 50
    assert [path.stat().st_mode & 0o777 for path in (bundle, certificates.server_file("pinned"))] == [0o600, 0o600]
    context = ssl.create_default_context(cafile=str(bundle))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    with serving(cert, key) as port:
        assert httpx.get(f"https://127.0.0.1:{port}/", verify=context, trust_env=False, timeout=300).status_code == 200


def test_what_is_no_certificate_is_not_pinned() -> None:
    with pytest.raises(UserError, match="has no certificate that can be read"):
        certificates.pin("pinned", "")
    assert not certificates.bundle_file("pinned").exists()
    assert not (state.folder("pinned")).exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"cloud": ["local"], "public": True}, "--public: --cloud local serves this machine alone"),
        ({"allow": ["203.0.113.0/24"]}, "--allow: means nothing without --public"),
        ({"cert": "a.pem", "key": "b.pem"}, "--cert: means nothing without --public"),
        ({"public": True, "cert": "a.pem"}, "--cert: needs --key as well"),
        ({"public": True, "key": "a.pem"}, "--key: needs --cert as well"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, object], why: str) -> None:
    from mistralctl import checkpoints, plan

    sourced = load(given, {}, None)
    with pytest.raises(UserError) as caught:
        plan.make(sourced, checkpoints.resolve(sourced), None)
    assert str(caught.value).startswith(why)


def test_a_network_is_checked() -> None:
    with pytest.raises(UserError, match=r"'203\.0\.113\.7/24' is not a network; write for example"):
        load({"public": True, "allow": ["203.0.113.7/24"]}, {}, None)
    assert load({"public": True, "allow": ["198.51.100.7", "198.51.100.7/32"]}, {}, None).spec.allow == ("198.51.100.7/32",)
