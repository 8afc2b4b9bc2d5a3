"""outside.py ports ADDRESS | routes URL CERTIFICATES KEY | tls ADDRESS PORT: what a stranger on the internet sees of a machine.

Run in the simulated clouds' network, with the laptop's Python; prints JSON.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import sys


def ports(address: str) -> list[int]:
    """Every TCP port that accepts a connection; one after the other, because each answers at once."""
    found = []
    for port in range(1, 65536):
        with socket.socket() as knocking:
            knocking.settimeout(5)
            if knocking.connect_ex((address, port)) == 0:
                found.append(port)
    return found


def routes(url: str, certificates: str, key: str) -> dict[str, list[int]]:
    """The status of every route that standard input names, by three callers: without a key, with a wrong one, with the right one."""
    import httpx

    callers = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {key}"}]
    found = {}
    with httpx.Client(verify=ssl.create_default_context(cafile=certificates), trust_env=False, timeout=300) as client:
        for route in json.loads(sys.stdin.read()):
            path = re.sub(r"\{[^}]*\}", "x", route["path"])
            for method in route["methods"]:
                if method == "WEBSOCKET":
                    continue
                given = "GET" if method == "*" else method
                found[f"{given} {path}"] = [client.request(given, url + path, headers=one).status_code for one in callers]
    return found


def tls(address: str, port: int) -> dict[str, str]:
    """What becomes of a handshake with each version of TLS alone, by a client that would take any cipher."""
    found = {}
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        try:
            with socket.create_connection((address, port), 300) as plain, context.wrap_socket(plain) as safe:
                found[version.name] = str(safe.version())
        except (ssl.SSLError, OSError) as error:
            found[version.name] = f"refused: {getattr(error, 'reason', error)}"
    return found


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    result: object
    if verb == "ports":
        result = ports(rest[0])
    elif verb == "routes":
        result = routes(*rest)
    else:
        result = tls(rest[0], int(rest[1]))
    sys.stdout.write(json.dumps(result))
