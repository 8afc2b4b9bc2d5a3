"""The envs of a task, one row each: from these rows come the template, the docs, what the laptop writes and what the node reads.

`Serve`, `Mirror` and `Finetune` are the kinds of tasks. A value is text on its way and typed on both sides; empty text means "not set".
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from mistral_contract import keys as key_files
from mistral_contract import vllm_options
from mistral_contract.engines import ENGINES, VLLM
from mistral_contract.keys import Keys
from mistral_contract.quantization import METHODS

T = TypeVar("T")

PREFIX = "MISTRALCTL_"
# Set by the launcher for vLLM alone: the folder that both write, and the sha256 of the key that the launcher asks with.
RUN_DIR, NODE_KEY = f"{PREFIX}RUN_DIR", f"{PREFIX}NODE_KEY"


@dataclass(frozen=True)
class Kind:
    """A type of value: what the docs call it, how it is read (ValueError with what it should be) and written."""

    text: str
    read: Callable[[str], Any] = str
    write: Callable[[Any], str] = str


def _number(low: int, high: int) -> Kind:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"should be a whole number from {low} to {high}")
        return int(text)

    return Kind(f"{low} to {high}", read)


def _one_of(*words: str) -> Kind:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"should be one of {', '.join(words)}")
        return text

    return Kind(", ".join(f"`{word}`" for word in words), read)


def _matching(pattern: str) -> Kind:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should match {pattern}")
        return text

    return Kind("`" + pattern.replace("|", "\\|") + "`", read)


def _share(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 0.99:
        raise ValueError("should be from 0.1 to 0.99")
    return value


def _usd(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,4})?", text) or float(text) == 0:
        raise ValueError("should be an amount above 0 such as 5 or 0.8048")
    return float(text)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("should be above 0 and at most 1, such as 0.0002")
    return value


def _flag(text: str) -> bool:
    if text != "yes":
        raise ValueError("should be yes, or empty")
    return True


def _strings(text: str) -> tuple[str, ...]:
    data = json.loads(text)
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise ValueError("should be a JSON list of strings")
    return tuple(data)


def _arguments(text: str) -> tuple[str, ...]:
    found = _strings(text)
    vllm_options.check(found)
    return found


def _networks(text: str) -> tuple[str, ...]:
    found = _strings(text)
    for item in found:
        ipaddress.ip_network(item)
    return found


def _adapters(text: str) -> dict[str, str]:
    data = json.loads(text)
    named = isinstance(data, dict) and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key) for key in data)
    if not named or not all(isinstance(value, str) for value in data.values()):
        raise ValueError("should be a JSON object of adapter names")
    return dict(data)


def _list(value: tuple[str, ...]) -> str:
    return json.dumps(list(value))


def _object(value: Mapping[str, str]) -> str:
    return json.dumps(dict(value))


TEXT = Kind("text")
NAME = _matching(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
FOLDER = Kind("folder", lambda text: Path(text).expanduser().absolute())
IDENTIFIER = _matching(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHARE = Kind("0.1 to 0.99", _share)
NETWORKS = Kind("JSON list", _networks, _list)
ARGUMENTS = Kind("JSON list", _arguments, _list)
ADAPTERS = Kind("JSON object", _adapters, _object)
KEYS = Kind("JSON object", key_files.read, Keys.dump)
STRINGS = Kind("JSON list", _strings, _list)
MINUTES = _number(1, 1 << 20)
USD = Kind("USD, at most 4 decimals", _usd, "{:.4f}".format)

RATE = Kind("above 0, at most 1", _rate, "{:.8g}".format)
FLAG = Kind("`yes` or empty", _flag, lambda value: "yes" if value else "")


@dataclass(frozen=True)
class Env:
    """One row. `readers` are who reads it; `template` is its value in the template of a task, where that is not the example."""

    field: str
    kind: Kind
    meaning: str
    example: str
    readers: tuple[str, ...]
    default: Any
    template: str

    @property
    def name(self) -> str:
        """The name of the variable."""
        return variable(self.field)

    @property
    def required(self) -> bool:
        """Whether a task without it is wrong."""
        return self.default is MISSING

    def read(self, environ: Mapping[str, str]) -> Any:
        """Its value; ValueError that names it if that is missing or wrong."""
        text = environ.get(self.name, "")
        if text == "" and not self.required:
            return self.default
        try:
            if text == "":
                raise ValueError("is missing")
            return self.kind.read(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name} {error}") from error

    def write(self, value: Any) -> str:
        """Its text; ValueError that names it if the node would not read that."""
        text = "" if value is None else self.kind.write(value)
        self.read({self.name: text})
        return text


def _env(  # noqa: PLR0913 - the columns of a row
    kind: Kind, meaning: str, example: str, readers: str, *, default: Any = MISSING, template: str | None = None
) -> Any:  # what `field` gives has the type of the field
    row = {"kind": kind, "meaning": meaning, "example": example, "readers": tuple(readers.split()), "template": template or ""}
    if template is None:
        row["template"] = example
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"env": row | {"default": default}})
    return field(default=default, metadata={"env": row | {"default": default}})


def variable(field: str) -> str:
    """The name of the variable of a field.

    >>> variable("name")
    'MISTRALCTL_NAME'
    """
    return PREFIX + field.upper()


def of(task: Any) -> tuple[Env, ...]:
    """The rows of a kind of task, in the order of its template."""
    return tuple(Env(one.name, **one.metadata["env"]) for one in fields(task) if "env" in one.metadata)


def value(task: Any, name: str, environ: Mapping[str, str]) -> Any:
    """One value of a task, for who needs no more; ValueError that names it if it is wrong."""
    return next(env for env in of(task) if env.field == name).read(environ)


def read(task: type[T], environ: Mapping[str, str]) -> T:
    """What the node is told; ValueError with every variable that is wrong, in one line."""
    values, problems = {}, []
    for env in of(task):
        try:
            values[env.field] = env.read(environ)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return task(**values)


def write(task: Any) -> dict[str, str]:
    """A task's envs, each one read as the node will read it; ValueError if the node would refuse one."""
    return {env.name: env.write(getattr(task, env.field)) for env in of(task)}


