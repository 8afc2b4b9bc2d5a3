"""How fast servers on a CPU are beside a neighbour who computes, too.

Two servers of each kind, started as on a node (SmolLM2-135M): one kind with the waiting of threads that a node sets, one with libgomp's own. Both
of a kind are asked for the same number of tokens, one alone, then both at once, in turns with the other kind. Shown are tokens a second of both
together, and the ratio.

    python benchmarks/neighbours.py [--quick] [-o json]      # in the node's environment: make bench
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from hostile_requests import COMPLETIONS, GOOD, ask, served

KINDS = {"ours": {}, "libgomp's": {"GOMP_SPINCOUNT": "300000"}}  # its default, see its manual
TOKENS = 32


def answer(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    status, _ = ask(connection, COMPLETIONS, {"max_tokens": TOKENS, "ignore_eos": True}, GOOD)
    connection.close()
    if status != 200:
        raise RuntimeError(f"a server answered {status}")


def speed(ports: list[int]) -> float:
    """Tokens a second of these servers together, each of which has one request."""
    with ThreadPoolExecutor(len(ports)) as pool:
        began = time.monotonic()
        list(pool.map(answer, ports))
    return TOKENS * len(ports) / (time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three turns")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    options = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {kind: {1: [], 2: []} for kind in KINDS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports: dict[str, list[int]] = {}
        for kind, environ in KINDS.items():
            for number in range(2):
                (own := folder / f"{kind}-{number}").mkdir()
                ports.setdefault(kind, []).append(stack.enter_context(served(own, **environ)))
        for turn in range(4 if options.quick else 8):
            for kind in KINDS:
                for many in (1, 2):
                    got = speed(ports[kind][:many])
                    if turn:  # the first one warms up
                        found[kind][many].append(got)
    median = {kind: {many: statistics.median(speeds) for many, speeds in one.items()} for kind, one in found.items()}
    ratios = {many: median["ours"][many] / median["libgomp's"][many] for many in (1, 2)}
    if options.output == "json":
        print(json.dumps({"name": "neighbours", "tokens_per_second": median, "ratio": ratios}))
    else:
        for many, what in {1: "one server", 2: "two servers at once"}.items():
            told = ", ".join(f"{kind} {one[many]:6.1f}" for kind, one in median.items())
            print(f"{what:20} {told} tokens/s, {ratios[many]:.2f} times")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
