"""What an evaluation is told, on standard input as JSON: the key of a server is on no command line and in no environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mistral_evaluate.errors import EvaluateError


@dataclass(frozen=True)
class Address:
    """A server: `url` without /v1; where it has TLS, the file with the one `certificate` to trust, and the `host` in it, if it is not the url's."""

    url: str
    key: str
    model: str
    certificate: str = ""
    host: str = ""


@dataclass(frozen=True)
class Job:
    """An evaluation of one served model.

    `identity` is all that an answer depends on besides its request: weights, revision, adapter, engine, dtype. `tokenizer` is a folder with the
    model's tokenizer, `mode` the server's --tokenizer-mode; `context` are the tokens that prompt and answer have together. `concurrency` is how
    many requests are asked at a time at most. `limit` takes so many items of each task; None: all.
    """

    address: Address
    identity: Mapping[str, Any]
    tokenizer: Path
    mode: str
    context: int
    concurrency: int
    tasks: tuple[str, ...]
    journal: Path
    limit: int | None = None

    def dump(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self) | {"tokenizer": str(self.tokenizer), "journal": str(self.journal)})


def read(text: str) -> Job:
    """Return the job in a text; EvaluateError if it is none."""
    try:
        found = json.loads(text)
        known = {one.name: found[one.name] for one in fields(Job) if one.name in found}
        paths = {"tokenizer": Path(known["tokenizer"]), "journal": Path(known["journal"])}
        return Job(**(known | paths | {"address": Address(**known["address"]), "tasks": tuple(known["tasks"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluateError(f"standard input holds no job ({error}); start it by mistralctl eval") from None
