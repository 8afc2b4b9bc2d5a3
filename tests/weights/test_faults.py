"""Whatever a store does wrong: it passes, or it ends in one clear line; never a wrong byte, and nothing right is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import sets
from mistral_weights.errors import Kind, WeightsError
from mistral_weights.patience import Patience
from mistral_weights.pull import Pull, pull
from places import Place
from test_pull import contents

# fault -> the kind of the error when it stays; Retry-After, stalls and the rest all count as "cannot be reached"
STAYING = {
    "403": Kind.DENIED,
    "404": Kind.NOT_FOUND,
    "429": Kind.UNREACHABLE,
    "500": Kind.UNREACHABLE,
    "503": Kind.UNREACHABLE,
    "cut": Kind.UNREACHABLE,
    "slow": Kind.UNREACHABLE,
    "drip": Kind.UNREACHABLE,
    "wrong-range": Kind.UNREACHABLE,
    "200-for-206": Kind.UNREACHABLE,
    "short": Kind.UNREACHABLE,
    "expired": Kind.DENIED,
    "flipped-bit": Kind.DAMAGED,
    "changed-etag": Kind.CHANGED,
    "refused": Kind.UNREACHABLE,
}
KINDS = ("hf", "s3", "gs", "az")
NO_FAULT = ("hf", "changed-etag")  # has a test of its own below
LONG = ("slow", "drip")


@pytest.mark.parametrize("fault", STAYING)
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_a_fault_that_passes_does_no_harm(place: Place, plain: bool, fault: str, tmp_path: Path, patience: Patience) -> None:
    files, uri = sets.a_set(), place.new()
    place.put(uri, files)
    place.proxy.plan(fault, times=1 if fault in LONG else 2, after=3)
    done = pull(Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, connections=4, plain=plain, patience=patience))
    assert contents(tmp_path / "set") == files
    assert place.proxy.done == (1 if fault in LONG else 2)
    assert done.fetched >= done.bytes


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind in KINDS for fault in STAYING if (kind, fault) != NO_FAULT])
def test_a_fault_that_stays_is_one_clear_line_and_later_it_continues(
    kind: str, fault: str, stores: dict[str, Place], tmp_path: Path, patience: Patience
) -> None:
    place = stores[kind]
    files, uri = sets.a_set(), place.new()
    place.put(uri, files)
    request = Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, connections=1, patience=patience)
    place.proxy.plan(fault, after=8)
    with pytest.raises(WeightsError) as caught:
        pull(request)
    said = str(caught.value)
    assert caught.value.kind is STAYING[fault]
    assert "\n" not in said
    assert "; " in said, "says what to do"
    assert not any(secret in said.lower() for secret in ("signature", "x-amz", "sig=", "s3cr3t", "bearer"))
    assert not (tmp_path / "set").exists()
    place.proxy.plan("")
    done = pull(request)
    assert contents(tmp_path / "set") == files
    if fault != "flipped-bit":  # without a manifest, a wrong range shows only when its whole file is there
        assert done.fetched + done.resumed == done.bytes
    if fault not in ("flipped-bit", "changed-etag"):
        assert done.resumed > 0, "what was right is kept"


def test_a_hub_may_name_its_etags_as_it_likes(stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    """What a link of the CDN leads to is held against the sha256 of the tree; its ETag is nobody's promise."""
    files, uri = sets.a_set(), stores["hf"].new()
    stores["hf"].put(uri, files)
    stores["hf"].proxy.plan("changed-etag", after=2, below="/cdn/")
    pull(Pull(uri, tmp_path / "set", range_bytes=sets.RANGE, connections=4, patience=patience))
    assert contents(tmp_path / "set") == files
    assert stores["hf"].proxy.done > 0


def test_a_store_that_is_gone_is_said_so(
    place: Place, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in place.env.items():
        monkeypatch.setenv(name, value.replace(place.proxy.url, "http://127.0.0.1:9"))
    with pytest.raises(WeightsError, match="cannot be reached") as caught:
        pull(Pull(place.new(), tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.UNREACHABLE


def test_wrong_credentials_name_the_right_that_is_missing(
    stores: dict[str, Place], tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(WeightsError, match=r"may not be used \(SignatureDoesNotMatch\); .* needs s3:ListBucket") as caught:
        pull(Pull("s3://weights/x", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DENIED
    key = "AZURE_STORAGE_CONNECTION_STRING"
    monkeypatch.setenv(key, stores["az"].env[key].replace("AccountKey=Eby8", "AccountKey=AAAA"))
    with pytest.raises(WeightsError, match="needs the role Storage Blob Data Reader") as caught:
        pull(Pull("az://devstoreaccount1/weights/x", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DENIED


def test_no_credentials_at_all(
    stores: dict[str, Place], tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(WeightsError, match="there are no AWS credentials here; log in") as caught:
        pull(Pull("s3://weights/x", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DENIED
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(WeightsError, match="there are no Google credentials here; log in") as caught:
        pull(Pull("gs://weights/x", tmp_path / "set", patience=patience))
    assert caught.value.kind is Kind.DENIED


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/x", "s3://weights/empty", "gs://no-such-bucket/x", "gs://weights/empty",
                                 "az://devstoreaccount1/no-such-container/x", "az://devstoreaccount1/weights/empty"])  # fmt: skip
def test_what_is_not_there(uri: str, stores: dict[str, Place], tmp_path: Path, patience: Patience) -> None:
    with pytest.raises(WeightsError, match="is not there|is nothing at|is no bucket|is no container") as caught:
        pull(Pull(uri, tmp_path / "set", patience=patience))
    assert caught.value.kind in (Kind.NOT_FOUND, Kind.REFUSED)
