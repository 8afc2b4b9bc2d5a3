"""The plan of a run of fine-tuning: what it takes in memory, how long it takes and what it costs, and where it fits. Pure.

Memory is computed from the model's shape. Time is computed from a published profile, scaled by parameters and by what a GPU computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mistral_contract import tensors

from mistralctl import clouds, prices
from mistralctl.clouds import LOCAL
from mistralctl.config import Sourced
from mistralctl.durations import minutes
from mistralctl.errors import Exit, UserError, figure
from mistralctl.finetune_spec import FinetuneSpec, Method
from mistralctl.fit import DTYPE_BYTES
from mistralctl.gpus import GIB, GPUS, Gpu
from mistralctl.machine import Machine
from mistralctl.models import Model, Shape
from mistralctl.plan import SMALLEST_CPU_NODE
from mistralctl.rights import Right
from mistralctl.spec import parse_accelerators

MAX_LENGTH = 4096
BATCH_TOKENS = 16384
STEPS_OF_AN_EPOCH = 8  # at least, where the chats are few: one step an epoch learns nothing
LEARNING_RATE: Mapping[Method, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
# NF4 with its scales quantized, too (arXiv 2305.14314, section 3): 4 bits and 0.127 for each weight of a linear layer.
NF4_BYTES = 4.127 / 8
# A trained number: itself, its gradient and Adam's two moments, in 32 bits each.
TRAINED_BYTES = 16
SPARE_BYTES = {"cuda": GIB, "cpu": 2 * GIB}  # CUDA's context and what is fragmented; Python, torch and trl
GPU_SHARE = 0.95
CPU_SHARE = 0.85
# TFLOPS in bfloat16 without sparsity: NVIDIA's data sheets.
TFLOPS = {"A10": 125, "A10G": 70, "L4": 121, "L40S": 362, "A100": 312, "A100-80GB": 312, "H100": 989}
# Tokens a second of 7.72 billion parameters on one A100-80GB: the profile in the README of github.com/QwenLM/Qwen. LoRA and Q-LoRA at 4096
# tokens, 8 rows in 10.1 and 11.6 s; all parameters on two GPUs at 1024 tokens, 16 rows in 4.5 s.
PROFILE: Mapping[Method, float] = {"lora": 8 * 4096 / 10.1, "qlora": 8 * 4096 / 11.6, "full": 16 * 1024 / 4.5 / 2}
PROFILE_PARAMETERS, PROFILE_GPU = 7.72e9, "A100-80GB"
SOURCE = (
    "a published profile (Qwen-7B on an A100), scaled by parameters and the GPU's bfloat16 figure; not measured for this model"
)
# Tokens a second of 134.5 million parameters for each core: SmolLM2, LoRA, rows of 110 tokens, 59 a second on two cores of an x86 server.
CPU_TOKENS, CPU_PARAMETERS = 29.5, 134_515_008
MORE_GPUS = 0.9  # of what one GPU does, each of several adds
START_MINUTES = 15  # machine, environments and weights
END_MINUTES = 10  # vLLM, the proof and the upload
DEAREST = 2.0  # a run that costs more than this many times the cheapest is not taken unless it is asked for
COUNTS = (1, 2, 4, 8)
DISK_BASE_GIB = 72  # the system's image, the environments of vLLM (12 GB) and of training


@dataclass(frozen=True)
class Tokens:
    """What the chats amount to: tokens of one epoch, and the longest example. `by` says who counted; `exact`: with the model's tokenizer."""

    tokens: int
    longest: int
    rows: int
    examples: int
    learnt: int
    by: str
    exact: bool = True


