"""relay.py PID ADDRESS SERVICES: connects a node, which has a network of its own, with its cloud.

Towards the node: connections to ADDRESS on the ports that standard input names (a JSON list on each line; they replace those
of the line before). From the node: SERVICES, a JSON list of [address, port, the cloud's address, its port], to the cloud's loopback,
from ADDRESS, so that the cloud knows who asks. It ends with standard input. A socket belongs to the namespace it was made in,
and entering a namespace of networks is a thing of one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import linux

PIECE = 1 << 18
Address = tuple[str, int]


class Relay:
    def __init__(self, pid: int, address: str) -> None:
        self.address = address
        self.cloud = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.node = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        self.open: dict[int, socket.socket] = {}

    def socket_in(self, namespace: int) -> socket.socket:
        linux.setns(namespace, linux.NEW_NET)
        try:
            return socket.socket()
        finally:
            linux.setns(self.cloud, linux.NEW_NET)

    def serve(self, here: int, at: Address, there: int, to: Address, source: str | None = None) -> socket.socket:
        """Accepts connections at an address in one namespace and joins each to an address in the other.

        They come from `source` there, or from where they came from here.
        """
        listener = self.socket_in(here)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(at)
        listener.listen(256)

        def accept() -> None:
            while True:
                try:
                    client, (came, _) = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self.join, args=(client, there, to, source or came), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener

    def join(self, client: socket.socket, there: int, to: Address, source: str) -> None:
        server = self.socket_in(there)
        with client, server:
            try:
                server.bind((source, 0))
                server.connect(to)
            except OSError:
                return
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=pump, args=(server, client), daemon=True)
            back.start()
            pump(client, server)
            back.join()

    def set_ports(self, wanted: set[int]) -> None:
        for port in wanted - set(self.open):
            try:
                self.open[port] = self.serve(self.cloud, (self.address, port), self.node, (self.address, port))
            except OSError as error:
                sys.stderr.write(f"relay: port {port}: {error}\n")
        for port in set(self.open) - wanted:
            listener = self.open.pop(port)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def pump(source: socket.socket, target: socket.socket) -> None:
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(view[:count])
    for one, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            one.shutdown(how)


def main() -> None:
    linux.die_with_parent()
    relay = Relay(int(sys.argv[1]), sys.argv[2])
    for address, port, cloud_address, cloud_port in json.loads(sys.argv[3]):
        for attempt in range(200):  # the node may not have given itself the address yet
            try:
                relay.serve(relay.node, (address, port), relay.cloud, (cloud_address, cloud_port), relay.address)
                break
            except OSError:
                if attempt == 199:
                    raise
                time.sleep(0.05)
    for line in sys.stdin:
        relay.set_ports(set(json.loads(line)))


if __name__ == "__main__":
    main()
