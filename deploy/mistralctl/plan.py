"""From a spec to a plan: what runs, where it fits, what it costs by the snapshot, and why other machines were refused."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mistral_contract import quantization
from mistral_contract.engines import ENGINES, VLLM
from mistral_contract.quantization import METHODS
from mistral_contract.suggest import suggest

from mistralctl import clouds, images, prices
from mistralctl import fit as memory
from mistralctl.clouds import LOCAL
from mistralctl.config import Sourced
from mistralctl.durations import minutes
from mistralctl.errors import Exit, UserError
from mistralctl.gpus import GIB, GPUS, Gpu
from mistralctl.machine import Machine
from mistralctl.models import Model, Shape
from mistralctl.quotas import Quota
from mistralctl.rights import Right, rights
from mistralctl.spec import DeploymentSpec, parse_accelerators

# A fall-back that costs more than this many times the cheapest machine is not taken unless --max-price allows it, or it is the cheapest of
# a cloud that was named.
FALLBACK_FACTOR = 2.0
CPU_OVERHEAD_BYTES = 4 * GIB  # a vLLM process on a CPU beside weights and cache: about 3 GB measured, and the system
CPU_WEIGHTS_FACTOR = 1.15
CPU_CACHE_GIB = 4
SMALLEST_CPU_NODE = (2, 8)  # cores, GiB
SAYS = {name: "vLLM" if name == VLLM else f"the {name}" for name in ENGINES}
DEFAULT_SEQS = {"cuda": 64, "cpu": 8}
START_MINUTES = 15  # what a start takes on a rented machine: a budget that buys less would buy no answer


@dataclass(frozen=True)
class Option:
    """A kind of machine on one cloud. Prices are the cheapest region's, USD per hour; `reason` says why it was refused.

    `accelerator` is None for a machine without a GPU; `fit` is None where the model's shape is not known here.
    """

    cloud: str
    accelerator: str | None
    count: int
    instance_type: str | None
    region: str | None
    price: float | None
    spot_price: float | None
    fit: memory.Fit | None
    reason: str | None = None

    @property
    def label(self) -> str:
        return f"{self.accelerator}:{self.count}" if self.accelerator else self.instance_type or "CPU"


@dataclass(frozen=True)
class Plan:
    """What would run where. `options` fit, cheapest first, and all go into the task; `refused` say why they do not.

    `rights` say what the node's role needs to read weights, adapters and keys that lie in buckets, one for each cloud of the options;
    `quotas` are there only when the clouds were asked for them; `endpoints` are the clouds' own variables for those buckets that
    another server than the cloud's answers for. `weights_digest` is the one that the weights must have: asked for, or kept from an earlier
    `up`; empty: any. `lora_versions` say what each adapter holds, as far as this machine knows.
    """

    name: str
    model: Model
    spec: DeploymentSpec
    device: str
    weights: str
    revision: str
    weights_id: str
    served_model_name: str
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    sliding_window: int | None
    dtype: str
    tensor_parallel: int
    kv_cache_gib: int
    idle_minutes: int | None
    ttl_minutes: int | None
    options: tuple[Option, ...]
    refused: tuple[Option, ...]
    rights: tuple[Right, ...] = ()
    quotas: tuple[Quota, ...] = ()
    endpoints: Mapping[str, str] = field(default_factory=dict)
    lora_versions: Mapping[str, str] = field(default_factory=dict)
    weights_digest: str = ""

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(URI, revision) of the weights and of every adapter."""
        return ((self.weights, self.revision), *((uri, "") for uri in self.spec.lora.values()))

    @property
    def chosen(self) -> Option:
        return self.options[0]

    @property
    def caveats(self) -> list[str]:
        """What to know of the weights before anything is rented: terms that their licence asks for, a revision that is not fixed."""
        found = [f"terms of {self.model.name}: {self.model.terms}"] if self.model.terms else []
        if self.model.unpinned and self.weights == self.model.weights:
            uri = f"{self.weights}@COMMIT"
            found.append(f"revision: main, not pinned: the hub may have other weights tomorrow; --weights {uri} pins them")
        return found

    @property
    def bought(self) -> list[str]:
        """What time the budget buys, and whether that is less than the ttl; empty without one."""
        if self.budget_minutes is None:
            return []
        by = "--max-price" if self.spec.max_price else "the dearest of these; nothing dearer is rented"
        less = f", less than --ttl {self.spec.ttl}" if self.life_minutes != self.ttl_minutes else ""
        return [
            f"budget {self.spec.budget:.2f} USD buys {self.budget_minutes // 60} h {self.budget_minutes % 60} m of machine at {self.price:.4f} USD/h "
            f"({by}), set-up included{less}"
        ]

    @property
    def price(self) -> float | None:
        """USD an hour by which a budget counts, and above which nothing is rented for it: --max-price, or the dearest option's by the snapshot.
        None without a budget."""
        if self.spec.budget is None:
            return None
        dearest = self.spec.max_price or max(_price(option, self.spec) for option in self.options)
        return dearest if dearest == math.inf else math.ceil(round(dearest * 1e4, 4)) / 1e4

    @property
    def budget_minutes(self) -> int | None:
        """Whole minutes that the budget buys, None without one."""
        return None if self.price is None or self.spec.budget is None else math.floor(self.spec.budget / self.price * 60)

    @property
    def life_minutes(self) -> int | None:
        """Minutes after which the machine has to be gone: by its ttl or its budget, whichever is earlier; None for never."""
        return min((minutes for minutes in (self.ttl_minutes, self.budget_minutes) if minutes is not None), default=None)

    @property
    def endless(self) -> str:
        """What to know of a rented machine that neither a ttl nor a budget ends; empty where one does."""
        if self.local or self.life_minutes is not None:
            return ""
        return f"{self.name} has no end (--ttl never) and no --budget: its machine may cost for ever"

    @property
    def local(self) -> bool:
        """Whether this machine serves, and none is rented."""
        return self.chosen.cloud == LOCAL


