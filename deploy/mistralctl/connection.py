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


class _Own(http.client.HTTPConnection):
    """A connection to a deployment's server or tunnel on this machine, and to no other program."""

    def __init__(self, record: Record, seconds: float) -> None:
        super().__init__("127.0.0.1", record.port, timeout=seconds)
        self._record = record

    def connect(self) -> None:
        from mistralctl import listeners

        super().connect()
        try:
            listeners.require_own(self.sock, self._record)
        except UserError:
            self.close()
            raise


def plain(record: Record, seconds: float) -> http.client.HTTPConnection:
    """A connection of the standard library, for many requests or one: to import httpx takes longer than the answer.

    Before anything is sent, listeners.Stranger if another program has the deployment's port.
    """
    return _Pinned(record, seconds) if record.public else _Own(record, seconds)


def options(record: Record) -> dict[str, Any]:
    """What an httpx client needs to reach a deployment, and no other program: its address, whom to trust, which name to expect."""
    if not record.public:
        from mistralctl import listeners

        def see(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                listeners.require_own(info["return_value"].get_extra_info("socket"), record)

        def watch(request: httpx.Request) -> None:
            request.extensions["trace"] = see

        trusting_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to read all authorities takes longer than the answer
        return {
            "base_url": f"http://127.0.0.1:{record.port}", "trust_env": False, "verify": trusting_nobody,
            "event_hooks": {"request": [watch]},
        }  # fmt: skip

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
