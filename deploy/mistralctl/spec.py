"""The specification of a deployment: every option, its type and its bounds, in one place."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Annotated, Literal

from mistral_contract import files, sets
from mistral_contract.engines import ENGINES, VLLM
from mistral_contract.suggest import suggest
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mistralctl import clouds, durations, images
from mistralctl.fields import About
from mistralctl.gpus import GPUS
from mistralctl.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    CloudName = str
    Engine = str
else:
    Engine = Literal[(*ENGINES,)]
    CloudName = Literal[(*clouds.names(), clouds.LOCAL)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DiskTier = Literal["low", "medium", "high", "best"]
Quantization = Literal["fp8", "awq", "gptq", "compressed-tensors"]

KEYS_OBJECT = f"s3://bucket/{files.KEYS_FILE.name}"
NAME_PATTERN = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
# How a URI of each store goes on, and how many parts of it must be there.
STORES = {
    "hf": "organisation/repository",
    **{scheme: bucket.form.partition("://")[2].lower() for scheme, bucket in clouds.buckets().items()},
    "file": "/folder",
    "pypi": "package@version/file",
}
PARTS = {"hf": 2, "pypi": 2, "file": 1} | {scheme: bucket.parts for scheme, bucket in clouds.buckets().items()}


def _slug(value: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-0123456789")[:40].strip("-")
    return f", for example {slug}" if slug else ""


def check_name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value) or "--" in value:
        raise ValueError(
            f"{value!r} is not a name that every cloud accepts; use 1 to 40 small letters, digits and single hyphens, "
            f"a letter first, no hyphen last{_slug(value)}"
        )
    return value


def check_uri(value: str, *, folders: bool = False) -> str:
    """`value` if it is a URI of weights (or, with `folders`, a path); ValueError with what is wrong otherwise."""
    if any(ord(c) < 33 or ord(c) == 127 for c in value):
        raise ValueError(f"{value!r} contains a space or a control character")
    scheme, separator, rest = value.partition("://")
    if not separator:
        if folders and value.startswith(("/", "./", "../", "~")):
            return value
        raise ValueError(f"{value!r} is not a URI; write for example hf://mistralai/Mistral-7B-v0.3 or s3://bucket/prefix")
    if scheme not in STORES:
        raise ValueError(f"{value!r} has the unknown scheme {scheme}://; use one of {', '.join(s + '://' for s in STORES)}")
    path = rest.split("#", 1)[0]
    if ".." in path.split("/"):
        raise ValueError(f"{value!r} contains '..'; name the folder itself")
    if "?" in path or ("@" in path and scheme not in ("pypi", "hf")):
        raise ValueError(f"{value!r} carries a query or credentials; credentials come from the machine's own chain")
    parts = path.lstrip("/").split("/") if scheme == "file" else path.split("/")
    if scheme == "file" and not path.startswith("/"):
        raise ValueError(f"{value!r} needs an absolute path: file:///folder")
    if len([p for p in parts if p]) < PARTS[scheme] or not parts[0]:
        raise ValueError(f"{value!r} is incomplete; it should be {scheme}://{STORES[scheme].lstrip('/')}")
    if scheme == "pypi" and not re.fullmatch(r"[A-Za-z0-9._-]+@[A-Za-z0-9.+!]+", parts[0]):
        raise ValueError(f"{value!r} needs a version: pypi://package@version/file")
    return value


def _digest(value: str) -> str:
    if not sets.DIGEST.fullmatch(value):
        raise ValueError(
            f"{value!r} should be sha256: and 64 hexadecimal digits, as mistralctl receipt and weights verify print them"
        )
    return value


def _lora(value: dict[str, str]) -> dict[str, str]:
    for adapter, uri in value.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", adapter) or ".." in adapter:
            raise ValueError(f"{adapter!r} is not an adapter's name; use letters, digits, dots, hyphens, underscores")
        check_uri(uri, folders=True)
    return value


def parse_accelerators(value: str) -> tuple[str, int]:
    """SkyPilot's `NAME[:COUNT]` as (name, count), spelt as in the table of GPUs.

    >>> parse_accelerators("l4")
    ('L4', 1)
    """
    match = re.fullmatch(r"([A-Za-z0-9-]+)(?::([0-9]{1,2}))?", value)
    if match is None:
        raise ValueError(f"{value!r} is not an accelerator; write NAME or NAME:COUNT, for example L4:1")
    spelt = {name.lower(): name for name in GPUS}
    name, count = spelt.get(match[1].lower()), int(match[2] or 1)
    if name is None:
        near = suggest(match[1], GPUS, 0.5)
        hint = f"did you mean {near}?" if near else f"one of {', '.join(GPUS)}"
        raise ValueError(f"{match[1]!r} is not a GPU that mistralctl plans with; {hint} (mistralctl gpus lists them)")
    if count not in (1, 2, 4, 8):
        raise ValueError(f"{value!r} asks for {count} GPUs; 1, 2, 4 or 8 can share the 8 key-value heads of Mistral 7B")
    return name, count


def _one_accelerator(value: object) -> object:
    """`value`, unless it is a mapping or a list, in which SkyPilot's tasks name accelerators."""
    if isinstance(value, dict):
        named = [f"{name}:{count or 1}" for name, count in value.items()]
    elif isinstance(value, list | tuple):
        named = [str(item) for item in value]
    else:
        return value
    if len(named) == 1:
        raise ValueError(f"should be text; write {named[0]}")
    raise ValueError(f"takes one kind, {len(named)} are given; write one of them, {named[0] if named else 'L4:1'}, or leave the line "
                     "out: the cheapest that fit are taken, in order")  # fmt: skip


