"""A small hub: the endpoints of Hugging Face that huggingface_hub uses, with gated repositories and signed CDN links."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
SMALL = 32 * 1024  # up to here git holds a file itself; above, it is "LFS" and comes from the CDN
PAGE = 3  # entries on a page of the tree


@dataclass
class Repository:
    """Commit -> name -> bytes; `gated`: only TOKEN may read files; `link_seconds`: how long a CDN link is good."""

    commits: dict[str, dict[str, bytes]]
    main: str
    license: str = "apache-2.0"
    gated: bool = False
    link_seconds: float = 3600.0
    hidden_oids: dict[str, str] = field(default_factory=dict)


class Hub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.url = ""

    def add(self, name: str, files: Mapping[str, bytes], **options: object) -> str:
        """Adds a repository with one commit; the commit."""
        commit = hashlib.sha1(repr(sorted((n, hashlib.sha256(d).digest()) for n, d in files.items())).encode()).hexdigest()
        self.repositories[name] = Repository({commit: dict(files)}, commit, **options)  # type: ignore[arg-type]
        return commit


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        self.hub.requests.append(format % args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2], int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._cdn(match[1], match[2], match[3], parse_qs(url.query))
        else:
            self._send(404)

    def _repository(self, name: str, *, files: bool) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif files and repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted"})
        else:
            return repository
        return None

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.main if revision == "main" else revision
        if commit in repository.commits:
            return commit
        self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return ""

    def _info(self, name: str, revision: str) -> None:
        repository = self._repository(name, files=False)
        commit = self._commit(repository, revision) if repository else ""
        if repository and commit:
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            info = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self._json({**info, "gated": repository.gated, "cardData": {"license": repository.license}})

    def _tree(self, name: str, revision: str, cursor: int) -> None:
        repository = self._repository(name, files=False)
        commit = self._commit(repository, revision) if repository else ""
        if not repository or not commit:
            return
        entries = []
        for file, data in sorted(repository.commits[commit].items()):
            entry: dict[str, object] = {"type": "file", "path": file, "size": len(data), "oid": _git_sha1(data)}
            if len(data) > SMALL:
                oid = repository.hidden_oids.get(file) or hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        more = cursor + PAGE < len(entries)
        following = f"http://{self.headers['Host']}{urlsplit(self.path).path}?recursive=True&cursor={cursor + PAGE}"
        self._json(entries[cursor : cursor + PAGE], {"Link": f'<{following}>; rel="next"'} if more else {})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, files=True)
        commit = self._commit(repository, revision) if repository else ""
        if not repository or not commit:
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit})
        elif len(data) <= SMALL:
            self._file(data, _git_sha1(data), {"X-Repo-Commit": commit})
        else:
            oid = hashlib.sha256(data).hexdigest()
            port = self.headers["Host"].rpartition(":")[2]
            expires = time.time() + repository.link_seconds
            location = f"http://localhost:{port}/cdn/{name}/{commit}/{file}?expires={expires}&signature=s3cr3t-{commit[:8]}"
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
            self._send(302, {**linked, "Location": location})

    def _cdn(self, name: str, commit: str, file: str, query: dict[str, list[str]]) -> None:
        fresh = float(query.get("expires", ["0"])[0]) > time.time()
        if self.headers.get("Authorization"):
            self._send(400)  # the hub's token must not travel to the CDN
        elif not fresh or query.get("signature") != [f"s3cr3t-{commit[:8]}"]:
            self._send(403)
        else:
            data = self.hub.repositories[name].commits[commit][file]
            self._file(data, hashlib.sha256(data).hexdigest(), {})

    def _file(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match:
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, headers, data[first : last + 1])
        else:
            self._send(200, headers, data)

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A threaded server that says nothing when a client hangs up."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error here."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub; set HF_ENDPOINT to its `url`."""
    made = Hub()
    server = Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": made}))
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
