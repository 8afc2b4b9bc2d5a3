"""A model that is not a row of the table: a folder with config.json or params.json, or a URI."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mistral_contract import architecture, quantization

from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS, Model, Shape, Stored


def _shape(file: Path, place: str) -> tuple[Shape, Stored]:
    """The shape in config.json or params.json, and how the weights are quantized; UserError if such a model is not served."""
    try:
        config = json.loads(file.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: {file} cannot be read ({error}); correct it") from None
    try:
        found = architecture.read_params(config) if file.name == "params.json" else architecture.read(config)
        scheme = quantization.read(config, {name: _json(file.parent / name) for name in quantization.BESIDE})
        size = quantization.weight_bytes(scheme, found) if scheme else 0
    except architecture.Refused as refused:
        raise UserError(f"{place}: {file}: {refused}") from None
    except quantization.NotServed as refused:
        raise UserError(f"{place}: {file}: {refused}", Exit.WEIGHTS) from None
    tables = (1 if found.tied else 2) * found.vocabulary * found.hidden
    shape = Shape(found.parameters, tables, found.layers, found.kv_heads, found.head_dim, found.window, found.context)
    return shape, Stored(scheme, bytes=size)


class Tokenizer(NamedTuple):
    """How a folder's chat is tokenized: by mistral_common or by Hugging Face's files."""

    mode: Literal["mistral", "hf"]
    chat: bool
    tool_parser: str | None


def _tokenizer(path: Path, consolidated: bool) -> Tokenizer:
    """Hugging Face's tokenizer where it is there, else Mistral's: that one knows the chat, and from v3 on the calls of tools.

    The versions are in the names of the files (tokenizer.model.v3) or, for tekken.json, inside; vLLM takes tekken.json first.
    """
    tekken = path / "tekken.json"
    models = sorted(file.name for file in path.glob("*.model*"))
    versions = [int(match[1]) for name in models if (match := re.search(r"\.model\.v(\d+)(m\d+)?$", name))]
    if not (path / "tokenizer.json").exists() and (tekken.exists() or versions or (consolidated and models)):
        version = max(versions, default=1)
        if tekken.exists():
            said = _json(tekken).get("config")
            match = re.fullmatch(r"v(\d+)", str(said.get("version"))) if isinstance(said, dict) else None
            version = int(match[1]) if match else 3  # the first that Tekken had
        return Tokenizer("mistral", True, "mistral" if version >= 3 else None)
    template = (path / "chat_template.jinja").exists() or "chat_template" in _json(path / "tokenizer_config.json")
    return Tokenizer("hf", template, None)


def _name(source: str) -> str:
    """The name of a model by that of its folder, of the letters that clouds, the API and the node take; `m-HASH` where it has others.

    >>> _name("My Model (2)"), _name("模型")
    ('my-model-2', 'm-c98e118e')
    """
    text = unicodedata.normalize("NFC", source).lower()
    slug = re.sub(r"[^a-z0-9._-]+", "-", text).strip("-._")[:100]
    return slug if text.isascii() and slug else f"m-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _folder(path: Path, place: str) -> Model:
    if not path.is_dir():
        raise UserError(f"{place}: {path} is not a folder; name a folder with config.json and *.safetensors", Exit.NOT_FOUND)
    names = [file.name for file in path.iterdir()]
    file = path / architecture.config_file(names)
    if not file.exists():
        raise UserError(
            f"{place}: {file} is missing; name a folder in Hugging Face format, or one with consolidated.safetensors and params.json",
            Exit.NOT_FOUND,
        )
    shape, stored = _shape(file, place)
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{place}: {path} has no *.safetensors file; pickled weights are never loaded", Exit.NOT_FOUND)
    if any(character.isspace() or "\ud800" <= character <= "\udfff" for character in str(path)):
        raise UserError(f"{place}: {str(path)!r} contains a space or bytes that are no text; rename the folder")
    tokenizer = _tokenizer(path, file.name == "params.json")
    return Model(
        name=_name(path.name), weights=f"file://{path}", revision="", shape=shape, licence="unknown", chat=tokenizer.chat,
        tokenizer_mode=tokenizer.mode, tool_parser=tokenizer.tool_parser, runs_on_cpu=shape.parameters < 1_000_000_000,
        note="a folder of this machine", stored=stored,
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def resolve(sourced: Sourced) -> Model:
    """The model that the spec means. A URI's shape is not known here (None); a folder's is read from its own files."""
    value = sourced.spec.model
    if value in MODELS:
        row, weights = MODELS[value], sourced.spec.weights
        return row if weights in (None, row.weights) else replace(row, stored=Stored(known=False))
    place = sourced.place("model")
    if value.startswith("file://"):
        return _folder(Path(value.removeprefix("file://")), place)
    if "://" in value:
        name = _name(value.split("#")[0].rstrip("/").rsplit("/", 1)[-1])
        unread = Stored(known=False)
        return Model(name, value, "", None, "unknown", True, "hf", runs_on_cpu=True, note="read on the node", stored=unread)
    return _folder(Path(value).expanduser().resolve(), place)