def names() -> Iterator[str]:
    """Every variable of every kind of task."""
    yield from dict.fromkeys(env.name for task in (Serve, Mirror, Finetune) for env in of(task))


@dataclass(frozen=True, kw_only=True)
class Serve:
    """What a node shall serve. Lengths are tokens; None means no limit or not set. ValueError if values contradict each other."""

    name: str = _env(NAME, "name of the deployment", "mistral", "set-up run watch launcher")
    node_dir: Path = _env(
        FOLDER, "the one folder in which the node keeps its things; a leading `~` is the home folder", "~/.mistralctl",
        "set-up run watch launcher laptop",
    )  # fmt: skip
    device: str = _env(_one_of("cuda", "cpu"), "what the model runs on", "cuda", "set-up launcher")
    engine: str = _env(
        _one_of(*ENGINES), "what computes: vLLM with our class, or vllm_mistral.reference", "vllm", "launcher guard", default=VLLM, template=VLLM
    )  # fmt: skip
    python: str = _env(TEXT, "Python version of the node's environment", "3.11", "set-up")
    env_id: str = _env(
        TEXT, "name of the node's environment, a hash of all that it is made from: requirements, the versions of all packages, the script "
        "that installs them, Python's version", "cpu-3f9a0c12d4e5", "set-up run laptop", template="cuda-by-hand",
    )  # fmt: skip
    model: str = _env(
        TEXT, "row of the model table or name of a folder; `custom` where the laptop does not know the shape", "mistral-7b-instruct-v0.1",
        "launcher",
    )  # fmt: skip
    weights: str = _env(
        TEXT, "where the weights come from: `hf://`, `s3://`, `gs://`, `az://`, `file://`, `pypi://`",
        "hf://mistralai/Mistral-7B-Instruct-v0.1", "set-up laptop",
    )  # fmt: skip
    revision: str = _env(
        TEXT, "commit of the weights, where the store knows commits", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca", "set-up laptop",
        default="",
    )  # fmt: skip
    weights_digest: str = _env(
        _matching(r"sha256:[0-9a-f]{64}"), "digest that the weights must have: of the names, sizes and sha256 of all files; not set: any. No "
        "part of MISTRALCTL_SERVING_ID", "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "set-up launcher laptop",
        default="", template="",
    )  # fmt: skip
    weights_id: str = _env(
        IDENTIFIER, "name of the folder that the weights lie in: `NODE_DIR/weights/ID`", "mistral-7b-instruct-v0.1-0b1c2d3e",
        "set-up launcher laptop", template="mistral-7b-instruct-v0.1",
    )  # fmt: skip
    served_name: str = _env(TEXT, "`model` in the OpenAI API", "mistral-7b-instruct-v0.1", "launcher")
    host: str = _env(TEXT, "address on which the server listens", "127.0.0.1", "launcher")
    port: int = _env(_number(1, 65535), "port on which the server listens", "8000", "launcher")
    tls: str | None = _env(
        _matching(r"self-signed|own-[0-9a-f]{12}"), "`self-signed` (the node makes key and certificate), `own-HASH` (the laptop sends the "
        "user's); not set: plain HTTP, which is only served on loopback", "self-signed", "launcher", default=None, template="",
    )  # fmt: skip
    allow: tuple[str, ...] = _env(
        NETWORKS,
        "networks whose addresses may ask; empty: every address",
        '["203.0.113.0/24"]',
        "guard laptop",
        default=(),
        template="[]",
    )
    serve_user: str | None = _env(
        _matching(r"[a-z][a-z0-9-]{0,30}"), "user that vLLM runs as, made on the node where it is missing; not set: the one who runs the "
        "launcher", "mistralctl-serve", "launcher", default=None,
    )  # fmt: skip
    max_model_len: int = _env(_number(1, 1 << 24), "longest prompt plus answer, tokens", "32768", "launcher")
    max_num_seqs: int = _env(_number(1, 1 << 16), "most requests that run at once", "64", "launcher")
    max_batched_tokens: int = _env(_number(1, 1 << 20), "tokens of one scheduler step (the prefill chunk)", "1024", "launcher")
    sliding_window: int | None = _env(
        _number(1, 1 << 24), "the window that the engine must have, tokens; not set: none", "4096", "launcher", default=None
    )
    tensor_parallel: int = _env(_number(1, 64), "number of GPUs that share the model", "1", "set-up launcher")
    dtype: str = _env(
        _one_of("auto", "bfloat16", "float16", "float32"), "dtype of weights and activations", "bfloat16", "launcher"
    )
    quantization: str | None = _env(
        _one_of(*METHODS), "must be what the weights are quantized with, if they are; `fp8` quantizes others while they load; not set: as "
        "the weights are", "fp8", "launcher", default=None, template="",
    )  # fmt: skip
    memory_utilization: float | None = _env(
        SHARE, "share of the GPU's memory that vLLM may take (cuda)", "0.92", "launcher", default=None
    )
    kv_cache_gib: int | None = _env(_number(1, 4096), "GiB of KV cache (cpu)", "4", "launcher", default=None, template="")
    tokenizer_mode: str = _env(_one_of("mistral", "hf"), "`mistral` is mistral_common's tokenizer", "mistral", "launcher")
    tool_parser: str | None = _env(
        _matching(r"[a-z0-9_]+"), "vLLM's name of a tool-call parser", "mistral", "launcher", default=None, template=""
    )
    chat_template: str = _env(
        _one_of("own", "none"), "`own` (comes with the tokenizer) or `none` (a base model: no chat)", "own", "guard", default="own",
    )  # fmt: skip
    lora: dict[str, str] = _env(
        ADAPTERS, "adapter name to URI", '{"sql": "s3://bucket/sql"}', "set-up launcher laptop", default={}, template="{}"
    )
    lora_versions: dict[str, str] = _env(
        ADAPTERS, "adapter name to what the laptop saw of its content (a hash; empty: nothing): another one is another deployment",
        '{"sql": "3f9a0c12d4e5"}', "laptop", default={}, template="{}",
    )  # fmt: skip
    vllm_args: tuple[str, ...] = _env(
        ARGUMENTS, "further arguments of `vllm serve`, each in one piece; both sides ask `mistral_contract.vllm_options` which are open",
        '["--seed=7"]', "launcher guard", default=(), template="[]",
    )  # fmt: skip
    idle_minutes: int | None = _env(
        MINUTES, "end after so many minutes without a request; not set: never", "30", "launcher laptop", default=None
    )
    ttl_minutes: int | None = _env(
        MINUTES, "end after so many minutes in any case (`ends_at` may put it off); not set: never", "720", "watch launcher laptop",
        default=None,
    )  # fmt: skip
    setup_minutes: int | None = _env(
        MINUTES, "of a rented machine: where no server was started after so many minutes, the machine is ended. SkyPilot's autostop waits for a "
        "set-up for ever; the laptop waits for it for 60 minutes. Not set: never", "60", "set-up watch", default=None,
    )  # fmt: skip
    budget: float | None = _env(
        USD, "end when the machine has cost so much, by MISTRALCTL_PRICE and the time since its start, set-up included; not set: never",
        "5.0000", "watch launcher laptop", default=None, template="",
    )  # fmt: skip
    price: float | None = _env(
        USD, "of the machine an hour; where several may be rented, the dearest's. Set with MISTRALCTL_BUDGET alone", "0.8048",
        "watch launcher laptop", default=None, template="",
    )  # fmt: skip
    restart: int = _env(
        _number(0, 100),
        "times that a server which was ready and died is started again (below); not set: never",
        "2",
        "launcher",
        default=0,
    )
    serving_id: str = _env(
        TEXT, "hash of the serving options, so that `up` can tell whether anything changed", "9c1a77e0b2d4", "launcher laptop", default="",
        template="by-hand",
    )  # fmt: skip
    keys: Keys | None = _env(
        KEYS, "the keys that are let in, as in a keys file (below): hashes, which anybody may read; no part of MISTRALCTL_SERVING_ID",
        '{"version": 1, "serial": 1795478400, "keys": []}', "launcher", default=None, template="",
    )  # fmt: skip
    keys_uri: str | None = _env(
        _matching(r"(s3|gs|az|file)://\S+/[^/\s]+"), "an object that holds the keys, as in a keys file: the launcher reads it every 3 s, with the "
        "machine's role, and takes up what is newer; not set: none", "s3://bucket/keys.json", "set-up launcher laptop", default=None, template="",
    )  # fmt: skip
    secrets: tuple[str, ...] = _env(
        STRINGS, "what set-up and launcher wait for in secrets.json: `hf_token`, `address`, `tls_certificate`, `tls_key`; empty: nothing",
        '["hf_token"]', "set-up launcher", default=(),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.host != "127.0.0.1" and not self.tls:
            raise ValueError(f"{PREFIX}HOST {self.host} is reached from elsewhere and needs {PREFIX}TLS")
        if self.budget is not None and self.price is None:
            raise ValueError(f"{PREFIX}BUDGET needs {PREFIX}PRICE")


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Which weights a machine shall bring from one store to another."""

    name: str = _env(NAME, "name of the mirror", "mirror", "mirror")
    node_dir: Path = _env(FOLDER, "as for a server", "~/.mistralctl", "mirror")
    python: str = _env(TEXT, "as for a server", "3.11", "mirror")
    env_id: str = _env(
        TEXT, "name of an environment with torch, which computes the canary's figures; not set: none are computed", "cpu-3f9a0c12d4e5",
        "mirror", default="", template="",
    )  # fmt: skip
    mirror_source: str = _env(
        TEXT, "where the weights come from, as `MISTRALCTL_WEIGHTS`", "hf://mistralai/Mistral-7B-Instruct-v0.1", "mirror"
    )
    mirror_target: str = _env(TEXT, "where they go: `s3://`, `gs://`, `az://`", "s3://bucket/mistral-7b-instruct-v0.1", "mirror")
    revision: str = _env(TEXT, "as for a server", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca", "mirror", default="")
    ttl_minutes: int | None = _env(
        MINUTES, "the mirror is ended after so many minutes; not set: never", "240", "mirror", default=None
    )
    setup_minutes: int | None = _env(MINUTES, "as for a server", "60", "mirror", default=None)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What a machine shall train, from which chats, and where the result goes. Lengths are tokens. ValueError if values contradict each other.

    `finetune` is model/node/finetune.sh, `tune` is mistral_tune.
    """

    name: str = _env(NAME, "name of the run", "finetune", "finetune watch tune")
    node_dir: Path = _env(FOLDER, "as for a server", "~/.mistralctl", "finetune watch tune laptop")
    device: str = _env(_one_of("cuda", "cpu"), "what the training runs on", "cuda", "finetune tune")
    python: str = _env(TEXT, "as for a server", "3.11", "finetune")
    env_id: str = _env(
        TEXT, "name of vLLM's environment, in which the result is proven", "cuda-3f9a0c12d4e5", "finetune laptop", template="cuda-by-hand"
    )  # fmt: skip
    tune_env_id: str = _env(
        TEXT, "name of the environment that trains, a hash of all that it is made from", "tune-cuda-3f9a0c12d4e5", "finetune",
        template="tune-cuda-by-hand",
    )  # fmt: skip
    gpus: int = _env(_number(1, 64), "number of GPUs that train; 1 on a CPU", "1", "finetune tune")
    model: str = _env(
        TEXT, "row of the model table or name of a folder, for the card of what is published", "mistral-7b-instruct-v0.1", "tune"
    )  # fmt: skip
    base: str = _env(
        TEXT, "repository of the base model on the hub, or another name of it: `base_model_name_or_path` of the adapter",
        "mistralai/Mistral-7B-Instruct-v0.1", "tune",
    )  # fmt: skip
    base_revision: str = _env(
        TEXT, "commit of that repository; not set: not known", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca", "tune", default=""
    )  # fmt: skip
    weights: str = _env(TEXT, "as for a server", "hf://mistralai/Mistral-7B-Instruct-v0.1", "finetune laptop")
    revision: str = _env(TEXT, "as for a server", "ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca", "finetune tune laptop", default="")
    weights_id: str = _env(
        IDENTIFIER, "as for a server", "mistral-7b-instruct-v0.1-0b1c2d3e", "finetune tune laptop", template="mistral-7b-instruct-v0.1"
    )  # fmt: skip
    sliding_window: int | None = _env(
        _number(1, 1 << 24), "the window that training has, as serving has it; not set: none", "4096", "tune", default=None
    )  # fmt: skip
    dtype: str = _env(_one_of("bfloat16", "float16", "float32"), "dtype of what is computed", "bfloat16", "tune")
    tokenizer_mode: str = _env(_one_of("mistral", "hf"), "as for a server", "mistral", "tune")
    data: str = _env(
        TEXT, "the chats: a URI (`s3://`, `gs://`, `az://`), or a file in `NODE_DIR/run/NAME/data` that came with the task",
        "s3://bucket/chats.jsonl", "finetune",
    )  # fmt: skip
    eval_data: str = _env(
        TEXT, "chats that are held out, as MISTRALCTL_DATA; not set: a share of the chats is", "s3://bucket/held-out.jsonl", "finetune",
        default="", template="",
    )  # fmt: skip
    out: str = _env(
        TEXT, "where adapter and checkpoints go: `s3://`, `gs://`, `az://`, `file://`. The result lies there; what is on its way lies below "
        "`checkpoints/`", "s3://bucket/adapter", "finetune tune laptop",
    )  # fmt: skip
    method: str = _env(_one_of("lora", "qlora", "full"), "what is trained", "lora", "tune")
    epochs: int = _env(_number(1, 1000), "times that all chats are learnt", "3", "tune")
    max_length: int = _env(_number(16, 1 << 20), "longest example; packed rows are as long", "4096", "tune")
    rank: int = _env(_number(1, 512), "rank of the adapter", "16", "tune", default=16)
    learning_rate: float = _env(RATE, "highest rate of the schedule", "0.0002", "tune")
    batch_tokens: int = _env(
        _number(16, 1 << 24), "tokens of one optimizer step, all devices together: packed rows are accumulated to about so many", "16384", "tune"
    )  # fmt: skip
    seed: int = _env(_number(0, (1 << 29)), "seed of adapter, order and dropout", "0", "tune", default=0)
    save_minutes: int = _env(MINUTES, "a checkpoint is sealed and uploaded after so many minutes", "10", "tune")
    merge: bool = _env(FLAG, "merged weights are published, too", "yes", "tune", default=False, template="")
    restart: bool = _env(
        FLAG, "checkpoints of this run that lie at MISTRALCTL_OUT are not continued; they are removed", "yes", "tune", default=False,
        template="",
    )  # fmt: skip
    run_id: str = _env(
        TEXT, "hash of all that the result depends on: weights, data, method, hyperparameters. A checkpoint with another one is not continued",
        "9c1a77e0b2d4", "tune laptop", default="", template="by-hand",
    )  # fmt: skip
    secrets: tuple[str, ...] = _env(
        STRINGS, "what the set-up waits for in secrets.json: `hf_token`; empty: nothing", '["hf_token"]', "finetune", default=()
    )  # fmt: skip
    ttl_minutes: int | None = _env(
        MINUTES, "the run is ended after so many minutes (`ends_at` may put it off); it goes on from its last checkpoint. Not set: never", "720",
        "watch laptop",
        default=None,
    )  # fmt: skip
    setup_minutes: int | None = _env(MINUTES, "as for a server", "60", "finetune watch", default=None)
    budget: float | None = _env(USD, "as for a server", "5.0000", "finetune watch laptop", default=None, template="")
    price: float | None = _env(USD, "as for a server", "0.8048", "finetune watch laptop", default=None, template="")

    def __post_init__(self) -> None:
        if self.budget is not None and self.price is None:
            raise ValueError(f"{PREFIX}BUDGET needs {PREFIX}PRICE")
        if self.device == "cpu" and self.gpus != 1:
            raise ValueError(f"{PREFIX}GPUS {self.gpus} needs {PREFIX}DEVICE cuda")
