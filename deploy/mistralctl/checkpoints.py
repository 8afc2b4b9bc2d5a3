"""A model that is not a row of the table: weights in a folder or at a URI, by their config.json or params.json and their files."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import unquote

from mistral_contract import architecture, gguf, quantization, safetensors, tensors, untrusted
from mistral_contract.architecture import Architecture

from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS, Model, Shape, Stored

if TYPE_CHECKING:
    from mistralctl.weights import Described


INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
SMALL = 1_000_000_000  # parameters that a machine without a GPU answers with at a usable speed


def _shape(found: Described, place: str) -> tuple[Shape, Stored]:
    """The shape by config.json or params.json, and how the weights are stored; UserError if such a model is not served."""
    name = "params.json" if found.form == "consolidated" else "config.json"
    file = f"{found.uri.removeprefix('file://')}/{name}"
    if name not in found.files:
        if "adapter_config.json" in found.files:
            raise UserError(
                f"{place}: {found.uri} is an adapter, not a model; name its base model, and this with --lora NAME=URI",
                Exit.WEIGHTS,
            )
        raise UserError(
            f"{place}: {file} is missing; name a folder in Hugging Face format, or one with consolidated.safetensors and params.json",
            Exit.NOT_FOUND,
        )
    stray = next((each for each in found.files if each.startswith("adapter_model")), "")
    if stray:
        raise UserError(
            f"{place}: {found.uri} holds {stray} beside {name}, and vLLM would load it into the model; take it out, and serve it with --lora",
            Exit.WEIGHTS,
        )
    beside = {each: _json(found, each, place) for each in quantization.BESIDE}
    try:
        config = untrusted.read(found.documents[name])
        model = architecture.read_params(config) if name == "params.json" else architecture.read(config)
        scheme = quantization.read(config, beside)
        size = quantization.weight_bytes(scheme, model) if scheme else 0
    except architecture.Refused as refused:
        raise UserError(f"{place}: {file}: {refused}") from None
    except quantization.NotServed as refused:
        raise UserError(f"{place}: {file}: {refused}", Exit.WEIGHTS) from None
    except ValueError as error:
        raise UserError(f"{place}: {file} cannot be read ({error}); correct it") from None
    floats, fixed = _tensors(found, model, scheme is not None, place)
    return Shape.of(model), Stored(
        scheme, bytes=size, floats=floats, fixed=fixed, size=found.bytes, digest=found.digest, form=found.form
    )


def _tensors(found: Described, model: Architecture, quantized: bool, place: str) -> tuple[int, int]:
    """(numbers of floats, bytes of all other tensors) by the headers of the files; UserError unless they are the model's."""
    files = {}
    for name, header in found.headers.items():
        try:
            files[name] = safetensors.read(found.files[name], header)
        except safetensors.Damaged as error:
            raise UserError(f"{place}: {name} at {found.uri} {error}; take a whole copy", Exit.WEIGHTS) from None
    named = _json(found, INDEX, place).get("weight_map")
    strays = sorted(set(files) - set(map(str, named.values()))) if isinstance(named, dict) else []
    if strays:
        raise UserError(
            f"{place}: {found.uri} holds {strays[0]}, which its {INDEX} does not name; keep the files of one set of weights",
            Exit.WEIGHTS,
        )
    try:
        tensors.judge(model, quantized, files)
    except tensors.Unfit as error:
        raise UserError(f"{place}: {found.uri}: {error}", Exit.WEIGHTS) from None
    every = [tensor for each in files.values() for tensor in each.values()]
    floats = sum((t.stop - t.start) // safetensors.FLOATS[t.dtype] for t in every if t.dtype in safetensors.FLOATS)
    return floats, sum(t.stop - t.start for t in every if t.dtype not in safetensors.FLOATS)


def _gguf(found: Described, place: str) -> tuple[Shape | None, Stored]:
    """The shape by the beginning of a GGUF file, None where that does not tell it; UserError if such a model is not served."""
    [(name, header)] = found.headers.items()
    try:
        model = gguf.model(gguf.read(header, found.files[name]))
    except ValueError as error:
        raise UserError(f"{place}: {name} at {found.uri}: {error}; name another file", Exit.WEIGHTS) from None
    made = 2 * model.parameters if model else 0  # of its numbers the node makes a copy in 16 bits
    return Shape.of(model) if model else None, Stored(size=found.bytes + made, digest=found.digest, form=found.form)


class Tokenizer(NamedTuple):
    """How a folder's chat is tokenized: by mistral_common or by Hugging Face's files."""

    mode: Literal["mistral", "hf"]
    chat: bool
    tool_parser: str | None


def _tokenizer(found: Described, place: str) -> Tokenizer:
    """Hugging Face's tokenizer where it is there, else Mistral's: that one knows the chat, and from v3 on the calls of tools.

    The versions are in the names of the files (tokenizer.model.v3) or, for tekken.json, inside; vLLM takes tekken.json first.
    """
    names = found.files
    models = sorted(name for name in names if ".model" in name)
    versions = [int(match[1]) for name in models if (match := re.search(r"\.model\.v(\d+)(m\d+)?$", name))]
    if "tokenizer.json" not in names and ("tekken.json" in names or versions or (found.form == "consolidated" and models)):
        version = max(versions, default=1)
        if "tekken.json" in names:  # of a large file only the beginning is there, which is where the version stands
            said = re.search(rb'"version"\s*:\s*"v(\d{1,4})"', found.documents["tekken.json"])
            version = int(said[1]) if said else 3  # the first that Tekken had
        return Tokenizer("mistral", True, "mistral" if version >= 3 else None)
    if not any(name.startswith(TOKENIZERS) or name.endswith(".tiktoken") for name in names):
        raise UserError(
            f"{place}: {found.uri} has no tokenizer; add tokenizer.json, tekken.json or tokenizer.model of the model that it was made from",
            Exit.WEIGHTS,
        )
    return Tokenizer(
        "hf", "chat_template.jinja" in names or "chat_template" in _json(found, "tokenizer_config.json", place), None
    )


def _name(source: str) -> str:
    """The name of a model by that of its folder, of the letters that clouds, the API and the node take; `m-HASH` where it has others.

    >>> _name("My Model (2)"), _name("模型")
    ('my-model-2', 'm-c98e118e')
    """
    text = unicodedata.normalize("NFC", source).lower()
    slug = re.sub(r"[^a-z0-9._-]+", "-", text).strip("-._")[:100]
    return slug if text.isascii() and slug else f"m-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _named(uri: str) -> str:
    """The name of the weights at a URI: of their folder or file; in the hub's cache that of the repository."""
    path = (unquote(uri) if uri.startswith("file://") else uri.split("#")[0]).rstrip("/").removesuffix(".gguf")
    if cached := re.search(r"/models--[^/]+--([^/]+)/snapshots/[^/]+$", path):
        return _name(cached[1])
    return _name(path.rpartition("/")[2].partition("@")[0] if path.startswith("hf://") else path.rpartition("/")[2])


def _links(found: Described) -> tuple[tuple[str, str], ...]:
    """Where the files of a folder really lie, if one of them is a link."""
    folder = Path(unquote(found.uri.removeprefix("file://")))
    folder = folder.parent if folder.suffix == ".gguf" else folder
    paths = {name: folder / name for name in found.files}
    return (
        tuple((name, str(path.resolve())) for name, path in paths.items()) if any(p.is_symlink() for p in paths.values()) else ()
    )


def _json(found: Described, name: str, place: str) -> dict[str, Any]:
    """A small file of the set, {} where it has none; UserError if it is no JSON object, or too large for one."""
    if name not in found.documents:
        return {}
    try:
        if len(found.documents[name]) < found.files[name]:
            raise untrusted.NotRead(f"it has {found.files[name]} bytes, and at most {untrusted.MOST_BYTES} are read")
        return untrusted.read(found.documents[name])
    except untrusted.NotRead as error:
        raise UserError(
            f"{place}: {name} at {found.uri} cannot be read ({error}); correct it, or take a whole copy", Exit.WEIGHTS
        ) from None


def _model(uri: str, found: Described | None, place: str) -> Model:
    """The model at a URI; without a look at it (None) its shape is not known."""
    name = _named(uri)
    if found is None:
        unread = Stored(known=False)
        return Model(name, uri, "", None, "unknown", True, "hf", runs_on_cpu=True, note="read on the node", stored=unread)
    here = uri.startswith("file://")
    note = "a folder of this machine" if here else "read where it lies"
    links = _links(found) if here else ()
    if found.form == "gguf":
        sizes, stored = _gguf(found, place)
        small = sizes is None or sizes.parameters < SMALL
        stored = replace(stored, links=links)
        return Model(name, uri, "", sizes, "unknown", True, "hf", runs_on_cpu=small, note=note, stored=stored)
    shape, stored = _shape(found, place)
    tokenizer = _tokenizer(found, place)
    return Model(
        name=name, weights=uri, revision="", shape=shape, licence=found.license or "unknown", chat=tokenizer.chat,
        tokenizer_mode=tokenizer.mode, tool_parser=tokenizer.tool_parser, runs_on_cpu=shape.parameters < SMALL,
        note=note, stored=replace(stored, links=links),
    )  # fmt: skip


def _without_second_table(read: Shape, row: Shape) -> Shape:
    """Return a GGUF file's shape with the row's tables, if a second one is all that differs: that stands behind what is read of a large file."""
    second = (read.parameters - row.parameters, read.tables - row.tables) == (row.tables, row.tables)
    return replace(read, parameters=row.parameters, tables=row.tables) if second else read


def _of_row(row: Model, uri: str, found: Described | None, place: str) -> Model:
    """A row of the table whose weights come from another place, by a look at that."""
    if found is None:
        return replace(row, stored=Stored(known=False))
    there = _model(uri, found, place)
    if found.form == "gguf" and there.shape is not None and row.shape is not None:
        there = replace(there, shape=_without_second_table(there.shape, row.shape))
    if there.shape is not None and row.shape is not None and replace(there.shape, context=row.shape.context) != row.shape:
        sizes = {
            name: (getattr(there.shape, name), ours)
            for name, ours in vars(row.shape).items()
            if name not in ("context", "windows")
        }
        differs = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in sizes.items() if theirs != ours]
        differs = differs or ["other layers have its window"]
        raise UserError(f"{place}: {uri} is not {row.name}: {', '.join(differs)}; give it as MODEL instead")
    return replace(row, stored=there.stored)