def deployment_name(spec: DeploymentSpec, model: Model) -> str:
    """The name of the deployment: the one given, or the model's with what clouds refuse replaced by hyphens."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.name.lower()).strip("-")[:40].strip("-")
    return spec.name or (slug if re.match(r"[a-z]", slug) else f"m-{slug}"[:40].strip("-"))


def weights_id(model: Model, weights: str, revision: str, endpoints: Mapping[str, str]) -> str:
    """The name of the folder that a model's weights lie in on a node: another place of theirs, another folder."""
    came_from = "@".join((weights, revision, *endpoints.values()))
    slug = re.sub(r"[^a-z0-9.-]+", "-", model.name.lower()).strip("-.")[:40] or "weights"
    return f"{slug}-{hashlib.sha256(came_from.encode()).hexdigest()[:8]}"


def _context(sourced: Sourced, model: Model) -> int:
    asked, shape = sourced.spec.max_model_len, model.shape
    if shape is None:
        return asked or 8192
    if asked is not None and asked > shape.context:
        raise UserError(
            f"{sourced.place('max_model_len')}: {sourced.number('max_model_len')} is beyond the context of {model.name}, {shape.context} tokens; "
            f"give at most {shape.context}"
        )
    return asked or shape.context


def _check_public(sourced: Sourced) -> None:
    spec = sourced.spec
    if spec.public and spec.cloud == (LOCAL,):
        raise UserError(
            f"{sourced.place('public')}: --cloud local serves this machine alone, on 127.0.0.1; leave one of the two out"
        )
    for name in ("allow", "cert", "key"):
        if getattr(spec, name) and not spec.public:
            raise UserError(f"{sourced.place(name)}: means nothing without --public; add that or leave this out")
    if (spec.cert is None) != (spec.key is None):
        given, other = ("cert", "key") if spec.cert else ("key", "cert")
        raise UserError(f"{sourced.place(given)}: needs --{other} as well")
    if spec.allow and (open_ := [cloud for cloud in spec.cloud if not clouds.firewall(cloud)]):
        raise UserError(f"{sourced.place('allow')}: mistralctl cannot set the firewall of {open_[0]}; leave out one of the two")


def _check_images(sourced: Sourced) -> None:
    spec, place = sourced.spec, sourced.place("image")
    if isinstance(spec.image, str) and len(spec.cloud) != 1:
        raise UserError(f"{place}: {spec.image!r} needs exactly one cloud beside it; add --cloud, or write CLOUD=ID")
    for cloud, image in spec.images.items():
        if spec.cloud and cloud not in spec.cloud:
            raise UserError(
                f"{place}: {image!r} is for {cloud}, which is not among the clouds; add --cloud {cloud}, or leave it out"
            )
        if wrong := images.misspelt(cloud, image):
            raise UserError(f"{place}: {image!r} {wrong}")
        if spec.region is None and images.is_regional(cloud, image):
            raise UserError(f"{place}: {image!r} is the image of one region; add --cloud {cloud} and that --region")