def check_accelerators(value: str) -> str:
    name, count = parse_accelerators(value)
    return f"{name}:{count}"


def check_duration(value: str) -> str:
    durations.minutes(value)
    return value


def _one_by_one(value: object) -> object:
    """`value`, unless it is a mapping, as vLLM's own file of options has them."""
    if isinstance(value, dict):
        written = [f"--{str(key).replace('_', '-')}" + ("" if it is True else f"={it}") for key, it in value.items()]
        raise ValueError(f"should be a list of arguments; write [{', '.join(written)}]")
    return value


def _vllm_args(values: tuple[str, ...]) -> tuple[str, ...]:
    if values:
        from mistral_contract import vllm_options

        vllm_options.check(values)
    return values


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_model(value: str) -> str:
    if value in MODELS:
        return value
    if "://" in value:
        return check_uri(value)
    if value.startswith(("/", "./", "../", "~")):
        return value
    near = (
        DEFAULT_MODEL if len(_letters(value)) > 3 and _letters(value) in _letters(DEFAULT_MODEL) else suggest(value, MODELS, 0.4)
    )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value):
        row = next((model.name for model in MODELS.values() if model.weights.lower() == f"hf://{value}".lower()), None)
        raise ValueError(
            f"{value!r} is a repository of the hub; write "
            + (f"{row}, or " if row else "")
            + f"hf://{value} (a folder of this machine: ./{value})"
        )
    hint = f"did you mean {near}?" if near else f"one of {', '.join(MODELS)}, or a folder or URI"
    raise ValueError(f"unknown model {value!r}; {hint} (mistralctl models lists them; a folder begins with ./ or /)")


def _served_model_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}", value):
        raise ValueError(f"{value!r} is not a model name for the API; use letters, digits and . _ / : -, at most 128")
    return value


def _keys_uri(value: str) -> str:
    check_uri(value)
    scheme, _, path = value.partition("://")
    known = [*clouds.buckets(), "file"]
    if scheme not in known:
        raise ValueError(f"{value!r} cannot hold keys, which change; use one of {', '.join(f'{name}://' for name in known)}")
    if not path.endswith(".json") or path.count("/") < PARTS[scheme]:
        raise ValueError(f"{value!r} should be one object, not a folder: {value.rstrip('/')}/{files.KEYS_FILE.name}")
    return value


