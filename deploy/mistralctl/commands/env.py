"""`mistralctl env`: what a client of the OpenAI API needs."""

from __future__ import annotations

from dataclasses import dataclass

from mistralctl import state
from mistralctl.errors import Exit, UserError


@dataclass(frozen=True)
class Client:
    """Endpoint, key and model of a deployment that is up."""

    name: str
    base_url: str
    api_key: str
    model: str
    chat: bool


def run(name: str) -> Client:
    """The client's side of a deployment; UserError if it is not up."""
    record = state.known(name)
    if record.state != "up":
        raise UserError(f"{name} is {record.state}; run mistralctl up {record.model} --name {name} first", Exit.NOT_FOUND)
    return Client(name, record.base_url, state.api_key(name), record.served_model_name, record.chat)
