"""The specification of a run of fine-tuning: every option, its type and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote, unquote

from mistral_contract.adapters import RANKS
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mistralctl import clouds, spec
from mistralctl.fields import About
from mistralctl.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    CloudName = str
else:
    CloudName = Literal[(*clouds.names(), clouds.LOCAL)]
Method = Literal["lora", "qlora", "full"]

DATA, TRAINING, PLACE, LIFE = "Model and data", "Training", "Place and price", "Lifetime"
FOLDERS = ("/", "./", "../", "~")


def _data(value: str) -> str:
    """`value` if it is a file's path or the URI of an object; of file:// the path."""
    if "://" not in value:
        return value
    spec.check_uri(value)
    scheme, _, rest = value.partition("://")
    if scheme == "file":
        return unquote(rest)
    if scheme not in clouds.buckets():
        known = ", ".join(f"{one}://" for one in clouds.buckets())
        raise ValueError(f"{value!r}: chats are read from a file of this machine or from {known}")
    return value


def _out(value: str) -> str:
    """`value` as a URI; a path is a folder of this machine."""
    if "://" not in value:
        if not value.startswith(FOLDERS):
            raise ValueError(f"{value!r} is neither a URI nor a folder; write ./{value}, or for example s3://bucket/{value}")
        return "file://" + quote(str(Path(value).expanduser().absolute()))
    spec.check_uri(value)
    scheme = value.partition("://")[0]
    if scheme not in (*clouds.buckets(), "file"):
        raise ValueError(f"{value!r}: nothing can be written to {scheme}://; name a bucket or a folder")
    return value.rstrip("/")


class FinetuneSpec(BaseModel):
    """Every option of `finetune`, checked one by one. What they mean together is checked by `training`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[
        str,
        AfterValidator(spec.check_model),
        About(DATA, "mistral-7b-instruct-v0.1", "[MODEL]", flag="MODEL", known=lambda: MODELS),
    ] = Field(DEFAULT_MODEL, description="row of `mistralctl models`, a folder, or a URI")
    data: Annotated[str, AfterValidator(_data), About(DATA, "chats.jsonl", "FILE|URI", otherwise="must be given")] = Field(
        "", description="the chats: OpenAI chat JSONL, ShareGPT or Alpaca"
    )
    out: Annotated[
        Annotated[str, AfterValidator(_out)] | None, About(DATA, "s3://bucket/adapter", "URI|DIR", otherwise="must be given")
    ] = Field(None, description="where the result goes, and what a killed run goes on from")
    eval_data: Annotated[
        Annotated[str, AfterValidator(_data)] | None,
        About(DATA, "held-out.jsonl", "FILE|URI", otherwise="some of the chats are held out"),
    ] = Field(None, description="chats that are not learnt, by which the result is measured")
    name: Annotated[
        Annotated[str, AfterValidator(spec.check_name)] | None, About(DATA, "sql", otherwise="finetune- and a hash of --out")
    ] = Field(None, description="name of the run")
    weights: Annotated[
        Annotated[str, AfterValidator(spec.check_uri)] | None,
        About(DATA, "s3://bucket/prefix", "URI", otherwise="the model's own place"),
    ] = Field(None, description="pull the base's weights from here: hf:// s3:// gs:// az:// file://")
    method: Annotated[Method, About(TRAINING, "qlora", "M")] = Field("lora", description="what is trained: {}")
    epochs: Annotated[int, About(TRAINING, "3", "N")] = Field(3, ge=1, le=1000, description="times that all chats are learnt")
    max_length: Annotated[
        int | None, About(TRAINING, "8192", "N", otherwise="4096, or the model's context where that is less")
    ] = Field(None, ge=16, le=1_048_576, description="longest chat, tokens; a longer one is refused")
    rank: Annotated[int, About(TRAINING, "16", "R")] = Field(
        16, ge=1, le=RANKS[-1], description="rank of the adapter, as vLLM serves it"
    )
    learning_rate: Annotated[float | None, About(TRAINING, "0.0002", "X", otherwise="0.0002; of full 0.00001")] = Field(
        None, gt=0, le=1, description="highest rate of the schedule"
    )
    batch_tokens: Annotated[int | None, About(TRAINING, "16384", "N", otherwise="an eighth of the chats, at most 16384")] = Field(
        None, ge=16, le=16_777_216, description="tokens of one step of the optimizer"
    )
    seed: Annotated[int, About(TRAINING, "7", "N")] = Field(
        0, ge=0, le=1 << 29, description="seed of the adapter and of the order"
    )
    merge: Annotated[bool, About(TRAINING, "true")] = Field(False, description="publish merged weights, too")
    save: Annotated[str, AfterValidator(spec.check_duration), About(TRAINING, "5m", "10m")] = Field(
        "10m", description="upload a checkpoint after so long"
    )
    cloud: Annotated[CloudName | None, About(PLACE, clouds.names()[0], otherwise="that of the bucket of --out")] = Field(
        None, description="{}"
    )
    region: Annotated[spec.Region | None, About(PLACE, "us-east-1")] = Field(None, description="region of the cloud")
    accelerators: Annotated[
        Annotated[str, AfterValidator(spec.check_accelerators)] | None,
        About(PLACE, "L4:1", "NAME:COUNT", otherwise="those by which the run costs least"),
    ] = Field(None, description="GPU, for example L4:1")
    spot: Annotated[bool, About(PLACE, "true")] = Field(
        False, description="a spot machine: cheaper, and the same command goes on where it was taken away"
    )
    max_price: Annotated[float | None, About(PLACE, "1.50", "USD")] = Field(
        None, gt=0, le=1000, description="highest price, USD per hour"
    )
    ttl: Annotated[str, AfterValidator(spec.check_duration), About(LIFE, "2d", "1d|never")] = Field(
        "1d", description="end after so long in any case"
    )
    budget: Annotated[float | None, About(LIFE, "5.00", "USD")] = Field(
        None, ge=0.01, le=1_000_000, description="end when the machine has cost so much, set-up included"
    )
