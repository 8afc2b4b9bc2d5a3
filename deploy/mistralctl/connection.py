"""HTTP to a deployment, through its tunnel or to its public address: the one place that knows how."""

from __future__ import annotations

import http.client
import ssl
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mistralctl import certificates, state
from mistralctl.errors import UserError
from mistralctl.state import Record

if TYPE_CHECKING:
    import httpx


class _Pinned(http.client.HTTPSConnection):
    """TLS to a deployment's address, with its own certificate, whichever name is in it."""

    def __init__(self, record: Record, seconds: float) -> None:
        super().__init__(record.address, record.port, timeout=seconds)
        self._trusted, self._name = certificates.context(record.name), record.host or record.address

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._trusted.wrap_socket(self.sock, server_hostname=self._name)


def plain(record: Record, seconds: float) -> http.client.HTTPConnection:
    """A connection of the standard library, for many requests or one: to import httpx takes longer than the answer."""
    if record.public:
        return _Pinned(record, seconds)
    return http.client.HTTPConnection("127.0.0.1", record.port, timeout=seconds)


def options(record: Record) -> dict[str, Any]:
    """What an httpx client needs to reach a deployment: its address, whom to trust, which name to expect."""
    if not record.public:
        trusting_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to read all authorities takes longer than the answer
        return {"base_url": f"http://127.0.0.1:{record.port}", "trust_env": False, "verify": trusting_nobody}

    def expect(request: httpx.Request) -> None:
        request.extensions["sni_hostname"] = record.host

    return {
        "base_url": f"https://{record.address}:{record.port}", "trust_env": False, "verify": certificates.context(record.name),
        "event_hooks": {"request": [expect] if record.host else []},
    }  # fmt: skip


def status(record: Record, path: str, seconds: float, key: str = "") -> int | None:
    """The status that a GET with a key has, the deployment's own if none is given; None if nobody answers."""
    try:
        with closing(plain(record, seconds)) as one:
            one.request("GET", path, headers={"Authorization": f"Bearer {key or state.api_key(record.name)}"})
            return one.getresponse().status
    except (OSError, http.client.HTTPException, UserError):
        return None


def client(record: Record, seconds: float) -> httpx.Client:
    """A client that shows the deployment's own key."""
    import httpx

    headers = {"Authorization": f"Bearer {state.api_key(record.name)}"}
    return httpx.Client(headers=headers, timeout=seconds, **options(record))
