"""Whether an endpoint really answers: a completion, not a health page."""

from __future__ import annotations

from mistralctl import connection
from mistralctl.errors import Exit, UserError
from mistralctl.state import Record

PROMPT = "The capital of France is"


def complete(record: Record, *, seconds: float = 300) -> str:
    """The text of one short completion; UserError if there is none within `seconds`."""
    import httpx

    body = {"model": record.served_model_name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    try:
        with connection.client(record, seconds) as client:
            answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        text = str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"the server does not answer at {record.base_url} ({error}); see mistralctl logs", Exit.SERVER) from error
    if not text.strip():
        raise UserError(f"the server at {record.base_url} answered with nothing; see mistralctl logs", Exit.SERVER)
    return text


def answers(record: Record, key: str = "") -> bool:
    """Whether a server of ours takes this deployment's key now, or the one that is given, without asking the model."""
    return connection.status(record, "/v1/models", 5, key) == 200


def reached(record: Record) -> bool:
    """Whether a server of ours is there, open or still closed."""
    return connection.status(record, "/health", 5) in (200, 503)


def refusal(record: Record) -> str:
    """Why a server refuses this machine itself, where it says so; empty if it does not."""
    import httpx

    try:
        with connection.client(record, 5) as client:
            answer = client.get("/v1/models")
        return str(answer.json()["error"]["message"]) if answer.status_code == 403 else ""
    except (httpx.HTTPError, UserError, ValueError, KeyError, TypeError):
        return ""
