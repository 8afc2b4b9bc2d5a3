"""Who holds connections to this server: how many, for how long, and which of them goes when there are too many.

A connection that has shown a key is proven. All others are strangers', whose number is bounded. When one too many comes, the oldest one
goes, of the address that holds the most: whoever asks at once is served, also from the address of an attack. Behind an SSH tunnel all
callers have the loopback's.
"""

from __future__ import annotations

import functools
import ipaddress
import resource
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

HEAD_SECONDS = 20.0  # a TLS handshake and a request's head: four round trips, and two lost packets that are sent again (3 + 6 s)
# So that a client that still sends reads the answer before it hears that nobody listens: one round trip around the world is 0.3 s.
LINGER_SECONDS, LINGER_BYTES = 0.5, 64 << 10
# A client that takes less than this of its answer in so many seconds does not read it; a modem of 1990 is faster.
STALLED_SECONDS, STALLED_BYTES = 60.0, 16 << 10
LARGEST_PATH = 8 << 10  # the most that RFC 9110 (4.1) asks of a server, and far more than any route here
# Bytes of a request that are not its body: path, headers (the guard takes 16 KiB), trailers; and the lengths of chunks, at most 8 for each byte.
LARGEST_HEAD, FRAMING = 32 << 10, 8
MOST_PIPELINED = 16  # no client of the OpenAI API sends a request before it has the last answer
# Strangers' connections: a client that connects has to send its request before so many others have connected. At 2,200 a second, which one
# attacker reached here, that is half a second. One costs 20 kB, and at most LARGEST_HEAD more while its head comes.
STRANGERS, STRANGERS_OF_AN_ADDRESS = 1024, 256
# All connections. vLLM runs at most 1,024 sequences at once and queues the rest, so a client loses nothing with more.
CONNECTIONS = 4096
OWN_FILES = 512  # descriptors of vLLM itself: 110 on a CPU, and some for each GPU


class Connection(Protocol):
    """What is counted; `drop` ends it now, without a word."""

    def drop(self, why: str) -> None: ...


Address = ipaddress.IPv4Address | ipaddress.IPv6Network | None


@functools.lru_cache(STRANGERS)
def holder(host: str | None) -> Address:
    """Who an address belongs to: a network of 64 bits is one customer's. None is this machine, where everybody may be behind a tunnel.

    >>> holder("2001:db8::17"), holder("::ffff:203.0.113.9"), holder("127.0.0.1")
    (IPv6Network('2001:db8::/64'), IPv4Address('203.0.113.9'), None)
    """
    address = ipaddress.ip_address((host or "127.0.0.1").partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback:
        return None
    return address if isinstance(address, ipaddress.IPv4Address) else ipaddress.IPv6Network((address, 64), strict=False)


def allowed_files() -> int:
    """How many files this process may open, after it has asked for as many as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OWN_FILES
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return CONNECTIONS + OWN_FILES if soft == resource.RLIM_INFINITY else max(soft, wanted)


class Held:
    """All connections of a server, and how many requests and connections were refused, by the reason.

    `files` is how many files the process may open: there are fewer connections, as a listener without a free one closes for ever.
    """

    def __init__(self, files: int = CONNECTIONS + OWN_FILES, context: ssl.SSLContext | None = None) -> None:
        self.context = context
        self.refused: Counter[str] = Counter()
        self._most = min(CONNECTIONS, max(files - OWN_FILES, files // 2))
        self._strangers = min(STRANGERS, self._most // 2)
        self._holders: dict[Connection, Address] = {}
        self._waiting: dict[Address, OrderedDict[Connection, None]] = {}
        self._waiting_count = 0
        self._proven: OrderedDict[Connection, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, connection: Connection, host: str | None) -> None:
        """Counts a new connection, and drops what is then too much."""
        address = holder(host)
        queue = self._waiting.setdefault(address, OrderedDict())
        queue[connection] = None
        self._holders[connection] = address
        self._waiting_count += 1
        if address is not None and len(queue) > STRANGERS_OF_AN_ADDRESS:
            self._drop(next(iter(queue)), "too many connections of an address")
        elif self._waiting_count > self._strangers or len(self._holders) > self._most:
            longest = max(self._waiting.values(), key=len)
            self._drop(next(iter(longest)), "too many connections")

    def prove(self, connection: Connection) -> None:
        """Notes that a connection has shown a key: no stranger's takes its place."""
        if connection in self._holders and connection not in self._proven:
            self._wait_no_more(connection)
            self._proven[connection] = None

    def remove(self, connection: Connection) -> None:
        """Counts a connection no more."""
        if connection in self._proven:
            del self._proven[connection]
        elif connection in self._holders:
            self._wait_no_more(connection)
        self._holders.pop(connection, None)

    def _wait_no_more(self, connection: Connection) -> None:
        address = self._holders[connection]
        queue = self._waiting[address]
        del queue[connection]
        self._waiting_count -= 1
        if not queue:
            del self._waiting[address]

    def _drop(self, connection: Connection, why: str) -> None:
        self.remove(connection)
        connection.drop(why)


# In a request's `extensions`, a function: the guard calls it when it lets a request in.
LET_IN = "mistral_node.let_in"
# In the state of the application's lifespan: its `Held`.
HELD = "mistral_node.held"


def let_in(scope: Any) -> None:
    """Tells the connection of a request that it has shown a key."""
    told: Callable[[], None] | None = scope.get("extensions", {}).get(LET_IN)
    if told is not None:
        told()
