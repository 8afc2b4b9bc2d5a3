"""s3:// — Amazon S3 and what speaks like it; the endpoint by AWS_ENDPOINT_URL_S3, credentials by AWS's own chain."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..status import LET_IT_BE, changed, meaning, too_large
from . import Advance, Contents, Found, Link, Opening, StoredFile, bounded, unheard

LINK_SECONDS = 3600
PIECE = 2**20
UPLOAD_PART = 32 * 2**20
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", *_EXPIRED}
_PROMISES = {"ChecksumSHA256": "sha256", "ChecksumCRC32": "crc32", "ChecksumSHA1": "sha1"}


class S3Store:
    """The objects below a prefix of a bucket."""

    def __init__(self, address: Address, opening: Opening) -> None:
        self.address = address
        self.below = f"{address.path}/" if address.path else ""
        self.right = f"the user or role needs s3:ListBucket and s3:GetObject (to mirror: s3:PutObject) on {address.root}"
        self._patience = opening.patience
        self._lock = threading.Lock()
        self._made: Any = None

    def list(self) -> Contents:
        with self._explained(str(self.address)):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.address.root, Prefix=self.below)
            found = bounded((entry for page in pages for entry in page.get("Contents", ())), str(self.address))
        if not found:
            raise WeightsError(Kind.NOT_FOUND, f"there is nothing at {self.address}; check bucket and prefix")
        files = tuple(
            StoredFile(entry["Key"].removeprefix(self.below), entry["Size"], entry["ETag"])
            for entry in found
            if not entry["Key"].endswith("/")
        )
        return Contents(files, str(self.address))

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        with self._explained(file.name):
            wanted = f"bytes={start}-{stop - 1}"
            answer = self._client().get_object(**self._key(file.name), Range=wanted, IfMatch=file.version)
            if not answer.get("ContentRange", "").startswith(f"bytes {start}-{stop - 1}/") and (start, stop) != (
                0,
                file.size,
            ):
                raise WeightsError(Kind.UNREACHABLE, f"{file.name}: S3 sent another range than was asked for; try again")
            if answer["ETag"] != file.version:
                raise WeightsError(Kind.CHANGED, f"{file.name} changed in the store while it was read; {LET_IT_BE}")
            yield from answer["Body"].iter_chunks(PIECE)

    def link(self, file: StoredFile) -> Link | None:
        with self._explained(file.name):
            url = self._client().generate_presigned_url("get_object", Params=self._key(file.name), ExpiresIn=LINK_SECONDS)
        return Link(url, {"If-Match": file.version}, {"etag": file.version})

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        """Checksums of the whole object, where it was uploaded with one (one of its parts says nothing of the whole)."""
        with self._explained(file.name):
            head = self._client().head_object(**self._key(file.name), ChecksumMode="ENABLED")
        promised = {ours: head[theirs] for theirs, ours in _PROMISES.items() if head.get(theirs)}
        if head.get("ChecksumType") == "COMPOSITE":
            return {}
        return {kind: base64.b64decode(value).hex() for kind, value in promised.items() if "-" not in value}

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        from boto3.exceptions import S3UploadFailedError  # a pull starts sooner without boto3
        from boto3.s3.transfer import S3Transfer, TransferConfig

        told = {"sha256": facts.sha256, "blake3": facts.blake3} if facts else {}
        parts = TransferConfig(multipart_threshold=UPLOAD_PART, multipart_chunksize=UPLOAD_PART, max_concurrency=4)
        with self._explained(f"{self.address}/{name}"), S3Transfer(self._client(), parts) as transfer:
            try:
                transfer.upload_file(
                    str(path),
                    self.address.root,
                    self.below + name,
                    callback=advance,
                    extra_args={"Metadata": told, "ChecksumAlgorithm": "CRC32"},
                )
            except S3UploadFailedError as error:  # what boto3 puts around a ClientError
                raise error.__context__ or error from None

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        with self._explained(file.name):
            head = self._client().head_object(**self._key(file.name))
        return bool(head["ContentLength"] == facts.size and head["Metadata"].get("sha256") == facts.sha256)

    def delete(self, name: str) -> None:
        with self._explained(f"{self.address}/{name}"):
            self._client().delete_object(**self._key(name))

    def get(self, name: str, known: str, most: int) -> Found | None:
        what = f"{self.address}/{name}"
        with self._explained(what):
            try:
                answer = self._client().get_object(**self._key(name), **({"IfNoneMatch": known} if known else {}))
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 304:
                    return None
                raise
            with answer["Body"] as body:
                if answer["ContentLength"] > most:
                    raise too_large(what, most)
                return Found(body.read(), answer["ETag"])

    def put(self, name: str, data: bytes, known: str) -> str:
        what = f"{self.address}/{name}"
        condition = {"IfMatch": known} if known else {"IfNoneMatch": "*"}
        with self._explained(what):
            try:
                answer = self._client().put_object(**self._key(name), Body=data, ContentType="application/json", **condition)
            except ClientError as error:
                code = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if code in (409, 412) or (known and code == 404):  # 409: another write runs at this moment
                    raise changed(what) from error
                raise
        return str(answer["ETag"])

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.address.root, "Key": self.below + name}

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                patience = self._patience
                quiet = Config(
                    connect_timeout=patience.connect,
                    read_timeout=patience.stall,
                    retries={"total_max_attempts": 1},  # we try again ourselves, and say so
                    max_pool_connections=32,
                    signature_version="s3v4",
                )
                by_path = quiet.merge(Config(s3={"addressing_style": "path"}))
                session = botocore.session.Session()
                named = next(filter(None, map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))), "")
                made = session.create_client("s3", config=by_path if named and not _is_amazon(named) else quiet)
                if not named and not _is_amazon(made.meta.endpoint_url):  # a profile's
                    made = session.create_client("s3", config=by_path)
                self._made = made
            return self._made

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._answered(error, what) from error
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError) as error:
            self._made = None
            raise WeightsError(
                Kind.DENIED,
                "there are no AWS credentials here; log in (`aws configure`, `aws sso login`) or give a role",
            ) from error
        except ProfileNotFound as error:
            raise WeightsError(Kind.USAGE, f"AWS_PROFILE names no profile ({error}); correct it") from error
        except (BotoCoreError, OSError) as error:
            why = type(error).__name__
            raise WeightsError(Kind.UNREACHABLE, f"{what}: S3 cannot be reached ({why}); check network and endpoint") from error

    def _answered(self, error: ClientError, what: str) -> WeightsError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        metadata = error.response.get("ResponseMetadata", {})
        if code in _EXPIRED:
            self._made = None  # the next try reads the credentials anew
        if code == "NoSuchBucket":
            return WeightsError(Kind.REFUSED, f"there is no bucket {self.address.root}; check its name, and the endpoint")
        if code in _REFUSED:
            return WeightsError(Kind.DENIED, f"{what} may not be used ({code}); {self.right}")
        headers = metadata.get("HTTPHeaders", {})
        return meaning(int(metadata.get("HTTPStatusCode", 500)), what, self.right, headers.get("retry-after"))


def _is_amazon(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def open_store(address: Address, opening: Opening) -> S3Store:
    return S3Store(address, opening)