@dataclass(frozen=True)
class Need:
    """Bytes that training takes on one device: the frozen weights, all that belongs to what is trained, activations, and the rest."""

    weights: int
    trained: int
    activations: int
    spare: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.spare


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Numbers of an adapter of all seven linear layers: 41.9 million for Mistral 7B at rank 16."""
    return rank * shape.layers * sum(outputs + inputs for outputs, inputs in tensors.linear(shape).values())


def need(shape: Shape, spec: FinetuneSpec, length: int, device: str, gpus: int = 1) -> Need:
    """Return what training takes on each of so many devices, with rows of `length` tokens and activations computed again (checkpointing).

    Full tuning is sharded (FSDP2): weights, gradients and moments are divided. LoRA and QLoRA have the whole model on each device.
    """
    size = DTYPE_BYTES["float32" if device == "cpu" else "bfloat16"]
    frozen = trained = 0
    if spec.method == "full":
        trained = TRAINED_BYTES * shape.parameters // gpus
    else:
        linear = shape.parameters - shape.tables
        frozen = round(linear * NF4_BYTES) + shape.tables * size if spec.method == "qlora" else shape.parameters * size
        trained = TRAINED_BYTES * adapter_parameters(shape, spec.rank)
    kept = shape.layers * shape.hidden * size  # what each layer begins with
    layer = (8 * shape.hidden + 5 * shape.intermediate) * size  # one layer, computed again
    head = shape.vocabulary * (size + 2 * 4)  # logits, and loss and gradient in 32 bits
    return Need(frozen, trained, length * (kept + layer + head), SPARE_BYTES[device])


def speed(parameters: int, method: Method, gpu: str, gpus: int) -> float | None:
    """Tokens a second, by the published profile; None for a GPU whose figure is not known."""
    if gpu not in TFLOPS:
        return None
    one = PROFILE[method] * PROFILE_PARAMETERS / parameters * TFLOPS[gpu] / TFLOPS[PROFILE_GPU]
    return one * (1 if gpus == 1 else gpus * MORE_GPUS)


def cpu_speed(parameters: int, cores: int) -> float:
    """Tokens a second of this machine's cores, by one run that was measured."""
    return CPU_TOKENS * cores * CPU_PARAMETERS / parameters


@dataclass(frozen=True)
class Choice:
    """A kind of machine for the run. Prices are USD an hour by the snapshot, `usd` is of the whole run; `reason` says why it was refused."""

    cloud: str
    accelerator: str | None
    count: int
    instance_type: str
    region: str | None
    price: float | None
    spot_price: float | None
    need_gib: float
    tokens_per_second: float | None
    hours: float | None
    usd: float | None
    reason: str | None = None

    @property
    def label(self) -> str:
        return f"{self.accelerator}:{self.count}" if self.accelerator else self.instance_type


@dataclass(frozen=True)
class Run:
    """The plan of a run. `options` fit, the one by which the run costs least first; `refused` say why they do not.

    `max_length` is the longest example that may be learnt, `length` is that of a packed row; `need` what the first option takes on each device.
    `data` and `eval_data` are where the node finds the chats: a URI, or a file's path on this machine, which goes with the task; `contents` is
    a hash of what they hold, empty if nobody read them.
    `secret`: the hub's token goes to the machine beside the task.
    """

    name: str
    spec: FinetuneSpec
    model: Model
    weights: str
    revision: str
    weights_id: str
    data: str
    eval_data: str
    out: str
    tokens: Tokens | None
    device: str
    dtype: str
    max_length: int
    length: int
    batch_tokens: int
    learning_rate: float
    options: tuple[Choice, ...]
    refused: tuple[Choice, ...]
    need: Need | None
    rights: tuple[Right, ...] = ()
    endpoints: Mapping[str, str] = field(default_factory=dict)
    contents: str = ""
    secret: bool = False

    @property
    def chosen(self) -> Choice:
        return self.options[0]

    @property
    def local(self) -> bool:
        """Whether this machine trains, and none is rented."""
        return self.chosen.cloud == LOCAL

    @property
    def steps(self) -> int | None:
        """Steps of the optimizer; None where nobody counted the tokens."""
        return self.spec.epochs * max(1, math.ceil(self.tokens.tokens / self.batch_tokens)) if self.tokens else None

    @property
    def ttl_minutes(self) -> int | None:
        return minutes(self.spec.ttl)

    @property
    def save_minutes(self) -> int:
        return minutes(self.spec.save) or 1

    @property
    def price(self) -> float | None:
        """USD an hour by which a budget counts; None without one."""
        if self.spec.budget is None:
            return None
        dearest = self.spec.max_price or max(_price(option, self.spec) for option in self.options)
        return math.ceil(round(dearest * 1e4, 4)) / 1e4

    @property
    def budget_minutes(self) -> int | None:
        """Whole minutes that the budget buys, None without one."""
        return None if self.price is None or self.spec.budget is None else math.floor(self.spec.budget / self.price * 60)

    @property
    def life_minutes(self) -> int | None:
        """Minutes after which the machine has to be gone; None for never."""
        return min((one for one in (self.ttl_minutes, self.budget_minutes) if one is not None), default=None)

    @property
    def base(self) -> tuple[str, str]:
        """The base model's repository on the hub and its commit, or its name and nothing."""
        own = self.model.weights
        if own.startswith("hf://"):
            repository, _, commit = own.removeprefix("hf://").partition("@")
            return repository, commit or self.model.revision
        return self.model.name, ""

    @property
    def lines(self) -> Iterator[str]:
        """What is planned, for a person."""
        spec, tokens = self.spec, self.tokens
        if tokens:
            about = "" if tokens.exact else "about "
            yield (
                f"{tokens.rows} chats, {about}{tokens.tokens} tokens of which {tokens.learnt} are learnt, the longest {tokens.longest} ({tokens.by})"
            )
            yield f"{self.steps} steps: {spec.epochs} epochs, {self.batch_tokens} tokens a step, rows of {self.length} tokens"
        option = self.chosen
        where = option.label if self.local else f"{option.label} on {option.cloud}"
        yield f"{spec.method} on {where}: {option.need_gib:.1f} GiB on each device, computed"
        if option.hours is not None and option.tokens_per_second is not None:
            cost = f", about {option.usd:.2f} USD by the snapshot of {prices.SNAPSHOT_DATE}" if option.usd is not None else ""
            source = "one run of SmolLM2 on another machine" if self.device == "cpu" else SOURCE
            yield f"about {_time(option.hours)}{cost}, at {option.tokens_per_second:.0f} tokens a second by {source}"


