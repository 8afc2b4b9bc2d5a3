"""gs:// — Google Cloud Storage; the endpoint by STORAGE_EMULATOR_HOST, credentials by Google's own chain."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import google.auth
from google.api_core.exceptions import GoogleAPICallError, NotFound, NotModified, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.auth.transport.requests import Request
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..status import changed, meaning, too_large
from . import Advance, Contents, Found, Link, Opening, StoredFile, bounded, unheard

_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)


class GcsStore:
    """The objects below a prefix of a bucket."""

    def __init__(self, address: Address, opening: Opening) -> None:
        self.address = address
        self.below = f"{address.path}/" if address.path else ""
        self.right = f"the user or service account needs roles/storage.objectViewer (to mirror: objectAdmin) on {address.root}"
        self.timeout = (opening.patience.connect, opening.patience.stall)
        self._emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        self._lock = threading.Lock()
        self._made: Any = None
        self._credentials: Any = None

    def list(self) -> Contents:
        with self._explained(str(self.address)):
            blobs = self._client().list_blobs(self.address.root, prefix=self.below, timeout=self.timeout, retry=None)
            found = bounded(blobs, str(self.address))
        if not found:
            raise WeightsError(Kind.NOT_FOUND, f"there is nothing at {self.address}; check bucket and prefix")
        files = tuple(
            StoredFile(blob.name.removeprefix(self.below), blob.size, str(blob.generation), _promises(blob))
            for blob in found
            if not blob.name.endswith("/")
        )
        return Contents(files, str(self.address))

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        with self._explained(file.name):
            more = f"the store sent more of {file.name} than was asked for; try again"
            sink = _Room(stop - start, WeightsError(Kind.UNREACHABLE, more))
            self._blob(file.name).download_to_file(
                sink,
                start=start,
                end=stop - 1,
                raw_download=True,
                if_generation_match=int(file.version),
                checksum=None,  # of a range there is none
                timeout=self.timeout,
                retry=None,
            )
            yield bytes(sink.data)

    def link(self, file: StoredFile) -> Link | None:
        base = self._emulator or "https://storage.googleapis.com"
        bucket, name = quote(self.address.root, safe=""), quote(self.below + file.name, safe="")
        url = f"{base}/download/storage/v1/b/{bucket}/o/{name}?alt=media&ifGenerationMatch={file.version}"
        headers: dict[str, str] = {}
        with self._explained(file.name), self._lock:
            self._login().before_request(Request(), "GET", url, headers)
        return Link(url, headers, {"x-goog-generation": file.version})

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        blob = self._blob(name)
        blob.metadata = {"sha256": facts.sha256, "blake3": facts.blake3} if facts else None
        with self._explained(f"{self.address}/{name}"), path.open("rb") as source:
            size = path.stat().st_size
            blob.upload_from_file(_Heard(source, advance), size=size, checksum="crc32c", timeout=self.timeout, retry=None)

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        with self._explained(file.name):
            blob = self._blob(file.name)
            blob.reload(timeout=self.timeout, retry=None)
        return bool(blob.size == facts.size and (blob.metadata or {}).get("sha256") == facts.sha256)

    def delete(self, name: str) -> None:
        with self._explained(f"{self.address}/{name}"):
            try:
                self._blob(name).delete(timeout=self.timeout, retry=None)
            except NotFound:
                return

    def get(self, name: str, known: str, most: int) -> Found | None:
        what = f"{self.address}/{name}"
        with self._explained(what):
            blob = self._blob(name)
            sink = _Room(most, too_large(what, most))
            try:  # one request, so that the bytes and the generation are of one object
                blob.download_to_file(
                    sink, if_generation_not_match=int(known) if known else None, timeout=self.timeout, retry=None
                )
            except NotModified:
                return None
            version = str(blob.generation)
            return None if version == known else Found(bytes(sink.data), version)

    def put(self, name: str, data: bytes, known: str) -> str:
        what = f"{self.address}/{name}"
        with self._explained(what):
            blob = self._blob(name)
            try:
                blob.upload_from_string(
                    data, "application/json", if_generation_match=int(known or 0), timeout=self.timeout, retry=None
                )
            except PreconditionFailed as error:
                raise changed(what) from error
            return str(blob.generation)

    def _blob(self, name: str) -> Any:
        return self._client().bucket(self.address.root).blob(self.below + name)

    def _login(self) -> Any:
        if self._credentials is None:
            if self._emulator:
                self._credentials = AnonymousCredentials()
            else:
                self._credentials, _ = google.auth.default(scopes=_SCOPES)
        return self._credentials

    def _client(self) -> Any:
        with self._explained(str(self.address)), self._lock:
            if self._made is None:
                self._made = storage.Client(project="unused", credentials=self._login())
            return self._made

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except GoogleAPICallError as error:
            if "bucket does not exist" in str(error):
                raise WeightsError(Kind.REFUSED, f"there is no bucket {self.address.root}; check its name") from error
            raise meaning(int(error.code or 500), what, self.right) from error
        except InvalidResponse as error:
            raise meaning(int(error.response.status_code), what, self.right) from error
        except DataCorruption as error:
            raise WeightsError(Kind.UNREACHABLE, f"{what} arrived damaged at Google; try again") from error
        except (DefaultCredentialsError, RefreshError) as error:
            self._credentials = self._made = None
            raise WeightsError(
                Kind.DENIED,
                "there are no Google credentials here; log in (`gcloud auth application-default login`) "
                "or give the machine a service account",
            ) from error
        except (GoogleAuthError, RequestException, HTTPError, OSError) as error:
            why = type(error).__name__
            raise WeightsError(
                Kind.UNREACHABLE, f"{what}: Google Cloud Storage cannot be reached ({why}); check the network"
            ) from error


class _Heard:
    """A file that tells how many bytes were read of it."""

    def __init__(self, source: IO[bytes], advance: Advance) -> None:
        self._source = source
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        piece = self._source.read(size)
        self._advance(len(piece))
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()


class _Room:
    """A file that takes so many bytes of an answer, and ends one that goes on with `excess`."""

    def __init__(self, size: int, excess: WeightsError) -> None:
        self._size, self._excess, self.data = size, excess, bytearray()

    def write(self, piece: bytes) -> int:
        if len(self.data) + len(piece) > self._size:
            raise self._excess
        self.data += piece
        return len(piece)

    def tell(self) -> int:
        return len(self.data)


def _promises(blob: Any) -> dict[str, str]:
    told = {"crc32c": blob.crc32c, "md5": blob.md5_hash}
    return {kind: base64.b64decode(value).hex() for kind, value in told.items() if value}


def open_store(address: Address, opening: Opening) -> GcsStore:
    return GcsStore(address, opening)