def _allow(values: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for value in values:
        try:
            found.append(str(ipaddress.ip_network(value)))
        except ValueError:
            raise ValueError(f"{value!r} is not a network; write for example 203.0.113.0/24 or 198.51.100.7") from None
    return tuple(dict.fromkeys(found))


def _image(value: object) -> object:
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"{value!r} is not an image; write its id, or a mapping of clouds to ids: {{{images.example().replace('=', ': ', 1)}}}"
        )
    for cloud, image in value.items():
        if cloud not in images.known():
            raise ValueError(
                f"{cloud!r} is not one of {', '.join(images.known())}; write CLOUD=ID, for example {images.example()}"
            )
        if not isinstance(image, str) or (wrong := images.misspelt(cloud, image)):
            raise ValueError(f"{image!r} {wrong if isinstance(image, str) else 'is no text; put quotes around it'}")
    return value


def _no_repeats(values: tuple[CloudName, ...]) -> tuple[CloudName, ...]:
    if "local" in values and len(set(values)) > 1:
        raise ValueError("local stands alone; leave out either local or the other clouds")
    return tuple(dict.fromkeys(values))


_Duration = Annotated[str, AfterValidator(check_duration)]
Region = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,40}$")]
MODEL, PLACE, MEMORY, SERVER, ACCESS, LIFE = "Model", "Place and price", "Memory", "Server", "Access", "Lifetime"