def _time(hours: float) -> str:
    minutes = math.ceil(hours * 60)
    return "a minute" if minutes == 1 else f"{minutes} minutes" if hours < 2 else f"{hours:.1f} hours"


def _price(option: Choice | prices.Offer, spec: FinetuneSpec) -> float:
    price = option.spot_price if spec.spot else option.price
    return math.inf if price is None else price


@dataclass(frozen=True)
class Wanted:
    """What is settled before machines are looked at: the model and its weights, the chats, and this machine where it is to train."""

    model: Model
    weights: str
    revision: str
    weights_id: str
    data: str
    eval_data: str
    tokens: Tokens | None
    contents: str
    endpoints: Mapping[str, str]
    machine: Machine | None = None
    rights: tuple[Right, ...] = ()


def context(sourced: Sourced[FinetuneSpec], model: Model) -> int:
    """The longest example that may be learnt, tokens. UserError beyond the model's context."""
    asked, shape = sourced.spec.max_length, model.shape
    most = shape.context if shape else MAX_LENGTH
    if asked is not None and shape is not None and asked > most:
        raise UserError(
            f"{sourced.place('max_length')}: {sourced.number('max_length')} is beyond the context of {model.name}, {most} tokens; give at most {most}"
        )
    return asked or min(MAX_LENGTH, most)


