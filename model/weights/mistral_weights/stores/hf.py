"""hf:// — the Hugging Face hub, or what HF_ENDPOINT names. A revision is pinned to its commit before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, RepoFile, get_hf_file_metadata, hf_hub_url
from huggingface_hub import errors as hub
from huggingface_hub.utils import build_hf_headers, get_session

from ..address import Address
from ..errors import Kind, WeightsError
from ..manifest import ManifestFile
from ..status import LET_IT_BE, meaning
from . import Advance, Contents, Link, Opening, StoredFile, bounded, unheard

_HTTP_ERROR: type[Exception] = hub.HfHubHTTPError.__mro__[1]  # the HTTP library's own base; it differs by hub version


class HubStore:
    """A model repository at one commit."""

    def __init__(self, address: Address, opening: Opening) -> None:
        self.address = address
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.page = f"{self.endpoint}/{address.root}"
        self.right = f"open {self.page}, accept its terms, and use a token that may read it (HF_TOKEN)"
        self.token = opening.secrets.get("hf_token") or None
        self.timeout = opening.patience.stall
        self.api = HfApi(endpoint=self.endpoint, token=self.token)
        self.commit = ""

    def list(self) -> Contents:
        with self._explained(str(self.address)):
            wanted = self.address.revision or None
            info = self.api.model_info(self.address.root, revision=wanted, timeout=self.timeout)
            self.commit = str(info.sha)
            tree = self.api.list_repo_tree(self.address.root, recursive=True, revision=self.commit)
            entries = [entry for entry in bounded(tree, str(self.address)) if isinstance(entry, RepoFile)]
        below = f"{self.address.path}/" if self.address.path else ""
        files = tuple(
            StoredFile(entry.path.removeprefix(below), entry.size, _version(entry), _promises(entry))
            for entry in entries
            if entry.path.startswith(below)
        )
        source = Address("hf", self.address.root, self.address.path, self.commit)
        return Contents(files, str(source), self.commit, _license(info))

    def read(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        with self._explained(file.name):
            headers = {**build_hf_headers(token=self.token), "Range": f"bytes={start}-{stop - 1}"}
            headers["Accept-Encoding"] = "identity"
            url = self._url(file)
            with get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as answer:
                if answer.status_code not in (200, 206):
                    raise self._refused(answer.status_code, answer.headers, file.name)
                if answer.status_code == 200 and (start, stop) != (0, file.size):
                    raise _another_range(file)
                got = answer.headers.get("content-range", "")
                if answer.status_code == 206 and not got.startswith(f"bytes {start}-{stop - 1}/"):
                    raise _another_range(file)
                yield from answer.iter_raw()  # as it came: nothing is unpacked

    def link(self, file: StoredFile) -> Link | None:
        """Where the hub sends us for this file; its own token goes to the hub only."""
        with self._explained(file.name):
            url = self._url(file)
            found = get_hf_file_metadata(url, token=self.token, timeout=self.timeout, endpoint=self.endpoint)
            if found.size not in (None, file.size):
                raise WeightsError(Kind.CHANGED, f"{file.name} changed in the store while it was read; {LET_IT_BE}")
            if urlsplit(found.location).netloc != urlsplit(url).netloc:
                return Link(found.location)
            token = {name: value for name, value in build_hf_headers(token=self.token).items() if name == "authorization"}
            return Link(found.location, token, {"etag": f'"{found.etag}"'} if found.etag else {})

    def promises(self, file: StoredFile) -> Mapping[str, str]:
        return file.promises

    def write(self, name: str, path: Path, facts: ManifestFile | None, advance: Advance = unheard) -> None:
        raise WeightsError(Kind.USAGE, "weights are not written to hf://; name a bucket or a folder")

    def compare(self, file: StoredFile, facts: ManifestFile) -> bool:
        return file.promises.get("sha256") == facts.sha256

    def delete(self, name: str) -> None:
        self.write(name, Path(), None)

    def _url(self, file: StoredFile) -> str:
        name = f"{self.address.path}/{file.name}" if self.address.path else file.name
        if not self.commit:
            self.list()
        return str(hf_hub_url(self.address.root, name, revision=self.commit, endpoint=self.endpoint))

    def _refused(self, status: int, headers: Mapping[str, str], what: str) -> WeightsError:
        if headers.get("x-error-code") == "GatedRepo":
            return WeightsError(Kind.DENIED, f"{self.address.root} is gated; {self.right}")
        if headers.get("x-error-code") == "RevisionNotFound":
            wanted = self.address.revision
            return WeightsError(Kind.NOT_FOUND, f"{self.address.root} has no revision {wanted}; look at {self.page}/commits")
        if headers.get("x-error-code") == "RepoNotFound" or status == 401:
            return WeightsError(
                Kind.DENIED,
                f"{self.address.root} is not there, or is not for everyone; check its name, or {self.right}",
            )
        return meaning(status, what, self.right, headers.get("retry-after"))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except WeightsError:
            raise
        except hub.HfHubHTTPError as error:
            raise self._refused(error.response.status_code, error.response.headers, what) from error
        except hub.HFValidationError as error:
            raise WeightsError(Kind.USAGE, f"{self.address} is not a name that the hub knows; check it") from error
        except hub.OfflineModeIsEnabled as error:
            raise WeightsError(Kind.USAGE, "HF_HUB_OFFLINE forbids the network; unset it, or pull from a folder") from error
        except (_HTTP_ERROR, OSError) as error:
            raise WeightsError(
                Kind.UNREACHABLE,
                f"{what}: {self.endpoint} cannot be reached ({type(error).__name__}); check the network",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # of what should be the hub's JSON
            raise WeightsError(
                Kind.UNREACHABLE, f"{what}: {self.endpoint} answers like no hub ({type(error).__name__}); check HF_ENDPOINT"
            ) from error


def _version(entry: RepoFile) -> str:
    return str(entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _promises(entry: RepoFile) -> dict[str, str]:
    """The tree has sha256 of large files, and git's own hash of small ones."""
    return {"sha256": entry.lfs.sha256} if entry.lfs else {"git-sha1": entry.blob_id}


def _license(info: object) -> str:
    card = getattr(info, "card_data", None)
    return str((card.get("license") if card else "") or "")


def _another_range(file: StoredFile) -> WeightsError:
    return WeightsError(Kind.UNREACHABLE, f"{file.name}: the server sent another range than was asked for; try again")


def open_store(address: Address, opening: Opening) -> HubStore:
    return HubStore(address, opening)