def _look(uri: str, place: str, ask: bool, revision: str = "") -> Described | None:
    """What weights are; a folder is always looked at, other places when somebody may be asked."""
    here = uri.startswith("file://")
    if not here and not ask:
        return None
    from mistralctl import weights

    if here and any(character.isspace() or "\ud800" <= character <= "\udfff" for character in uri):
        raise UserError(f"{place}: {uri.removeprefix('file://')!r} contains a space or bytes that are no text; rename the folder")
    return weights.described(uri, revision, place)


def check(uri: str, revision: str, place: str) -> None:
    """UserError if a model lies at a URI that is not served; an adapter passes, what cannot be looked at from here, and what the table pins."""
    from mistralctl import weights

    if any((uri, revision) == (row.weights, row.revision) for row in MODELS.values() if row.checked != "described"):
        return
    found = weights.described(uri, revision, place)
    if found is not None and ("adapter_config.json" not in found.files or "config.json" in found.files):
        _model(uri, found, place)


def resolve(sourced: Sourced, *, ask: bool = False) -> Model:
    """The model that the spec means. A folder is read here; what lies at another URI is read if `ask`, else it is not known here."""
    value, place = sourced.spec.model, sourced.place("model")
    if value in MODELS:
        row, uri = MODELS[value], sourced.spec.weights
        if uri in (None, row.weights):
            seen = row.checked == "described" and _look(row.weights, place, ask, row.revision)
            return _of_row(row, row.weights, seen, place) if seen else row
        place = sourced.place("weights")
        return _of_row(row, uri, _look(uri, place, ask), place)
    if "://" in value:
        return _model(value, _look(value, place, ask), place)
    path = Path(value).expanduser().resolve()
    if not path.exists():
        raise UserError(f"{place}: {path} is not there; name a folder with config.json and *.safetensors", Exit.NOT_FOUND)
    uri = f"file://{str(path).replace('%', '%25')}"  # a URI's % begins an escape
    return _model(uri, _look(uri, place, ask), place)
