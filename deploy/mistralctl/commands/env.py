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

    @property
    def variables(self) -> dict[str, str]:
        """What clients read: OPENAI_API_BASE is older ones' name, and some (LiteLLM, llama-index) know no other. Three names of the file of
        authorities: OpenSSL's, that of Python's requests, and Node's."""
        found = {
            "OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key, "OPENAI_MODEL": self.model, "OPENAI_API_BASE": self.base_url,
        }  # fmt: skip
        if self.ssl_cert_file:
            found |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), self.ssl_cert_file)
        return found


def run(name: str) -> Client:
    """The client's side of a deployment; UserError if it is not up, or another program has its port."""
    record = state.known(name)
    tasks.kind(record.kind).require_endpoint(name)
    if record.state != "up":
        raise UserError(f"{name} is {record.state}; run {record.again} first", Exit.NOT_FOUND)
    from mistralctl import listeners

    listeners.check(record)
    trust = str(certificates.bundle_file(name)) if record.public else ""
    return Client(name, record.base_url, state.api_key(name), record.served_model_name, record.chat, trust)
