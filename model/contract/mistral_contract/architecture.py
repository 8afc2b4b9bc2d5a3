"""Which models the class computes exactly as Hugging Face does: read from config.json or params.json, or refused by name.

Three lists decide, and each entry was either proven equal (tests/plugin/test_architectures.py) or does not compute:

- model types: only those of TYPES are served;
- fields that are READ, or whose value is one that changes nothing (NEUTRAL), or that change nothing at all (HARMLESS);
- rotary embeddings: only those of ROPES.

Any other field is tolerated unless its name speaks of computing (COMPUTES) and its value is not "off". Hugging Face's classes ignore
fields that they do not know, so such a field is either a leftover or the mark of a model that was given another type's name. Refusing every
unknown field would refuse the notes that training tools leave in fine-tuned models (`unsloth_fixed`, `axolotl_config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_contract import untrusted

FULL, SLIDING = "full_attention", "sliding_attention"
CONSOLIDATED = "transformer"  # the model type that vLLM gives to what it reads from params.json


class Refused(untrusted.Refusal):
    """Why a model is not served and what to do."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that is served. `windows` has one entry a layer: tokens, or None for full attention.

    `context` is the longest sequence as vLLM 0.32 derives it (vllm/config/model.py, _get_and_verify_max_len).
    """

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope_type: str
    context: int
    tied: bool

    @property
    def window(self) -> int | None:
        """The largest window of a layer; None where every layer attends to everything."""
        return max((window for window in self.windows if window is not None), default=None)

    @property
    def parameters(self) -> int:
        """Attention, gated MLP and two norms a layer; embedding, head and the final norm."""
        queries, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * queries + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden


# What Hugging Face (transformers 5.19, configuration_*.py) takes for a field that is missing, and the rotary embeddings that are served.
TYPES: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "llama": {"num_key_value_heads": None, "sliding_window": None, "max_position_embeddings": 2048},
    # vllm/transformers_utils/configs/mistral.py
    CONSOLIDATED: {"num_key_value_heads": None, "sliding_window": None, "max_position_embeddings": 128_000},
}
ARCHITECTURES = {
    "MistralForCausalLM", "MinistralForCausalLM", "LlamaForCausalLM", "LLaMAForCausalLM", "MistralSWAForCausalLM",
}  # fmt: skip
# Rotary embeddings that vLLM computes as Hugging Face does, with the fields that each has besides COMMON_ROPE. Not among them: `dynamic` and
# `longrope`, whose angles depend on the length of the prompt in Hugging Face and on the longest possible one in vLLM.
ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}  # fmt: skip
NEEDED_ROPE = {"default": (), "linear": ("factor",), "llama3": ROPES["llama3"], "yarn": ("factor",)}
COMMON_ROPE = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned")
# All that vLLM takes for the length of the context (vllm/transformers_utils/model_arch_config_convertor.py): the smallest of them.
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
MOST_POSITIONS = 1 << 24  # vLLM makes a table with a row for each position before it serves
READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "auto_map", *LENGTHS,
}  # fmt: skip
# Fields that compute with any value but these and None.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "hidden_activation": ("silu", "swish"), "activation_function": ("silu", "swish"),
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rotary_emb_fraction": (1,), "use_rope": (True,), "rotary": (True,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "logit_scale": (1,), "scale_emb": (1,),
    "is_causal": (True,), "causal": (True,), "position_embedding_type": ("rope", "absolute"),  # `absolute`: the default of old transformers
}  # fmt: skip
HARMLESS = {
    # read by nobody who computes logits: training, generation, bookkeeping
    "initializer_range", "use_cache", "pretraining_tp", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "pruned_heads", "neftune_noise_alpha", "gradient_checkpointing", "keys_to_ignore_at_inference", "task_specific_params",
    "top_k",
    # which kernel, not what it computes
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "_flash_attn_2_enabled",
    "flash_attention", "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
    # how weights are stored: judged where they are loaded
    "quantization_config", "compression_config", "quantization",
}  # fmt: skip
COMPUTES = re.compile(
    r"bias|scal|multiplier|softcap|soft_cap|norm|rope|rotary|theta|position|alibi|window|sliding|chunk|attn|attention|expert|moe|router"
    r"|mlp|ffn|feed_forward|layer|resid|embed|logit|head|hidden|activation|gate|gating|ssm|mamba|conv|latent|mup|sparse|sink|encoder|vision"
    r"|audio|multimodal|text_config|mscale|bidirectional|(^|_)(act|alpha|beta|qk|q|k|v|kv|lora|causal|adapter|yarn|ntk|emb|mtp)(_|$)",
    re.IGNORECASE,
)
DROPOUT = re.compile(r"dropout|pdrop")
SERVED = "the class serves the model types mistral, ministral and llama"


def config_file(names: Iterable[str]) -> str:
    """The file that describes the weights of a folder with files of these names.

    params.json where there are weights in Mistral's own format only (consolidated*.safetensors), else config.json.
    """
    found = set(names)
    tensors = [name for name in found if name.endswith(".safetensors")]
    consolidated = [name for name in tensors if name.startswith("consolidated")]
    own = "params.json" in found and consolidated
    return "params.json" if own and not ("config.json" in found and len(tensors) > len(consolidated)) else "config.json"


def read_file(name: str, text: str | bytes) -> Architecture:
    """The model of a config.json or params.json, by its text; Refused if it is not served, ValueError if it cannot be read."""
    config = untrusted.read(text)
    return read_params(config) if name == "params.json" else read(config)


def read_folder(folder: Path) -> Architecture:
    """The model whose weights lie in a folder; Refused, naming the file, if it is not served or cannot be read."""
    file = folder / config_file(path.name for path in folder.iterdir())
    try:
        return read_file(file.name, untrusted.contents(file, untrusted.MOST_BYTES))
    except FileNotFoundError:
        raise Refused(f"{file} is missing; mirror the whole model, not only its tensors") from None
    except Refused as refused:
        raise Refused(f"{file}: {refused}") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read ({error}); mirror the model again") from None


def read(config: Mapping[str, Any]) -> Architecture:
    """The model of a config.json (or of a Hugging Face configuration's `to_dict`); Refused if it is not served."""
    kind, names = config.get("model_type"), config.get("architectures") or []
    names = [str(name) for name in names] if isinstance(names, list) else [str(names)]
    named = f"model type {kind!r}" + (f" ({', '.join(names)})" if names else "")
    if not isinstance(kind, str) or kind not in TYPES or not ARCHITECTURES.issuperset(names):
        raise Refused(f"{named} is not served; {SERVED}, choose one of these or serve it with vLLM's own class")
    if isinstance(config.get("auto_map"), Mapping) and "AutoModelForCausalLM" in config["auto_map"]:
        raise Refused("auto_map: the model is computed by code of its own, which is never run; choose one without")
    config = TYPES[kind] | dict(config)
    for field, value in config.items():
        if not _changes_nothing(field, value):
            raise _other(field, value)

    hidden, heads, layers = _size(config, "hidden_size"), _size(config, "num_attention_heads"), _size(config, "num_hidden_layers")
    if config.get("head_dim") is None and (hidden % heads or kind == "ministral"):
        raise Refused("head_dim is missing; take the file that belongs to the weights")
    head_dim = hidden // heads if config.get("head_dim") is None else _size(config, "head_dim")
    kv_heads = heads if config["num_key_value_heads"] is None else _size(config, "num_key_value_heads")
    if heads % kv_heads or head_dim % 2:
        raise Refused(
            f"{heads} query heads, {kv_heads} key-value heads and head_dim {head_dim} do not fit together; correct the file"
        )
    if config.get("rms_norm_eps") is not None:
        _number("rms_norm_eps", config["rms_norm_eps"], 0)
    rope_type, context = _rope_and_context(config)
    return Architecture(
        kind, _size(config, "vocab_size"), hidden, _size(config, "intermediate_size"), layers, heads, kv_heads, head_dim,
        _windows(config, layers), rope_type, context, bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


# params.json, Mistral's own format, in the words of config.json, as vLLM translates it.
PARAMS = {
    "dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings", "activation": "hidden_act",
}  # fmt: skip


def read_params(params: Mapping[str, Any]) -> Architecture:
    """The model of a params.json; Refused if it is not served."""
    if str(params.get("model_type", CONSOLIDATED)) not in ("mistral", CONSOLIDATED):
        raise Refused(f"model type {params['model_type']!r} is not served; {SERVED}")
    for name in ("rope_theta", "norm_eps"):
        if not params.get(name):
            raise Refused(f"{name} is missing; take the params.json that belongs to the weights")
    config = {PARAMS.get(name, name): value for name, value in params.items()} | {"model_type": CONSOLIDATED}
    window = config.get("sliding_window")
    if isinstance(window, list):  # one entry a layer, repeated
        layers = _size(config, "num_hidden_layers")
        if not window or layers % len(window) or len({str(entry) for entry in window if entry is not None}) != 1:
            raise Refused(
                f"sliding_window = {_short(window)} is no pattern of one window over {layers} layers; take another model"
            )
        config["layer_types"] = [FULL if entry is None else SLIDING for entry in window] * (layers // len(window))
        config["sliding_window"] = next(entry for entry in window if entry is not None)
    return read(config)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other(field: str, value: object) -> Refused:
    return Refused(
        f"{field} = {_short(value)} asks for a computation that the class does not have; serve this model with vLLM's own class"
    )


def _changes_nothing(field: str, value: object) -> bool:
    if field in NEUTRAL:
        return value is None or value in NEUTRAL[field]
    if field == "no_rope_layers" and isinstance(value, list):  # 1: this layer has a rotary embedding
        return all(entry == 1 for entry in value)
    return not value or field in READ or field in HARMLESS or not COMPUTES.search(field) or bool(DROPOUT.search(field))


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if value is None:
        raise Refused(f"{field} is missing; take the file that belongs to the weights")
    most = 1 << (12 if field == "num_hidden_layers" else 31)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise Refused(f"{field} = {_short(value)} should be a whole number from 1 to {most}; correct the file")
    return value


def _number(where: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise Refused(f"{where} = {_short(value)} should be a number, at least {least:g}; correct the file")
    return value


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer. `layer_types` decides layer by layer where it is there; otherwise `sliding_window` holds for all.

    Hugging Face's llama has no window, and its mistral knows neither `use_sliding_window` nor `max_window_layers`: where one
    of these says something else than `sliding_window`, what was meant cannot be known.
    """
    window, kinds = config["sliding_window"], config.get("layer_types")
    if window is not None:
        window = _size(config, "sliding_window")
        if config["model_type"] == "llama":
            raise _other("sliding_window", window)
        for name, agreed in (("use_sliding_window", (None, True)), ("max_window_layers", (None, 0))):
            if config.get(name) not in agreed:
                raise Refused(
                    f"{name} = {_short(config[name])} and sliding_window = {window} contradict each other: Hugging Face computes with the "
                    "window; remove one of them"
                )
    if kinds is None:
        return (window,) * layers
    if not isinstance(kinds, list) or len(kinds) != layers or not {FULL, SLIDING}.issuperset(map(str, kinds)):
        raise Refused(
            f"layer_types = {_short(kinds)} should name {FULL} or {SLIDING} for each of {layers} layers; take another model"
        )
    if window is None and SLIDING in kinds:
        raise Refused(f"layer_types names {SLIDING}, and sliding_window is missing; correct the file")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _rope_and_context(config: Mapping[str, Any]) -> tuple[str, int]:
    """The type of the rotary embedding, and the longest sequence: as vLLM derives it, and within the angles that it computes."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise Refused(f"rope_parameters = {_short(rope)} should be one rotary embedding for all layers; take another model")
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if rope.get("type", kind) != kind:
        raise Refused(f"the rotary embedding has the type {rope['type']!r} and the rope_type {kind!r}; correct the file")
    if kind not in ROPES or (config["model_type"] == CONSOLIDATED and kind != "default"):
        raise Refused(
            f"rope type {kind!r} is not computed as Hugging Face does; served are {', '.join(ROPES)}, choose another model"
        )
    for name, value in rope.items():
        neutral = not value or (name in ("partial_rotary_factor", "factor", "attention_factor") and value == 1)
        if name not in (*COMMON_ROPE, *ROPES[kind]) and not neutral:
            raise _other(f"rope_parameters.{name}", value)
    _number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0)), 1)
    for name in ROPES[kind]:
        if name in NEEDED_ROPE[kind] or (name.startswith("beta_") and name in rope):
            _number(f"rope_parameters.{name}", rope.get(name), 1 if name == "factor" else 1e-6)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise Refused("rope_parameters.low_freq_factor should be below high_freq_factor; correct the file")

    trained, factor = _size(config, "max_position_embeddings"), rope.get("factor", 1)
    context: float = min(_size(config, name) for name in LENGTHS if config.get(name) is not None)
    context = config.get("model_max_length") or context
    positions: float = trained
    if kind == "linear":
        context, positions = context * factor, trained * factor
    elif kind in ("yarn", "llama3"):
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or trained
        original = _number("original_max_position_embeddings", original, 1)
        positions = original * factor if kind == "yarn" else trained
    if max(context, positions) > MOST_POSITIONS:
        raise Refused(
            f"rope_parameters.factor = {_short(factor)} makes a context of {max(context, positions):g} tokens, which no model was "
            f"trained for (at most {MOST_POSITIONS}); correct the file"
        )
    if context > positions:
        raise Refused(
            f"a context of {int(context)} tokens is beyond the {int(positions)} positions of its rotary embedding; correct the file"
        )
    return kind, int(context)
