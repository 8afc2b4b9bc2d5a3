"""Whether an endpoint really answers: a completion, not a health page."""

from __future__ import annotations

from mistralctl.errors import Exit, UserError

PROMPT = "The capital of France is"


def complete(base_url: str, key: str, model: str, *, seconds: float = 300) -> str:
    """The text of one short completion; UserError if there is none within `seconds`."""
    import httpx

    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    try:
        answer = httpx.post(
            f"{base_url}/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=seconds,
            trust_env=False,
        )  # fmt: skip
        answer.raise_for_status()
        text = str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"the server does not answer at {base_url} ({error}); see mistralctl logs", Exit.SERVER) from error
    if not text.strip():
        raise UserError(f"the server at {base_url} answered with nothing; see mistralctl logs", Exit.SERVER)
    return text


def answers(base_url: str, key: str) -> bool:
    """Whether a server of ours takes this key now, without asking the model."""
    import httpx

    try:
        reply = httpx.get(f"{base_url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=5, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200
