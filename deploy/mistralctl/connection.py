"""HTTP to a deployment, through its tunnel or to its public address: the one place that knows how."""

from __future__ import annotations

import http.client
import ssl
from typing import TYPE_CHECKING, Any

from mistral_contract.keys import probe_token

from mistralctl import certificates, state
from mistralctl.errors import UserError
from mistralctl.state import Record

if TYPE_CHECKING:
    import httpx

PROBE_HEADER = "x-mistralctl-probe"


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


def status(record: Record, path: str, seconds: float, *, probing: bool) -> int | None:
    """The status that a GET with the deployment's own key has, None if nobody answers; `probing`: with the probe's token, too."""
    key = state.api_key(record.name)
    headers = {"Authorization": f"Bearer {key}"} | ({PROBE_HEADER: probe_token(key)} if probing else {})
    if record.public:
        import httpx

        try:
            with httpx.Client(headers=headers, timeout=seconds, **options(record)) as one:
                return one.get(path).status_code
        except (httpx.HTTPError, UserError):
            return None
    plain = http.client.HTTPConnection("127.0.0.1", record.port, timeout=seconds)  # to import httpx takes longer than the answer
    try:
        plain.request("GET", path, headers=headers)
        return plain.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        plain.close()


def client(record: Record, seconds: float, *, key: str | None = None) -> httpx.Client:
    """A client that shows a key (the deployment's own if none is given, none if it is empty) and the probe's token."""
    import httpx

    own = state.api_key(record.name)
    headers = {PROBE_HEADER: probe_token(own)}
    if key != "":
        headers["Authorization"] = f"Bearer {key or own}"
    return httpx.Client(headers=headers, timeout=seconds, **options(record))
