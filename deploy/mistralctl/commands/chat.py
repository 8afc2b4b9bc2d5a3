"""`mistralctl chat`: a question and its streamed answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mistralctl import connection, state
from mistralctl.commands.env import Client
from mistralctl.errors import Exit, UserError

MOST_TOKENS = 2048  # of one answer: a small model may not find its end


def ask(client: Client, messages: list[dict[str, str]]) -> Iterator[str]:
    """Pieces of the most probable answer as they come; a base model continues the last message instead.

    UserError if the server fails.
    """
    import openai

    options = connection.options(state.known(client.name))
    api = openai.OpenAI(
        base_url=f"{options.pop('base_url')}/v1",
        api_key=client.api_key,
        max_retries=1,
        http_client=openai.DefaultHttpxClient(timeout=600, **options),
    )
    try:
        if client.chat:
            asked: Any = messages
            for chunk in api.chat.completions.create(
                model=client.model, messages=asked, stream=True, max_tokens=MOST_TOKENS, temperature=0
            ):
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""
        else:
            prompt = messages[-1]["content"]
            for piece in api.completions.create(model=client.model, prompt=prompt, stream=True, max_tokens=256, temperature=0):
                if piece.choices:
                    yield piece.choices[0].text
    except openai.APIConnectionError as error:
        if isinstance(error.__cause__, UserError):  # of what was found before anything was sent
            raise error.__cause__ from None
        raise UserError(
            f"{client.name} does not answer at {client.base_url}; see mistralctl status {client.name}", Exit.SERVER
        ) from error
    except openai.APIError as error:
        raise UserError(f"{client.name} refused: {error.message}; see mistralctl logs {client.name}", Exit.SERVER) from error
