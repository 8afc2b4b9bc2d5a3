"""The LoRA adapters of a spec on this machine: folders are named by their URI, and judged before anything is started."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from mistral_contract import adapters
from mistral_contract.adapters import Adapter, AdapterError
from mistral_contract.envs import Serve, value

from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS, Model
from mistralctl.plan import Plan

FILE = "file://"
UNREAD_RANK = 64  # of an adapter that was not read yet: few have a larger one


def folder_of(uri: str) -> Path | None:
    """The folder of this machine that a URI names; None for a URI of a store."""
    return Path(unquote(uri.removeprefix(FILE))) if uri.startswith(FILE) else None


def resolve(sourced: Sourced, model: Model) -> dict[str, str]:
    """The adapters by name, each with its URI; UserError if one of this machine's folders is missing or cannot be served."""
    found, served = {}, sourced.spec.served_model_name or model.name
    for name, given in sourced.spec.lora.items():
        place = f"{sourced.place('lora')} {name}"
        if name == served:
            raise UserError(f"{place}: the model itself has this name in the API; give the adapter another")
        uri = given if "://" in given else FILE + quote(str(Path(given).expanduser().resolve()))
        folder = folder_of(uri)
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{place}: {folder} is not a folder; name a folder with {adapters.CONFIG}", Exit.NOT_FOUND)
            try:
                check_base(adapters.read(folder, model.shape), model)
            except AdapterError as error:
                raise UserError(f"{place}: {folder}: {error}", Exit.WEIGHTS) from None
        found[name] = uri
    return found


def check_base(adapter: Adapter, model: Model) -> None:
    """AdapterError if an adapter names another base model than this: another repository of the hub, another row, another commit.

    Where one of the two is not known, nothing is said: an adapter may name a folder of the machine that trained it.
    """
    hub, _, pinned = model.weights.removeprefix("hf://").partition("@") if model.weights.startswith("hf://") else ("", "", "")
    named, revision = adapter.base, pinned or model.revision
    other_row = named in MODELS and named != model.name
    other_hub = bool(hub) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", named) is not None and named.lower() != hub.lower()
    if other_row or other_hub:
        raise AdapterError(f"it was trained on {named}, and this is {hub or model.name}; serve it with its own base model")
    if named.lower() == hub.lower() and adapter.base_revision and revision and adapter.base_revision != revision:
        raise AdapterError(
            f"it was trained on commit {adapter.base_revision} of {named}, and {revision} is served; name those weights with --weights hf://{named}@"
            f"{adapter.base_revision}"
        )


def rank(lora: Mapping[str, str]) -> int:
    """The rank of the slots that vLLM makes for these adapters; UNREAD_RANK is assumed of those that lie elsewhere, 0 without adapters."""
    folders = [folder_of(uri) for uri in lora.values()]
    if not folders or None in folders:
        return UNREAD_RANK if folders else 0
    return adapters.served_rank(adapters.read(folder, None) for folder in folders if folder)


def versions(lora: Mapping[str, str], envs: Mapping[str, str]) -> dict[str, str]:
    """What each adapter holds: a hash of a folder's files, and of a store's what `envs`, of an earlier task, knows; empty if unknown."""
    before = {name: (uri, version) for name, uri, version in _of(envs)}
    found = {}
    for name, uri in lora.items():
        folder, (old_uri, old) = folder_of(uri), before.get(name, ("", ""))
        found[name] = _digest(folder) if folder else old if uri == old_uri else ""
    return found


def asked(plan: Plan, note: Callable[[str], None]) -> dict[str, str]:
    """What each adapter holds, with the stores asked now; UserError if one cannot be served, or the hub does not give it.

    A bucket that this machine cannot read may be open to the node: `note` is told that it was not judged here.
    """
    found = dict(plan.lora_versions)
    for name, uri in plan.spec.lora.items():
        if folder_of(uri) is not None:
            continue
        from mistralctl import weights

        try:
            with weights.briefly(uri) as held:
                if held is not None:
                    check_base(adapters.judge(held.sizes, held.read, plan.model.shape), plan.model)
                    found[name] = held.version
        except AdapterError as error:
            raise UserError(f"--lora {name}: {uri}: {error}", Exit.WEIGHTS) from None
        except UserError as error:
            if uri.startswith("hf://") or error.code not in (Exit.CLOUD, Exit.MACHINE, Exit.NETWORK):
                raise
            note(f"--lora {name} is only judged on the node, and not known to have changed: {error}")
    return found


def _of(envs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    uris = value(Serve, "lora", envs)
    known = value(Serve, "lora_versions", envs)
    return [(name, uri, known.get(name, "")) for name, uri in uris.items()]


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name in (adapters.CONFIG, adapters.TENSORS):
        with (folder / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]
