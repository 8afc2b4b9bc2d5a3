"""Every kind of store runs once for the whole test run, each behind a proxy that can do things wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
    os.environ.pop(_name, None)  # huggingface_hub reads them when it is imported

import faults
import hub as hubs
import places
import servers
from mistral_weights.patience import Patience

KINDS = ("hf", "s3", "gs", "az")
SERVERS = "all_places"  # the fixture that starts them


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVERS in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.servers)


@pytest.fixture(scope="session")
def all_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, places.Place]]:
    root = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        hub = stack.enter_context(hubs.hub())
        s3 = stack.enter_context(servers.s3(root / "s3"))
        gcs = stack.enter_context(servers.gcs(root / "gcs"))
        azure = stack.enter_context(servers.azure(root / "azure")).removesuffix(f"/{servers.AZURE_ACCOUNT}")
        yield {
            "hf": places.HubPlace(stack.enter_context(faults.proxy(hub.url)), hub),
            "s3": places.S3Place(stack.enter_context(faults.proxy(s3))),
            "gs": places.GcsPlace(stack.enter_context(faults.proxy(gcs))),
            "az": places.AzurePlace(stack.enter_context(faults.proxy(azure))),
        }


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own credentials and settings reaches a test."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "HF_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def stores(all_places: dict[str, places.Place], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, places.Place]]:
    """All stores, the clouds' own variables pointing at them, doing everything right."""
    for place in all_places.values():
        for name, value in place.env.items():
            monkeypatch.setenv(name, value)
        place.proxy.plan("")
    yield all_places
    for place in all_places.values():
        place.proxy.plan("")
        place.proxy.delay = 0.0


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, stores: dict[str, places.Place]) -> places.Place:
    """One store of each kind in turn."""
    return stores[request.param]


@pytest.fixture
def hub(stores: dict[str, places.Place]) -> hubs.Hub:
    found = stores["hf"]
    assert isinstance(found, places.HubPlace)
    return found.hub


@pytest.fixture
def patience() -> Patience:
    """Short enough for tests; the same limits otherwise."""
    return Patience(connect=2.0, stall=0.5, least_bytes=1024, tries=4, first_wait=0.01, longest_wait=0.05, lock=300.0)
