"""The four kinds of store as tests see them: filled and spoilt behind the library's back, read through a proxy."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import boto3
import faults
import hub as hubs
import requests
import servers
from azure.storage.blob import ContainerClient


class Place(Protocol):
    """A store of one kind; `env` points the clouds' own variables at the proxy in front of it."""

    scheme: str
    proxy: faults.Proxy

    def new(self) -> str:
        """The URI of a place that is empty yet."""
        ...

    def put(self, uri: str, files: Mapping[str, bytes]) -> None: ...

    def get(self, uri: str, name: str) -> bytes: ...

    @property
    def env(self) -> dict[str, str]: ...


def spoil(place: Place, uri: str, name: str, at: int, bit: int = 0) -> None:
    """Flips one bit of a file in the store."""
    data = bytearray(place.get(uri, name))
    data[at] ^= 1 << bit
    place.put(uri, {name: bytes(data)})


@dataclass
class S3Place:
    proxy: faults.Proxy
    scheme: str = "s3"
    bucket: str = "weights"

    def __post_init__(self) -> None:
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=self.proxy.target,
            aws_access_key_id=servers.S3_KEY,
            aws_secret_access_key=servers.S3_SECRET,
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket=self.bucket)

    def new(self) -> str:
        return f"s3://{self.bucket}/{uuid.uuid4().hex}"

    def put(self, uri: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self._client.put_object(Bucket=self.bucket, Key=f"{uri.split('/')[3]}/{name}", Body=data)

    def get(self, uri: str, name: str) -> bytes:
        return bytes(self._client.get_object(Bucket=self.bucket, Key=f"{uri.split('/')[3]}/{name}")["Body"].read())

    @property
    def env(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": servers.S3_KEY, "AWS_SECRET_ACCESS_KEY": servers.S3_SECRET}
        return {**keys, "AWS_ENDPOINT_URL_S3": self.proxy.url, "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class GcsPlace:
    proxy: faults.Proxy
    scheme: str = "gs"
    bucket: str = "weights"

    def __post_init__(self) -> None:
        requests.post(
            f"{self.proxy.target}/storage/v1/b?project=test", json={"name": self.bucket}, timeout=300
        ).raise_for_status()

    def new(self) -> str:
        return f"gs://{self.bucket}/{uuid.uuid4().hex}"

    def put(self, uri: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            wanted = {"uploadType": "media", "name": f"{uri.split('/')[3]}/{name}"}
            url = f"{self.proxy.target}/upload/storage/v1/b/{self.bucket}/o"
            requests.post(url, params=wanted, data=data, timeout=300).raise_for_status()

    def get(self, uri: str, name: str) -> bytes:
        url = f"{self.proxy.target}/download/storage/v1/b/{self.bucket}/o/{quote(uri.split('/')[3] + '/' + name, safe='')}"
        answer = requests.get(url, params={"alt": "media"}, timeout=300)
        answer.raise_for_status()
        return bytes(answer.content)

    @property
    def env(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.proxy.url}


@dataclass
class AzurePlace:
    proxy: faults.Proxy
    scheme: str = "az"
    container: str = "weights"

    def __post_init__(self) -> None:
        self._client = ContainerClient.from_connection_string(_connection(self.proxy.target), self.container)
        self._client.create_container()

    def new(self) -> str:
        return f"az://{servers.AZURE_ACCOUNT}/{self.container}/{uuid.uuid4().hex}"

    def put(self, uri: str, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self._client.upload_blob(f"{uri.split('/')[4]}/{name}", data, overwrite=True)

    def get(self, uri: str, name: str) -> bytes:
        return bytes(self._client.download_blob(f"{uri.split('/')[4]}/{name}").readall())

    @property
    def env(self) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": _connection(self.proxy.url)}


def _connection(url: str) -> str:
    account, key = servers.AZURE_ACCOUNT, servers.AZURE_KEY
    return f"DefaultEndpointsProtocol=http;AccountName={account};AccountKey={key};BlobEndpoint={url}/{account};"


@dataclass
class HubPlace:
    proxy: faults.Proxy
    hub: hubs.Hub
    scheme: str = "hf"

    def new(self) -> str:
        return f"hf://test/{uuid.uuid4().hex}"

    def put(self, uri: str, files: Mapping[str, bytes]) -> None:
        name = uri.removeprefix("hf://")
        if name in self.hub.repositories:
            repository = self.hub.repositories[name]
            repository.commits[repository.main].update(files)
        else:
            self.hub.add(name, files)

    def get(self, uri: str, name: str) -> bytes:
        repository = self.hub.repositories[uri.removeprefix("hf://")]
        return repository.commits[repository.main][name]

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.proxy.url}
