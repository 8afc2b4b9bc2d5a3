"""A stand-in of Google's command line: the few commands that SkyPilot 0.14 and Google's libraries run on a laptop.

It signs in as the real one does, with the refresh token of the application default credentials.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud")


def setting(name: str) -> str:
    lines = (FOLDER / "configurations" / "config_default").read_text().splitlines()
    return next(line.split("=", 1)[1].strip() for line in lines if line.split("=")[0].strip() == name)


def ask(method: str, url: str, body: bytes | None = None, token: str = "") -> Any:  # fmt: skip
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = json.load(error)
        detail = said.get("error_description") or said["error"]["message"]
        raise SystemExit(f"ERROR: (gcloud) {detail}") from None


def api(method: str, url: str) -> Any:
    key = json.loads((FOLDER / "application_default_credentials.json").read_text())
    form = {name: key[name] for name in ("client_id", "client_secret", "refresh_token")} | {"grant_type": "refresh_token"}
    token = ask("POST", "https://oauth2.googleapis.com/token", urllib.parse.urlencode(form).encode())["access_token"]
    return ask(method, url, b"{}" if method == "POST" else None, token)


def run(words: list[str]) -> str:
    project = setting("project")
    services = f"https://serviceusage.googleapis.com/v1/projects/{project}/services"
    match words:
        case ["auth", "list"]:
            return setting("account")
        case ["config", "get" | "get-value", "project"]:
            return project
        case ["services", "list", *_]:
            return "\n".join(one["config"]["name"] for one in api("GET", services)["services"])
        case ["services", "enable", name, *_]:
            api("POST", f"{services}/{name}:enable")
            return ""
        case ["compute", "regions", "describe", region]:
            found = api("GET", f"https://compute.googleapis.com/compute/v1/projects/{project}/regions/{region}")
            rows = (f"- limit: {one['limit']}\n  metric: {one['metric']}\n  usage: {one['usage']}" for one in found["quotas"])
            return "\n".join(["quotas:", *rows])
    raise SystemExit(f"ERROR: (gcloud) {' '.join(words)}: not simulated")


if __name__ == "__main__":
    print(run([word for word in sys.argv[1:] if not word.startswith("--")]))