class DeploymentSpec(BaseModel):
    """Every option of a deployment, checked one by one. Flags, variables, `mistralctl.yaml`, its schema and docs/options.md follow from them.

    What the options mean together (a region of that cloud, a context that the model has) is checked by `plan`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, title="mistralctl.yaml")

    model: Annotated[
        str, AfterValidator(check_model), About(MODEL, "mistral-7b-v0.3", "[MODEL]", flag="MODEL", known=lambda: MODELS)
    ] = Field(DEFAULT_MODEL, description="row of `mistralctl models`, a folder, or a URI")
    name: Annotated[Annotated[str, AfterValidator(check_name)] | None, About(MODEL, "mine", otherwise="the model's")] = Field(
        None, description="name of the deployment"
    )
    cloud: Annotated[
        tuple[CloudName, ...], AfterValidator(_no_repeats), About(PLACE, "[aws, gcp]", otherwise="all but local")
    ] = Field((), description="{}: the cheapest of them; local stands alone")
    region: Annotated[Region | None, About(PLACE, "us-east-1")] = Field(
        None, description="region of the one cloud that is chosen"
    )
    zone: Annotated[Region | None, About(PLACE, "us-east-1a")] = Field(None, description="zone of that region")
    accelerators: Annotated[
        Annotated[str, AfterValidator(check_accelerators)] | None,
        BeforeValidator(_one_accelerator),
        About(PLACE, "L4:1", "NAME:COUNT", otherwise="the cheapest that fit"),
    ] = Field(None, description="GPU, for example L4:1")
    image: Annotated[
        str | dict[str, str] | None,
        BeforeValidator(_image),
        About(PLACE, "{aws: ami-0123456789abcdef0}", "[CLOUD=]ID", otherwise="docs/gpu.md", noun="cloud"),
    ] = Field(None, description="image of the machine, one a cloud")
    disk_tier: Annotated[DiskTier | None, About(PLACE, "high", "T", otherwise="docs/gpu.md")] = Field(
        None, description="speed of the disk: {}"
    )
    spot: Annotated[bool, About(PLACE, "true")] = Field(False, description="a spot machine: cheaper, and it may be taken away")
    max_price: Annotated[float | None, About(PLACE, "1.50", "USD")] = Field(
        None, gt=0, le=1000, description="highest price, USD per hour"
    )
    weights: Annotated[
        Annotated[str, AfterValidator(check_uri)] | None,
        About(MODEL, "s3://bucket/prefix", "URI", otherwise="the model's own place"),
    ] = Field(None, description="pull the weights from here: hf:// s3:// gs:// az:// file://")
    weights_digest: Annotated[
        Annotated[str, AfterValidator(_digest)] | None,
        About(
            MODEL,
            "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "D",
            otherwise="that of the first up",
        ),
    ] = Field(None, description="serve no other weights than those with this digest (docs/security.md)")
    max_model_len: Annotated[int | None, About(MEMORY, "16384", "N", otherwise="the model's context")] = Field(
        None, ge=16, le=1_048_576, description="longest prompt plus answer, tokens"
    )
    max_concurrency: Annotated[int | None, About(MEMORY, "8", "N")] = Field(
        None, ge=1, le=1024, description="requests of full length that must fit at once"
    )
    tensor_parallel: Annotated[int | None, About(MEMORY, "2", "N")] = Field(
        None, ge=1, le=8, description="GPUs that share the model"
    )
    dtype: Annotated[Dtype, About(MEMORY, "bfloat16", "D")] = Field("auto", description="type of weights and cache: {}")
    quantization: Annotated[Quantization | None, About(MEMORY, "fp8", "Q")] = Field(
        None, description="how the weights are quantized: {}; fp8 also quantizes others"
    )
    lora: Annotated[dict[str, str], AfterValidator(_lora), About(MODEL, "{sql: s3://bucket/sql}", "NAME=URI", noun="adapter")] = (
        Field({}, description="a LoRA adapter: its name, and its URI or folder")
    )
    engine: Annotated[Engine, About(SERVER, "reference", "E")] = Field(
        VLLM, description="what computes: {} (slower, in one file, docs/engines.md)"
    )
    served_model_name: Annotated[
        Annotated[str, AfterValidator(_served_model_name)] | None,
        About(SERVER, "mistral", "S", otherwise="the model's name"),
    ] = Field(None, description="`model` in the API")
    port: Annotated[int | None, About(ACCESS, "8001", "P")] = Field(
        None, ge=1024, le=65535, description="port of the endpoint: on this machine, or with --public on the node"
    )
    public: Annotated[bool, About(ACCESS, "true", otherwise="an SSH tunnel")] = Field(
        False, description="open the port to the internet, with TLS"
    )
    allow: Annotated[
        tuple[str, ...], AfterValidator(_allow), About(ACCESS, "[203.0.113.0/24]", "CIDR", otherwise="every address")
    ] = Field((), description="with --public: who may ask")
    cert: Annotated[str | None, About(ACCESS, "server.pem", "FILE")] = Field(
        None, min_length=1, description="with --public: your own certificate, PEM"
    )
    key: Annotated[str | None, About(ACCESS, "server.key", "FILE")] = Field(
        None, min_length=1, description="with --public: its private key, PEM"
    )
    keys_uri: Annotated[Annotated[str, AfterValidator(_keys_uri)] | None, About(ACCESS, KEYS_OBJECT, "URI")] = Field(
        None, description="object with the keys that are let in, which the node follows: s3:// gs:// az:// file://"
    )
    vllm_args: Annotated[
        tuple[str, ...],
        BeforeValidator(_one_by_one),
        AfterValidator(_vllm_args),
        About(SERVER, "[--seed=7]", "ARG", flag="--vllm-arg", separator=r"\s+(?=--)"),
    ] = Field((), description="argument of vllm serve: --vllm-arg=--seed=7")
    idle: Annotated[_Duration, About(LIFE, "2h", "30m|never")] = Field("30m", description="end after so long without a request")
    ttl: Annotated[_Duration, About(LIFE, "2d", "12h|never")] = Field("12h", description="end after so long in any case")
    budget: Annotated[float | None, About(LIFE, "5.00", "USD")] = Field(
        None, ge=0.01, le=1_000_000, description="end when the machine has cost so much, set-up included"
    )
    restart: Annotated[int, About(LIFE, "0", "N")] = Field(
        2, ge=0, le=100, description="times that a server which died is started again; 0: never"
    )

    @property
    def images(self) -> dict[str, str]:
        """The image that was named for each cloud; one without a cloud is that of the one cloud that is chosen."""
        if isinstance(self.image, str):
            return dict.fromkeys(self.cloud, self.image)
        return self.image or {}