def _lengths(sourced: Sourced[FinetuneSpec], model: Model, tokens: Tokens | None) -> tuple[int, int]:
    """(tokens of a packed row, tokens of a step): a row is no longer than a step, unless an example is."""
    spec, most = sourced.spec, context(sourced, model)
    batch = spec.batch_tokens
    if batch is None:
        batch = BATCH_TOKENS if tokens is None else min(BATCH_TOKENS, max(16, tokens.longest, tokens.tokens // STEPS_OF_AN_EPOCH))
    return max(min(most, batch), tokens.longest if tokens else 0), batch


def _hours(tokens: Tokens | None, spec: FinetuneSpec, speed: float | None) -> float | None:
    if tokens is None or not speed:
        return None
    return tokens.tokens * spec.epochs / speed / 3600


def _gpu(wanted: Wanted, spec: FinetuneSpec, length: int, gpu: Gpu, offer: prices.Offer) -> Choice:
    shape, count = wanted.model.shape, offer.count
    needed = need(shape, spec, length, "cuda", count) if shape else None
    reason = None
    if not gpu.bfloat16:
        reason = "no bfloat16, in which is trained"
    elif needed and needed.total > gpu.memory_gib * GIB * GPU_SHARE:
        reason = f"{needed.total / GIB:.1f} GiB are needed on each GPU and {gpu.memory_gib * GPU_SHARE:.1f} GiB are there"
    rate = speed(shape.parameters, spec.method, gpu.name, count) if shape else None
    hours = _hours(wanted.tokens, spec, rate)
    price = _price(offer, spec)
    total = None if hours is None or price == math.inf else (hours + (START_MINUTES + END_MINUTES) / 60) * price
    return Choice(
        offer.cloud, gpu.name, count, offer.instance_type, offer.region, offer.price, offer.spot_price,
        round(needed.total / GIB, 1) if needed else 0.0, rate, hours, None if total is None else round(total, 2), reason,
    )  # fmt: skip


def _offers(sourced: Sourced[FinetuneSpec], cloud: str) -> Iterator[prices.Offer]:
    """The cheapest offer of each kind of machine that may be meant."""
    spec, found = sourced.spec, dict[tuple[str, int], prices.Offer]()
    asked = parse_accelerators(spec.accelerators) if spec.accelerators else None
    for offer in prices.offers(cloud):
        if offer.accelerator is None or offer.count not in COUNTS or (asked and (offer.accelerator, offer.count) != asked):
            continue
        if spec.region is not None and offer.region != spec.region:
            continue
        kind = (offer.accelerator, offer.count)
        if kind not in found or _price(offer, spec) < _price(found[kind], spec):
            found[kind] = offer
    return iter(found.values())


def _rented(sourced: Sourced[FinetuneSpec], wanted: Wanted, cloud: str, length: int) -> list[Choice]:
    spec = sourced.spec
    every = [
        _gpu(wanted, spec, length, GPUS[offer.accelerator], offer)
        for offer in _offers(sourced, cloud) if offer.accelerator in GPUS
    ]  # fmt: skip
    every.sort(key=lambda one: (one.usd if one.usd is not None else math.inf, _price(one, spec), one.label))
    fitting = [one for one in every if one.reason is None]
    every = [one if one.reason else replace(one, reason=_too_dear(one, sourced, fitting)) for one in every]
    first = next((one for one in every if one.reason is None), None)
    other = "another number of GPUs than the cheapest run has; ask for it with --accelerators"
    return [replace(one, reason=other) if first and not one.reason and one.count != first.count else one for one in every]


def _without_gpu(sourced: Sourced[FinetuneSpec], wanted: Wanted, cloud: str, length: int) -> list[Choice]:
    """The cheapest machine without a GPU, for a small model."""
    spec, shape = sourced.spec, wanted.model.shape
    needed = need(shape, spec, length, "cpu") if shape else None
    cores, gib = SMALLEST_CPU_NODE
    rate = cpu_speed(shape.parameters, cores) if shape else None
    hours, reason = _hours(wanted.tokens, spec, rate), None
    if needed and needed.total > gib * GIB * CPU_SHARE:
        reason = f"{needed.total / GIB:.1f} GiB are needed and {gib * CPU_SHARE:.1f} GiB are there; add --accelerators"
    for offer in sorted(prices.offers(cloud), key=lambda one: _price(one, spec)):
        if offer.accelerator or offer.vcpus < cores or offer.memory_gib < gib or (spec.region and offer.region != spec.region):
            continue
        price = _price(offer, spec)
        usd = None if hours is None or price == math.inf else round((hours + (START_MINUTES + END_MINUTES) / 60) * price, 2)
        found = Choice(
            cloud, None, 0, offer.instance_type, offer.region, offer.price, offer.spot_price,
            round(needed.total / GIB, 1) if needed else 0.0, rate, hours, usd, reason,
        )  # fmt: skip
        return [replace(found, reason=reason or _too_dear(found, sourced, [found]))]
    return []


def _too_dear(option: Choice, sourced: Sourced[FinetuneSpec], fitting: list[Choice]) -> str | None:
    """Why a machine that fits is not taken; `fitting` are all that do, the cheapest run first."""
    spec, price = sourced.spec, _price(option, sourced.spec)
    if price == math.inf:
        return "the snapshot has no price for it"
    if spec.max_price is not None and price > spec.max_price:
        return f"{price:.2f} USD/h is above {sourced.place('max_price')} {sourced.number('max_price')}"
    if spec.accelerators or option is fitting[0]:
        return None
    cheapest = fitting[0]
    if option.usd is not None and cheapest.usd is not None:
        if option.usd > DEAREST * cheapest.usd:
            return f"the run would cost {option.usd:.2f} USD, more than twice the cheapest; ask for it with --accelerators"
    elif price > DEAREST * _price(cheapest, spec):
        return f"{price:.2f} USD/h is more than twice the cheapest that fits; ask for it with --accelerators"
    return None


def _here(sourced: Sourced[FinetuneSpec], wanted: Wanted, length: int) -> Choice:
    """This machine as the one that trains."""
    spec, machine, shape = sourced.spec, wanted.machine, wanted.model.shape
    if machine is None:
        raise ValueError("a local plan needs the machine")
    device = "cuda" if machine.gpus else "cpu"
    count = len(machine.gpus) or 0
    needed = need(shape, spec, length, device, max(1, count)) if shape else None
    room = machine.gpus[0].memory_gib * GIB * GPU_SHARE if machine.gpus else machine.memory_bytes * CPU_SHARE
    reason = None
    if needed and needed.total > room:
        reason = f"{needed.total / GIB:.1f} GiB are needed and {room / GIB:.1f} GiB are there"
    rate = None
    if shape:
        rate = (
            speed(shape.parameters, spec.method, machine.gpus[0].name, count)
            if machine.gpus
            else cpu_speed(shape.parameters, machine.cores)
        )
    return Choice(
        LOCAL, machine.gpus[0].name if machine.gpus else None, count, machine.label, None, None, None,
        round(needed.total / GIB, 1) if needed else 0.0, rate, _hours(wanted.tokens, spec, rate), None, reason,
    )  # fmt: skip


def is_here(cloud: str) -> bool:
    """Whether a run in this place is on this machine."""
    return cloud == LOCAL


def place_of(sourced: Sourced[FinetuneSpec]) -> str:
    """The cloud of the run: the one that was named, or that of the bucket of --out. UserError for options that contradict it."""
    spec = sourced.spec
    if not spec.data:
        raise UserError("--data: the chats must be given; name a file, for example --data chats.jsonl")
    if spec.out is None:
        raise UserError(
            "--out: where the result goes must be given; name a bucket or a folder, for example --out s3://bucket/adapter"
        )
    scheme = spec.out.partition("://")[0]
    bucket = clouds.buckets().get(scheme)
    cloud = spec.cloud or (bucket.cloud if bucket else None)
    if cloud is None:
        raise UserError(
            f"{sourced.place('out')}: {spec.out.removeprefix('file://')} is a folder of this machine; add --cloud local, or name a bucket"
        )
    if cloud != LOCAL and scheme == "file":
        raise UserError(
            f"{sourced.place('out')}: {spec.out.removeprefix('file://')} is a folder of this machine, and a machine on {cloud} cannot write there; "
            f"name a bucket, or say --cloud local"
        )
    if cloud == LOCAL:
        named = [one for one in ("region", "accelerators", "max_price", "budget") if getattr(spec, one) is not None]
        named += ["spot"] if spec.spot else []
        if named:
            raise UserError(f"{sourced.place(named[0])}: means nothing on this machine (--cloud local); leave one of the two out")
    elif spec.region is not None and spec.region not in clouds.facts(cloud).regions:
        raise UserError(
            f"{sourced.place('region')}: {cloud} has no region {spec.region!r}; one of {', '.join(sorted(clouds.facts(cloud).regions))}"
        )
    if minutes(spec.save) is None:
        raise UserError(f"{sourced.place('save')}: a run without checkpoints loses all when it is killed; write for example 10m")
    return cloud


def make(sourced: Sourced[FinetuneSpec], wanted: Wanted) -> Run:
    """The plan of a run; UserError where nothing fits, with what would."""
    spec, model = sourced.spec, wanted.model
    cloud = place_of(sourced)
    if model.stored.scheme is not None:
        raise UserError(
            f"{sourced.place('model')}: {model.name} is quantized ({model.stored.scheme.method}); train on the weights that it was made from"
        )
    if model.stored.form == "consolidated":
        raise UserError(
            f"{sourced.place('weights' if spec.weights else 'model')}: {wanted.weights} has Mistral's own format only (consolidated*.safetensors), "
            "which is not trained; name weights in Hugging Face's format with --weights"
        )
    if spec.method == "full" and spec.merge:
        raise UserError(f"{sourced.place('merge')}: full tuning has no adapter to merge; leave it out")
    length, batch = _lengths(sourced, model, wanted.tokens)
    look = _without_gpu if model.runs_on_cpu and not spec.accelerators else _rented
    every = [_here(sourced, wanted, length)] if cloud == LOCAL else look(sourced, wanted, cloud, length)
    fitting, refused = [one for one in every if not one.reason], [one for one in every if one.reason]
    if not fitting:
        raise _nothing_fits(sourced, wanted, cloud, refused)
    device = "cuda" if fitting[0].accelerator else "cpu"
    run = Run(
        name=spec.name or f"finetune-{hashlib.sha256((spec.out or '').encode()).hexdigest()[:8]}", spec=spec, model=model,
        weights=wanted.weights, revision=wanted.revision, weights_id=wanted.weights_id,
        data=wanted.data, eval_data=wanted.eval_data, out=spec.out or "", tokens=wanted.tokens, device=device,
        dtype="float32" if device == "cpu" else "bfloat16", max_length=context(sourced, model), length=length, batch_tokens=batch,
        learning_rate=spec.learning_rate or LEARNING_RATE[spec.method], options=tuple(fitting), refused=tuple(refused),
        need=need(model.shape, spec, length, device, max(1, fitting[0].count)) if model.shape else None,
        rights=wanted.rights, endpoints=wanted.endpoints, contents=wanted.contents,
    )  # fmt: skip
    _check_time(sourced, run)
    return run


def _check_time(sourced: Sourced[FinetuneSpec], run: Run) -> None:
    """UserError for a budget that buys less than start and end take."""
    if run.price is None or run.budget_minutes is None:
        return
    least = START_MINUTES + END_MINUTES
    if run.budget_minutes < least:
        raise UserError(
            f"{sourced.place('budget')}: {figure(run.spec.budget or 0)} USD buys {run.budget_minutes} minutes at {run.price:.4f} USD an hour, and "
            f"start and end alone take about {least}; give at least {math.ceil(run.price * least / 60 * 100) / 100:.2f}"
        )


def _nothing_fits(sourced: Sourced[FinetuneSpec], wanted: Wanted, cloud: str, refused: list[Choice]) -> UserError:
    spec = sourced.spec
    if not refused:
        asked = sourced.place("accelerators") if spec.accelerators else sourced.place("cloud")
        where = f"{cloud}" + (f" in {spec.region}" if spec.region else "")
        return UserError(
            f"{asked}: {where} sells no {spec.accelerators or 'machine with a GPU'} in the snapshot; leave it out or name another",
            Exit.NO_FIT,
        )
    reasons = "; ".join(dict.fromkeys(f"{one.label}: {one.reason}" for one in refused))
    hints = []
    length = _lengths(sourced, wanted.model, wanted.tokens)[0]
    if wanted.model.shape and spec.method != "qlora":
        lighter = spec.model_copy(update={"method": "qlora" if spec.method == "lora" else "lora"})
        before, after = (need(wanted.model.shape, one, length, "cuda").total for one in (spec, lighter))
        if after < before:
            hints.append(f"--method {lighter.method} needs {after / GIB:.1f} GiB")
    if spec.max_length is None or spec.max_length > 1024:
        hints.append("a smaller --max-length or --batch-tokens needs less")
    place = sourced.place("accelerators" if spec.accelerators else "method")
    return UserError(
        f"{place}: {spec.method} of {wanted.model.name} does not fit: {reasons}" + "".join(f"; {one}" for one in hints),
        Exit.NO_FIT,
    )
