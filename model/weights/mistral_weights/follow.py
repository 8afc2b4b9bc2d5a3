"""`python -m mistral_weights.follow URI`: tells each version of an object, until standard input ends.

One JSON object a line after each look: `{"event": "object", "text": "..."}` for another version, `{"event": "same"}` for the one before,
`{"event": "problem", "message": "..."}` if it cannot be read. Every look is one conditional request.
"""

from __future__ import annotations

import json
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .errors import WeightsError
from .objects import SmallObject, open_object

SECONDS = 3.0


def looks(open_it: Callable[[], SmallObject]) -> Iterator[dict[str, Any]]:
    """What each look at the object says, without end."""
    opened: SmallObject | None = None
    known = ""
    while True:
        try:
            opened = opened or open_it()
            found = opened.get(known)
        except WeightsError as error:
            yield {"event": "problem", "message": str(error)}
        else:
            if found is not None:
                known = found.version
            yield {"event": "same"} if found is None else {"event": "object", "text": found.data.decode("utf-8", "replace")}


def main(uri: str, seconds: float = SECONDS) -> None:
    """Looks every few seconds."""
    for said in looks(lambda: open_object(uri)):
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        if select.select([sys.stdin], [], [], seconds)[0]:
            return


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(float, sys.argv[2:]))
    except (BrokenPipeError, KeyboardInterrupt):  # whoever listened is gone
        raise SystemExit(1) from None