def _check_places(sourced: Sourced) -> None:
    _check_public(sourced)
    spec = sourced.spec
    if spec.keys_uri and spec.keys_uri.startswith("file://") and spec.cloud != (LOCAL,):
        raise UserError(f"{sourced.place('keys_uri')}: {spec.keys_uri} is a file of this machine, which a node in a cloud cannot read; "
                        "name an object in a bucket")  # fmt: skip
    named = [
        field
        for field in ("region", "zone", "accelerators", "image", "disk_tier", "max_price")
        if getattr(spec, field) is not None
    ]
    if spec.cloud == (LOCAL,):
        if spec.spot:
            named.append("spot")
        if spec.budget is not None:
            raise UserError(f"{sourced.place('budget')}: this machine has no price (--cloud local); leave one of the two out")
        if named:
            raise UserError(f"{sourced.place(named[0])}: means nothing on this machine (--cloud local); leave one of the two out")
        return
    _check_images(sourced)
    if spec.region is None and spec.zone is None:
        return
    field = "region" if spec.region else "zone"
    if len(spec.cloud) != 1:
        raise UserError(f"{sourced.place(field)}: needs exactly one cloud beside it; add for example --cloud {clouds.names()[0]}")
    cloud = clouds.facts(spec.cloud[0])
    if spec.region is None:
        raise UserError(f"{sourced.place('zone')}: needs its region beside it; add --region")
    if spec.region not in cloud.regions:
        near = suggest(spec.region, sorted(cloud.regions))
        elsewhere = [other.name for other in clouds.every() if spec.region in other.regions]
        hint = (f"it is one of {elsewhere[0]}'s" if elsewhere else f"did you mean {near}?" if near
                else f"one of {', '.join(sorted(cloud.regions))}")  # fmt: skip
        raise UserError(f"{sourced.place('region')}: {cloud.name} has no region {spec.region!r}; {hint}")
    if spec.zone is not None and not cloud.has_zone(spec.region, spec.zone):
        example = (cloud.zone or "").format(region=spec.region).replace("[a-f]", "a")
        hint = f"for example {example}" if cloud.zone else f"leave --zone out: SkyPilot takes no zones on {cloud.name}"
        raise UserError(f"{sourced.place('zone')}: {spec.zone!r} is not a zone of {spec.region}; {hint}")


def _accelerators(sourced: Sourced) -> tuple[str | None, int]:
    """The GPU that was asked for (None: any) and how many of them."""
    spec = sourced.spec
    if spec.accelerators is None:
        return None, spec.tensor_parallel or 1
    name, count = parse_accelerators(spec.accelerators)
    if spec.tensor_parallel not in (None, count):
        raise UserError(
            f"{sourced.place('tensor_parallel')}: {sourced.number('tensor_parallel')} does not go with "
            f"{sourced.place('accelerators')} {name}:{count}; leave it out or make the two equal"
        )
    return name, count


def _gpu_option(plan: _Draft, cloud: str, gpu: Gpu, count: int, offer: prices.Offer | None) -> Option:
    reasons = memory.refused(gpu, plan.dtype, plan.spec.quantization, plan.model.stored.scheme)
    fitted = None
    if plan.shape is not None:
        serving = plan.serving("cuda", plan.spec.max_concurrency or 1, count)
        room = gpu.memory_gib * GIB * memory.MEMORY_UTILIZATION
        fitted = memory.fit(plan.shape, serving, memory_bytes=room, weights=plan.weight_bytes)
        if fitted.reason:
            reasons.append(fitted.reason)
    if not reasons and (unfit := images.refusal(cloud, gpu.name, plan.spec.images.get(cloud))):
        reasons.append(unfit)
    return Option(
        cloud, gpu.name, count, offer.instance_type if offer else None, offer.region if offer else None,
        offer.price if offer else None, offer.spot_price if offer else None, fitted, ", and ".join(reasons) or None,
    )  # fmt: skip


