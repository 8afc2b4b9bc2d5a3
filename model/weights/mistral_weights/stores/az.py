"""az:// — Azure Blob Storage. Credentials and endpoint by Azure's own variables, else by the machine's identity.

AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN and AZURE_STORAGE_SERVICE_ENDPOINT mean what
they mean to the az command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.storage.blob import BlobSasPermissions, ContainerClient, ContentSettings, generate_blob_sas

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..status import LET_IT_BE, changed, meaning, too_large
from . import Advance, Contents, Found, Link, Opening, StoredFile, bounded, unheard

LINK_SECONDS = 3600
UPLOAD_BLOCK = 32 * 2**20
_API = "2023-11-03"
_SCOPE = "https://storage.azure.com/.default"


class AzureStore:
    """The blobs below a prefix of a container."""

    def __init__(self, address: Address, opening: Opening) -> None:
        self.address = address
        self.account, _, self.container = address.root.partition("/")
        self.below = f"{address.path}/" if address.path else ""
        self.right = f"the user or identity needs the role Storage Blob Data Reader (to mirror: Contributor) on {self.account}"
        self._patience = opening.patience
        self._token: Any = None
        self._client = self._connect()

    def list(self) -> Contents:
        with self._explained(str(self.address)):
            found = bounded(self._client.list_blobs(name_starts_with=self.below or None), str(self.address))
        if not found:
            raise WeightsError(Kind.NOT_FOUND, f"there is nothing at {self.address}; check container and prefix")
        files = tuple(
            StoredFile(blob.name.removeprefix(self.below), int(blob.size), str(blob.etag).strip('"'), _promises(blob))
            for blob in found
            if not blob.name.endswith("/")
        )
        return Contents(files, str(self.address))

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        with self._explained(file.name):
            blob = self._client.get_blob_client(self.below + file.name)
            answer = blob.download_blob(
                offset=start,
                length=stop - start,
                etag=f'"{file.version}"',
                match_condition=MatchConditions.IfNotModified,
            )
            yield from answer.chunks()

    def link(self, file: StoredFile) -> Link | None:
        url = self._client.get_blob_client(self.below + file.name).url
        headers = {"x-ms-version": _API, "If-Match": f'"{file.version}"'}
        credential = self._client.credential
        with self._explained(file.name):
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token.get_token(_SCOPE).token}"
            elif getattr(credential, "account_key", None):
                signature = generate_blob_sas(
                    self.account,
                    self.container,
                    self.below + file.name,
                    account_key=credential.account_key,
                    permission=BlobSasPermissions(read=True),
                    expiry=datetime.now(UTC) + timedelta(seconds=LINK_SECONDS),
                )
                url = f"{url.partition('?')[0]}?{signature}"
        return Link(url, headers, {"etag": f'"{file.version}"'})

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        told = {"sha256": facts.sha256, "blake3": facts.blake3} if facts else {}
        done = 0

        def heard(current: int, total: int | None) -> None:
            nonlocal done
            advance(current - done)
            done = current

        with self._explained(f"{self.address}/{name}"), path.open("rb") as source:
            self._client.get_blob_client(self.below + name).upload_blob(
                source,
                length=path.stat().st_size,
                overwrite=True,
                max_concurrency=4,
                metadata=told,
                content_settings=ContentSettings(content_type="application/octet-stream"),
                progress_hook=heard,
            )

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        with self._explained(file.name):
            found = self._client.get_blob_client(self.below + file.name).get_blob_properties()
        return bool(found.size == facts.size and (found.metadata or {}).get("sha256") == facts.sha256)

    def delete(self, name: str) -> None:
        with self._explained(f"{self.address}/{name}"):
            try:
                self._client.delete_blob(self.below + name)
            except ResourceNotFoundError:
                return

    def get(self, name: str, known: str, most: int) -> Found | None:
        what = f"{self.address}/{name}"
        condition: dict[str, Any] = {"etag": known, "match_condition": MatchConditions.IfModified} if known else {}
        with self._explained(what):
            try:
                answer = self._client.get_blob_client(self.below + name).download_blob(**condition)
            except HttpResponseError as error:
                if error.status_code == 304:
                    return None
                raise
            if answer.size > most:
                raise too_large(what, most)
            return Found(answer.readall(), str(answer.properties.etag))

    def put(self, name: str, data: bytes, known: str) -> str:
        what = f"{self.address}/{name}"
        condition: dict[str, Any] = {"etag": known, "match_condition": MatchConditions.IfNotModified} if known else {}
        with self._explained(what):
            try:
                answer = self._client.get_blob_client(self.below + name).upload_blob(
                    data,
                    overwrite=bool(known),
                    content_settings=ContentSettings(content_type="application/json"),
                    **condition,
                )
            except (ResourceExistsError, ResourceModifiedError) as error:
                raise changed(what) from error
        return str(answer["etag"])

    def _connect(self) -> ContainerClient:
        options: dict[str, Any] = {
            "connection_timeout": self._patience.connect,
            "read_timeout": self._patience.stall,
            "retry_total": 0,  # we try again ourselves, and say so
            "max_single_put_size": UPLOAD_BLOCK,
            "max_block_size": UPLOAD_BLOCK,
        }
        connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
        if connection and f"AccountName={self.account};" in connection.rstrip(";") + ";":
            return ContainerClient.from_connection_string(connection, self.container, **options)
        endpoint = os.environ.get("AZURE_STORAGE_SERVICE_ENDPOINT", "").rstrip("/")
        base = endpoint or f"https://{self.account}.blob.core.windows.net"
        credential: Any = os.environ.get("AZURE_STORAGE_KEY") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
        if not credential:
            from azure.identity import DefaultAzureCredential

            credential = self._token = DefaultAzureCredential()
        return ContainerClient(base, quote(self.container, safe="$"), credential=credential, **options)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except WeightsError:
            raise
        except ClientAuthenticationError as error:
            status = error.status_code or 0
            reason = f" ({status})" if status else ""
            login = "log in (`az login`), set AZURE_STORAGE_KEY, or give the machine an identity; "
            raise WeightsError(Kind.DENIED, f"{what} may not be used{reason}; {'' if status else login}{self.right}") from error
        except ResourceModifiedError as error:
            raise WeightsError(Kind.CHANGED, f"{what} changed in the store while it was read; {LET_IT_BE}") from error
        except HttpResponseError as error:
            if error.status_code is None:
                raise self._unreachable(what, error) from error
            if getattr(error, "error_code", None) == "ContainerNotFound":
                raise WeightsError(Kind.REFUSED, f"there is no container {self.address.root}; check its name") from error
            headers = getattr(error.response, "headers", {})
            raise meaning(error.status_code, what, self.right, headers.get("Retry-After")) from error
        except (AzureError, OSError) as error:
            raise self._unreachable(what, error) from error

    def _unreachable(self, what: str, error: Exception) -> WeightsError:
        why = type(error).__name__
        return WeightsError(Kind.UNREACHABLE, f"{what}: Azure cannot be reached ({why}); check network and endpoint")


def _promises(blob: Any) -> dict[str, str]:
    told = blob.content_settings.content_md5
    return {"md5": bytes(told).hex()} if told else {}


def open_store(address: Address, opening: Opening) -> AzureStore:
    return AzureStore(address, opening)
