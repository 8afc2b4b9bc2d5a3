"""`mistralctl env`: what a client of the OpenAI API needs."""

from __future__ import annotations

from dataclasses import dataclass

from mistralctl import certificates, state, tasks
from mistralctl.errors import Exit, UserError


@dataclass(frozen=True)
class Client:
    """Endpoint, key and model of a deployment that is up; `ssl_cert_file` is what to trust where it is public, else empty."""

    name: str
    base_url: str
    api_key: str
    model: str
    chat: bool
    ssl_cert_file: str = ""


def run(name: str) -> Client:
    """The client's side of a deployment; UserError if it is not up, or another program has its port."""
    record = state.known(name)
    tasks.kind(record.kind).require_endpoint(name)
    if record.state != "up":
        raise UserError(f"{name} is {record.state}; run mistralctl up {record.model} --name {name} first", Exit.NOT_FOUND)
    from mistralctl import listeners

    listeners.check(record)
    trust = str(certificates.bundle_file(name)) if record.public else ""
    return Client(name, record.base_url, state.api_key(name), record.served_model_name, record.chat, trust)