SMALL_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class _Draft:
    """What is settled before machines are looked at."""

    spec: DeploymentSpec
    model: Model
    dtype: str
    max_model_len: int
    lora_rank: int

    def serving(self, device: str, requests: int, gpus: int = 1) -> memory.Serving:
        """Return how so many requests are served, with a slot for each adapter."""
        return memory.Serving(
            self.dtype, self.max_model_len, device, gpus, requests, len(self.spec.lora), self.lora_rank, self.spec.engine
        )

    @property
    def shape(self) -> Shape | None:
        return self.model.shape

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; 0 where the shape is not known."""
        stored, shape = self.model.stored, self.shape
        return memory.weight_bytes(shape, self.dtype, self.spec.quantization, stored) if shape else 0


def _most_seqs(spec: DeploymentSpec, device: str) -> int:
    """How many requests the server computes at a time."""
    return spec.max_concurrency or DEFAULT_SEQS[device]


def _cpu_cache_gib(draft: _Draft, memory_bytes: float) -> int:
    """Whole GiB of cache that a machine of that memory can hold beside weights and system: at most CPU_CACHE_GIB, and no more than
    the requests that run at a time can fill, because vLLM writes to all of it before it serves."""
    weights, adapters, most = 0, 0, CPU_CACHE_GIB
    if draft.shape is not None:
        weights = draft.weight_bytes
        serving = draft.serving("cpu", _most_seqs(draft.spec, "cpu"))
        adapters, filled = memory.adapter_bytes(draft.shape, serving), memory.cache_bytes(draft.shape, serving)
        most = min(most, memory.cdiv(filled, GIB))
    free = memory_bytes - CPU_OVERHEAD_BYTES - weights * CPU_WEIGHTS_FACTOR - adapters
    return max(0, min(most, math.floor(free / GIB / 2)))


def _cpu_option(draft: _Draft, cloud: str, label: str | None, memory_bytes: float, offer: prices.Offer | None) -> Option:
    fitted = reason = None
    gib = _cpu_cache_gib(draft, memory_bytes)
    if draft.shape is not None:
        weights = draft.weight_bytes
        if gib == 0:
            reason = (
                f"{weights / GIB:.1f} GiB of weights and {CPU_OVERHEAD_BYTES // GIB} GiB for {SAYS[draft.spec.engine]} and the system leave no "
                f"room for the cache in {memory_bytes / GIB:.0f} GiB"
            )
        serving = draft.serving("cpu", draft.spec.max_concurrency or 1)
        taken = weights + memory.OVERHEAD_BYTES[draft.spec.engine] + memory.adapter_bytes(draft.shape, serving)
        fitted = memory.fit(draft.shape, serving, memory_bytes=gib * GIB + taken, weights=weights)
        reason = reason or fitted.reason
    if (method := _method(draft.model, draft.spec)) == "fp8" or (method and not draft.model.stored.known):
        reason = f"{method} needs a GPU"
    return Option(
        cloud, None, 0, label, offer.region if offer else None, offer.price if offer else None,
        offer.spot_price if offer else None, fitted, reason,
    )  # fmt: skip


def _options(draft: _Draft, sourced: Sourced, cloud: str, on_cpu: bool) -> list[Option]:
    """Each kind of machine of one cloud, with the offer of its cheapest region (or of the region that was asked for)."""
    spec = draft.spec
    wanted, count = _accelerators(sourced)
    cheapest: dict[str, prices.Offer] = {}
    for offer in prices.offers(cloud):
        kind = offer.accelerator or offer.instance_type
        if (offer.accelerator is None) != on_cpu or (not on_cpu and offer.count != count):
            continue
        if on_cpu and (offer.vcpus < SMALLEST_CPU_NODE[0] or offer.memory_gib < SMALLEST_CPU_NODE[1]):
            continue
        if wanted is not None and offer.accelerator != wanted:
            continue
        if spec.region is not None and offer.region != spec.region:
            offer = replace(offer, region=spec.region, price=math.inf, spot_price=None)  # sold, but no price known here
        old, price = cheapest.get(kind), _price(offer, spec)
        if old is None or price < _price(old, spec):
            cheapest[kind] = offer
    found = []
    for offer in cheapest.values():
        option = (
            _cpu_option(draft, cloud, offer.instance_type, SMALLEST_CPU_NODE[1] * GIB, offer)
            if offer.accelerator is None
            else _gpu_option(draft, cloud, GPUS[offer.accelerator], count, offer)
        )
        if offer.spot_only and not spec.spot:
            why = f"{cloud} sells {offer.instance_type} as a spot machine only; add --spot"
            option = replace(option, price=None, reason=option.reason or why)
        found.append(replace(option, price=None) if offer.price == math.inf else option)
    return found


def _price(machine: prices.Offer | Option, spec: DeploymentSpec) -> float:
    """The price that counts for this spec; infinite where the snapshot has none."""
    price = machine.spot_price if spec.spot else machine.price
    return math.inf if price is None else price


def _too_dear(option: Option, sourced: Sourced, fitting: list[Option]) -> str | None:
    """Why a machine that fits is not taken; `fitting` are all that do, cheapest first."""
    spec = sourced.spec
    price, cheapest = _price(option, spec), _price(fitting[0], spec)
    first = option.cloud in spec.cloud and option is next(o for o in fitting if o.cloud == option.cloud)
    if price == math.inf:
        unknown = spec.spot and spec.accelerators is None and option.price is not None and not first
        return "the snapshot has no spot price for it; ask for it with --accelerators" if unknown else None
    if spec.max_price is not None:
        return (
            f"{price:.2f} USD/h is above {sourced.place('max_price')} {sourced.number('max_price')}"
            if price > spec.max_price
            else None
        )
    if spec.accelerators is None and not first and price > FALLBACK_FACTOR * cheapest:
        return f"{price:.2f} USD/h is more than twice the cheapest that fits; ask for it with --accelerators or --max-price"
    return None


def _local(draft: _Draft, sourced: Sourced, machine: Machine) -> Option:
    if not machine.gpus:
        if draft.spec.tensor_parallel not in (None, 1):
            raise UserError(f"{sourced.place('tensor_parallel')}: this machine has no GPU to share; leave it out")
        return _cpu_option(draft, LOCAL, machine.label, machine.memory_bytes, None)
    count = draft.spec.tensor_parallel or 1
    if count > len(machine.gpus):
        raise UserError(
            f"{sourced.place('tensor_parallel')}: {sourced.number('tensor_parallel')} GPUs are asked for, this machine has {len(machine.gpus)}; "
            f"give at most {len(machine.gpus)}"
        )
    return replace(_gpu_option(draft, LOCAL, machine.gpus[0], count, None), instance_type=machine.label)


def _nothing_fits(draft: _Draft, sourced: Sourced, refused: list[Option]) -> UserError:
    spec = draft.spec
    if not refused and spec.cloud != (LOCAL,):
        return _nowhere_sold(draft, sourced)
    too_dear = f" USD/h is above {sourced.place('max_price')} "
    dear = [_price(option, spec) for option in refused if too_dear in (option.reason or "")]
    reasons = dict.fromkeys(f"{o.label}: {o.reason}" for o in refused if too_dear not in (o.reason or ""))
    if dear:
        reasons[
            f"{sourced.place('max_price')} {sourced.number('max_price')} is below the cheapest that would fit, {min(dear):.2f} USD/h"
        ] = None
    whys = "; ".join(reasons)
    hints = []
    if draft.shape is not None and not dear:
        would = [
            gpu.name for gpu in GPUS.values()
            if gpu.name not in {o.accelerator for o in refused}
            and _gpu_option(draft, "", gpu, max(1, refused[0].count if refused else 1), None).reason is None
        ]  # fmt: skip
        if would:
            hints.append(f"{', '.join(would)} would fit")
        if any(o.fit and o.fit.reason and o.fit.cache_tokens for o in refused):
            hints.append("a smaller --max-model-len or --max-concurrency needs less")
    if spec.cloud == (LOCAL,) and not draft.model.runs_on_cpu:
        hints.append("smollm2-135m-instruct runs on any machine, and mistralctl plan shows the clouds")
    given = f"{sourced.place('accelerators')}: " if spec.accelerators else ""
    return UserError(f"{given}{draft.model.name} does not fit: {whys}" + "".join(f"; {h}" for h in hints), Exit.NO_FIT)


def _nowhere_sold(draft: _Draft, sourced: Sourced) -> UserError:
    """The error where the snapshot has no such machine at all: what is missing, and what is sold there or elsewhere."""
    spec = sourced.spec
    name, count = _accelerators(sourced)
    asked = next((one for one in ("accelerators", "tensor_parallel", "region") if getattr(spec, one) is not None), "cloud")
    here = [offer for cloud in spec.cloud or clouds.names() for offer in prices.offers(cloud) if offer.accelerator]
    near = [offer for offer in here if spec.region in (None, offer.region)]
    elsewhere = {
        offer.cloud: None for cloud in clouds.names() for offer in prices.offers(cloud)
        if offer.count == count and name in (None, offer.accelerator) and cloud not in spec.cloud
    }  # fmt: skip
    would = dict.fromkeys(
        f"{offer.accelerator}:{offer.count}" for offer in sorted(near, key=lambda offer: _price(offer, spec))
        if _gpu_option(draft, offer.cloud, GPUS[str(offer.accelerator)], offer.count, offer).reason is None
    )  # fmt: skip
    where = (", ".join(spec.cloud) or "no cloud") + (f" in {spec.region}" if spec.region else "")
    hints = [
        f"{', '.join([*would][:4])} would fit there" if would else "",
        f"it is sold on {', '.join(elsewhere)}" if elsewhere else "",
    ]
    return UserError(
        f"{sourced.place(asked)}: {where} sells no {f'{name}:{count}' if name else f'machine with {count} GPUs'} in the snapshot"
        + "".join(f"; {hint}" for hint in hints if hint),
        Exit.NO_FIT,
    )


def _method(model: Model, spec: DeploymentSpec) -> str | None:
    """How the weights are quantized in memory."""
    return model.stored.scheme.method if model.stored.scheme else spec.quantization


def _check_quantization(sourced: Sourced, model: Model, dtype: str) -> None:
    stored, method = model.stored, _method(model, sourced.spec)
    try:
        quantization.check(sourced.spec.quantization, stored.scheme, stored.known)
    except ValueError as error:
        raise UserError(f"{sourced.place('quantization')}: {error}") from None
    if method and dtype not in METHODS[method].dtypes:
        raise UserError(f"{sourced.place('dtype')}: {method} computes in {' or '.join(METHODS[method].dtypes)}, not in {dtype}")


def _check_engine(sourced: Sourced, model: Model) -> None:
    """UserError for what this engine does not have, before a machine is looked for."""
    spec, engine = sourced.spec, ENGINES[sourced.spec.engine]
    for name in engine.lacks:
        if getattr(spec, name) not in (None, 1, (), {}):
            _lacks(sourced, sourced.place(name), "leave one of the two out")
    if "tensor_parallel" in engine.lacks and spec.accelerators and parse_accelerators(spec.accelerators)[1] > 1:
        _lacks(sourced, f"{sourced.place('accelerators')} {spec.accelerators}", "ask for one GPU")
    if not engine.quantized and model.stored.scheme:
        _lacks(sourced, f"weights that are quantized with {model.stored.scheme.method}", "serve others, or with --engine vllm")
    if not engine.scaled_rope and model.shape and model.shape.rope_type != "default":
        _lacks(sourced, f"{model.name}'s rotary embedding of type {model.shape.rope_type}", f"serve it with --engine {VLLM}")


def _lacks(sourced: Sourced, what: str, hint: str) -> None:
    raise UserError(f"{sourced.place('engine')}: {sourced.spec.engine} does not have {what}; {hint}")


def _auto_dtype(model: Model, method: str | None, on_cpu: bool) -> str:
    """What --dtype auto means: bfloat16, but float32 for a small model on a CPU.

    There memory is plenty, few processors compute in bfloat16 at all, and those that do round so differently that SmolLM2-135M answers
    "What is the capital of France?" rightly with vLLM's vector kernel and wrongly with its AMX kernel (log-probabilities 0.2 apart).
    """
    small = model.shape is not None and model.shape.parameters <= SMALL_PARAMETERS
    small = small and (method is None or "float32" in METHODS[method].dtypes)
    return "float32" if on_cpu and small else "bfloat16"


def make(
    sourced: Sourced, model: Model, machine: Machine | None, endpoints: Mapping[str, str] | None = None, lora_rank: int = 0
) -> Plan:
    """The plan for a spec. `machine` is needed for `--cloud local` only, `lora_rank` where adapters are. UserError when nothing fits."""
    endpoints = endpoints or {}
    spec = sourced.spec
    _check_places(sourced)
    local = spec.cloud == (LOCAL,)
    if model.shape is None and not local and spec.accelerators is None:
        raise UserError(
            f"{sourced.place('model')}: the size of {model.name} is only known on the node; add --accelerators, or give a "
            "row of the table and the URI as --weights"
        )
    on_cpu = model.runs_on_cpu and spec.accelerators is None and spec.tensor_parallel is None
    if local:
        on_cpu = machine is not None and not machine.gpus
    dtype = _auto_dtype(model, _method(model, spec), on_cpu) if spec.dtype == "auto" else spec.dtype
    _check_quantization(sourced, model, dtype)
    _check_engine(sourced, model)
    draft = _Draft(spec, model, dtype, _context(sourced, model), lora_rank)
    if model.shape and spec.tensor_parallel and model.shape.kv_heads % spec.tensor_parallel:
        raise UserError(
            f"{sourced.place('tensor_parallel')}: {sourced.number('tensor_parallel')} GPUs cannot share {model.shape.kv_heads} key-value "
            "heads evenly; give a divisor"
        )
    if local:
        if machine is None:
            raise ValueError("a local plan needs the machine")
        option = _local(draft, sourced, machine)
        fitting, refused = ([], [option]) if option.reason else ([option], [])
        device = "cuda" if machine.gpus else "cpu"
    else:
        device = "cpu" if on_cpu else "cuda"
        possible = spec.cloud or [cloud for cloud in clouds.names() if not spec.allow or clouds.firewall(cloud)]
        every = [o for cloud in possible for o in _options(draft, sourced, cloud, on_cpu)]
        every.sort(key=lambda o: (_price(o, spec), o.cloud, o.label))
        fitting = [option for option in every if option.reason is None]
        every = [o if o.reason else replace(o, reason=_too_dear(o, sourced, fitting)) for o in every]
        fitting, refused = [o for o in every if o.reason is None], [o for o in every if o.reason]
        if on_cpu:  # one size of machine is asked for on every cloud, so that the cache is the same wherever it lands
            fitting = [next(o for o in fitting if o.cloud == cloud) for cloud in dict.fromkeys(o.cloud for o in fitting)]
            refused = [o for o in refused if not fitting or (o.fit and o.fit.reason)]
    if not fitting:
        raise _nothing_fits(draft, sourced, refused)
    node_bytes = machine.memory_bytes if local and machine else SMALLEST_CPU_NODE[1] * GIB
    weights = spec.weights or model.weights
    revision = model.revision if weights == model.weights else ""
    window = model.shape.sliding_window if model.shape else None
    made = Plan(
        name=deployment_name(spec, model),
        model=model,
        spec=spec,
        device=device,
        weights=weights,
        revision=revision,
        weights_id=weights_id(model, weights, revision, endpoints),
        served_model_name=spec.served_model_name or model.name,
        max_model_len=draft.max_model_len,
        max_num_seqs=_most_seqs(spec, device),
        max_batched_tokens=memory.max_batched_tokens(window),
        sliding_window=window,
        dtype=dtype,
        tensor_parallel=max(1, fitting[0].count) if device == "cuda" else 1,
        kv_cache_gib=max(1, _cpu_cache_gib(draft, node_bytes)) if device == "cpu" else 0,
        idle_minutes=minutes(spec.idle),
        ttl_minutes=minutes(spec.ttl),
        options=tuple(fitting),
        refused=tuple(refused),
        rights=tuple(
            rights(
                (weights, *spec.lora.values(), *filter(None, [spec.keys_uri])), (option.cloud for option in fitting), endpoints
            )
        ),
        endpoints=endpoints,
    )
    _check_budget(sourced, made)
    return made


def _check_budget(sourced: Sourced, plan: Plan) -> None:
    if plan.price == math.inf:
        raise UserError(
            f"{sourced.place('budget')}: the snapshot has no price for this machine; add --max-price, by which it counts"
        )
    if plan.price is not None and plan.budget_minutes is not None and plan.budget_minutes < START_MINUTES:
        least = math.ceil(plan.price * START_MINUTES / 60 * 100) / 100
        raise UserError(
            f"{sourced.place('budget')}: {sourced.number('budget')} USD buys {plan.budget_minutes} minutes at {plan.price:.4f} USD an hour, and "
            f"a start alone takes about {START_MINUTES}; give at least {least:.2f}"
        )
