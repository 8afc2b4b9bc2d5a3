"""A model that is not a row of the table: a folder with a config.json, or a URI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mistralctl.config import Sourced
from mistralctl.errors import Exit, UserError
from mistralctl.models import MODELS, Model, Shape


def _layers(config: dict[str, Any], default: int | None) -> int | None:
    """The window of a config.json: None when switched off, or when `layer_types` names no sliding layer."""
    kinds = config.get("layer_types")
    if config.get("use_sliding_window") is False or (kinds and "sliding_attention" not in kinds):
        return None
    return default


def _shape(config: dict[str, Any], parameters: int) -> Shape:
    heads = int(config["num_attention_heads"])
    return Shape(
        parameters=parameters,
        layers=int(config["num_hidden_layers"]),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        sliding_window=_layers(config, config.get("sliding_window")),
        context=int(config["max_position_embeddings"]),
    )


def _parameters(config: dict[str, Any]) -> int:
    """Parameters by the sizes of a Mistral-shaped decoder: attention, gated MLP, two norms a layer, embedding and head."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv = int(config.get("num_key_value_heads") or heads) * head_dim
    layer = 2 * hidden * heads * head_dim + 2 * hidden * kv + 3 * hidden * int(config["intermediate_size"]) + 2 * hidden
    tables = 1 if config.get("tie_word_embeddings") else 2
    return int(config["num_hidden_layers"]) * layer + tables * int(config["vocab_size"]) * hidden + hidden


def _folder(path: Path, place: str) -> Model:
    file = path / "config.json"
    if not path.is_dir():
        raise UserError(f"{place}: {path} is not a folder; name a folder with config.json and *.safetensors", Exit.NOT_FOUND)
    try:
        config = json.loads(file.read_text("utf-8"))
        shape = _shape(config, _parameters(config))
    except FileNotFoundError:
        raise UserError(f"{place}: {file} is missing; name a folder in Hugging Face format", Exit.NOT_FOUND) from None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{place}: {file} is not the configuration of a Mistral model ({error!r}); correct it") from None
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{place}: {path} has no *.safetensors file; pickled weights are never loaded", Exit.NOT_FOUND)
    if any(character.isspace() for character in str(path)):
        raise UserError(f"{place}: {str(path)!r} contains a space; rename the folder")
    template = (path / "chat_template.jinja").exists() or "chat_template" in _json(path / "tokenizer_config.json")
    mistral = (path / "tekken.json").exists() or (path / "params.json").exists()
    return Model(
        name=path.name.lower(), weights=f"file://{path}", revision="", shape=shape, licence="unknown", chat=template,
        tokenizer_mode="mistral" if mistral and not (path / "tokenizer.json").exists() else "hf",
        runs_on_cpu=shape.parameters < 1_000_000_000, note="a folder of this machine",
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def resolve(sourced: Sourced) -> Model:
    """The model that the spec means. A URI's shape is not known here (None); a folder's is read from its config.json."""
    value = sourced.spec.model
    if value in MODELS:
        return MODELS[value]
    place = sourced.place("model")
    if value.startswith("file://"):
        return _folder(Path(value.removeprefix("file://")), place)
    if "://" in value:
        name = value.split("#")[0].rstrip("/").rsplit("/", 1)[-1].lower()
        return Model(name, value, "", None, "unknown", True, "hf", runs_on_cpu=True, note="read on the node")
    return _folder(Path(value).expanduser().resolve(), place)
