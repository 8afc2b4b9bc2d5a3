"""Names of files inside a set: which are safe, and which of them serving needs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatch

from mistral_contract import sets, untrusted

from .errors import Kind, WeightsError

MANIFEST = "mistral-weights.json"
STATE = sets.STATE
UNFINISHED = "mistral-weights.unfinished"
OWN = frozenset({MANIFEST, STATE, UNFINISHED})

FORMATS: tuple[str, ...] = ("auto", "safetensors", "consolidated", "gguf")
FOLDER = "folder"  # every file that a manifest names, whatever it is and however deep it lies: a checkpoint of a training

_BESIDE = (  # what a server reads beside the weights
    "*.json",
    "*.jinja",
    "tokenizer.model*",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
)
_NOT = ("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", "optimizer*", "trainer_state.json")
MOST_LISTED = 20
MOST_FILES = 10_000
LARGEST_INDEX = sets.LARGEST_MANIFEST
_SHARD = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


def check(name: str) -> str:
    """`name` itself, when it is a relative path that stays inside its folder; a clear error otherwise."""
    parts = name.split("/")
    bad = (
        not name
        or "\\" in name
        or ":" in parts[0]
        or any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    )
    if bad:
        raise WeightsError(
            Kind.REFUSED, f"the source has a file named {name!r}, which could leave its folder; do not use this source"
        )
    return name


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def kind_of(name: str) -> str:
    """What a file is to a server: safetensors, consolidated, gguf, beside, or empty (not needed)."""
    base = name.rsplit("/", 1)[-1]
    if name in OWN or "/" in name or _is(base, _NOT):
        return ""
    if base.endswith(".safetensors"):
        return "consolidated" if base.startswith("consolidated") else "safetensors"
    if base.endswith(".gguf"):
        return "gguf"
    return "beside" if _is(base, _BESIDE) else ""


def select(names: Iterable[str], form: str = "auto") -> tuple[str, ...]:
    """The names that serving needs, sorted: one form of the weights and what lies beside them.

    Every name is checked first. Pickles, code and folders below the set are never among them.
    """
    every = sorted(check(name) for name in names)
    no_twins(every)
    if form == FOLDER:
        return _few(name for name in every if name not in OWN)
    kinds = {name: kind_of(name) for name in every}
    there = set(kinds.values())
    if form == "auto":
        form = next((one for one in FORMATS[1:] if one in there), "")
    if not form or form not in there:
        if any(_is(name.lower(), _PICKLES) for name in every):
            raise WeightsError(
                Kind.REFUSED,
                "the source holds its weights only as pickles, which can run code; convert them to safetensors",
            )
        wanted = form or "safetensors or GGUF"
        raise WeightsError(Kind.NOT_FOUND, f"the source holds no {wanted} weights; look with `ls` at what it has")
    models = [name for name in every if kinds[name] == "gguf"]
    if form == "gguf" and (split := next((name for name in models if _SPLIT.search(name)), "")):
        raise WeightsError(
            Kind.REFUSED, f"{split} is one part of a GGUF that was split; join the parts (llama-gguf-split --merge)"
        )
    if form == "gguf" and len(models) > 1:
        raise WeightsError(
            Kind.REFUSED,
            f"the source holds {len(models)} GGUF files ({listed(models)}), and one is served; add its name to the URI: .../{models[0]}",
        )
    unwanted = set() if form == "consolidated" else {"params.json", "consolidated.safetensors.index.json"}
    if form != "safetensors":
        unwanted.add("model.safetensors.index.json")
    return _few(name for name in every if kinds[name] in (form, "beside") and name not in unwanted)


def _few(names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(names)
    if len(found) > MOST_FILES:
        raise WeightsError(
            Kind.REFUSED, f"the source has {len(found)} files to pull, and no set has more than {MOST_FILES}; name a part of it"
        )
    return found


def listed(names: Iterable[str]) -> str:
    """Names for a message, of many the first."""
    found = sorted(names)
    return (
        ", ".join(found[:MOST_LISTED]) + (f" and {len(found) - MOST_LISTED} more" if len(found) > MOST_LISTED else "") or "none"
    )


def absent_shards(names: Iterable[str]) -> tuple[str, ...]:
    """The shards that the names of the others count (NAME-00001-of-00002.safetensors) and that are not among `names`.

    Of many that are absent the first: a name may count 99,999 of them.
    """
    there = set(names)
    sets = {(found[1], found[2]) for found in map(_SHARD.fullmatch, there) if found}
    most = len(there) + MOST_LISTED + 1  # of so many numbers, some more than are listed are absent
    every = (
        f"{stem}-{number:05d}-of-{count}.safetensors" for stem, count in sets for number in range(1, min(int(count), most) + 1)
    )
    return tuple(sorted(set(every) - there))


def missing_shards(index: bytes, names: Iterable[str]) -> tuple[str, ...]:
    """The shards that a `*.safetensors.index.json` speaks of and that are not among `names`."""
    try:
        shards = set(untrusted.read(index, LARGEST_INDEX)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f" ({error})" if isinstance(error, untrusted.NotRead) else ""
        raise WeightsError(
            Kind.DAMAGED, f"the index of the weights cannot be read{why}; the source is damaged: mirror it again"
        ) from None
    return tuple(sorted(str(shard) for shard in shards - set(names)))


def no_twins(names: Iterable[str]) -> None:
    """WeightsError if two names are one file on some machine: in another case, or in another spelling of the same letters."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()), name)
        if other != name:
            raise WeightsError(
                Kind.REFUSED,
                f"the source has {other!r} and {name!r}, which are one file on some machines; do not use this source",
            )
