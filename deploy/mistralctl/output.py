"""Results as text or JSON; the one place that knows how they look."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from mistral_contract.engines import VLLM

from mistralctl import quotas
from mistralctl.clouds import LOCAL
from mistralctl.commands.doctor import Doctor
from mistralctl.commands.down import DownResult
from mistralctl.commands.env import Client
from mistralctl.commands.eval import Ahead, Compared, Progress
from mistralctl.commands.extend import Extended
from mistralctl.commands.finetune import Finetuned, Step
from mistralctl.commands.keys import KeyChange, KeyList
from mistralctl.commands.reap import Found, Reaped
from mistralctl.commands.receipt import Receipt, TrainingReceipt
from mistralctl.commands.status import Status
from mistralctl.commands.tables import GpuTable
from mistralctl.commands.up import UpResult
from mistralctl.commands.weights import Mirrored
from mistralctl.documents import as_json, as_yaml, line, plain
from mistralctl.evaluation import Evaluated
from mistralctl.fit import origin
from mistralctl.gpus import GIB
from mistralctl.models import Model
from mistralctl.plan import Option, Plan
from mistralctl.prices import SNAPSHOT_DATE
from mistralctl.reported import is_moment
from mistralctl.tables import lines as aligned
from mistralctl.tables import table


def _dollars(price: float | None) -> str:
    return "?" if price is None else f"{price:.2f}"


def _option(option: Option) -> list[str]:
    fit = option.fit
    tokens = "?" if fit is None else f"{fit.cache_tokens:,}"
    at_once = "?" if fit is None else f"{fit.concurrency:.1f}"
    without = "?" if fit is None else f"{fit.concurrency_without_window:.1f}"
    price, spot = ("-", "-") if option.cloud == LOCAL else (_dollars(option.price), _dollars(option.spot_price))
    where = option.region or "-"
    return [
        option.cloud,
        option.label if option.accelerator else "CPU",
        option.instance_type or "-",
        where,
        price,
        spot,
        tokens,
        at_once,
        without,
    ]


def plan_text(plan: Plan) -> str:
    """The arithmetic, the machines that fit, and why the others were refused."""
    scheme = plan.model.stored.scheme
    lines = [f"{plan.name}: {plan.model.name}, {plan.max_model_len} tokens, {plan.dtype}"
             + (f", {scheme.label if scheme else plan.spec.quantization}" if scheme or plan.spec.quantization else "")
             + (f", engine {plan.spec.engine}" if plan.spec.engine != VLLM else "")]  # fmt: skip
    fit = plan.chosen.fit
    windows = plan.model.shape.windows if plan.model.shape else (plan.sliding_window,)
    some = f" in {len(windows) - windows.count(None)} of {len(windows)} layers" if None in windows else ""
    window = f"window {plan.sliding_window}{some}" if plan.sliding_window else "no window"
    if fit is not None and plan.model.shape is not None:
        found = origin(plan.model.shape, plan.dtype, plan.model.stored)
        by = f" ({found})" if found else ""
        lines += [
            f"weights {fit.weight_bytes / GIB:.2f} GiB{by} and {fit.kv_bytes_per_token:,} B of cache a token on each GPU"
            if plan.device == "cuda"
            else f"weights {fit.weight_bytes / GIB:.2f} GiB{by}, {fit.kv_bytes_per_token:,} B of cache a token",
            f"one request holds at most {fit.request_tokens:,} tokens of cache ({window}); "
            f"with full attention {fit.request_tokens_without_window:,}",
        ]
        if fit.adapter_bytes:
            lines.append(f"the slots of {len(plan.spec.lora)} adapters take {fit.adapter_bytes / GIB:.2f} GiB")
    if plan.weights_digest:
        lines.append(f"weights: only those with the digest {plan.weights_digest}")
    elif plan.model.stored.digest:
        lines.append(f"weights: their manifest says the digest {plan.model.stored.digest}; the first up pins it")
    lines += [*plan.caveats, *plan.bought, *filter(None, [plan.endless])]
    lines.append("")
    head = ["CLOUD", "MACHINE", "TYPE", "REGION", "USD/H", "SPOT", "CACHE TOKENS", "REQUESTS", "WITHOUT WINDOW"]
    lines.append(table(head, [_option(option) for option in plan.options]))
    if plan.refused:
        lines += ["", "refused:"]
        lines += [f"  {option.cloud} {option.label}: {option.reason}" for option in plan.refused]
    if plan.rights:
        lines += ["", "reading buckets:", *(f"  {right.line}" for right in plan.rights)]
    if plan.quotas:
        lines += ["", "quotas:", *(f"  {line}" for line in quotas.table(plan.quotas))]
        lines += [f"  ask for more: {page}" for page in dict.fromkeys(q.page for q in plan.quotas if q.enough is False)]
    if not plan.local:
        lines += [
            "",
            f"prices: a snapshot of {SNAPSHOT_DATE}, cheapest region; SkyPilot's own catalog decides at launch",
        ]
    return "\n".join(lines)


def _gate(gate: dict[str, Any]) -> str:
    return f"{gate['routes']} routes asked in {gate['requests']} ways, open is only {', '.join(sorted(gate['let_in']))}"


def check_words(canary: dict[str, Any] | None) -> str:
    """What the canary found, in one line."""
    found = canary or {}
    against = f", {found['against']}" if found.get("against") else ""
    if found.get("state") == "verified":
        return f"verified, largest difference {found.get('max_difference')}, {found.get('tolerance')} is allowed{against}"
    if found.get("state") == "made here":
        return f"made here: the first start of these weights, later ones are compared with it{against}"
    return str(found.get("state") or "not known")


def ends(result: UpResult) -> str:
    """When a deployment ends by itself."""
    when = [f"{text} (--{option})" for value, text, option in (
        (result.idle, f"after {result.idle} without a request", "idle"), (result.ttl, f"after {result.ttl} in any case", "ttl"),
    ) if value != "never"]  # fmt: skip
    when += [f"when its machine has cost {result.budget:.2f} USD (--budget)"] if result.budget else []
    machine = "" if result.cloud == LOCAL else "; its machine goes five minutes later"
    return f"ends by itself {', and '.join(when)}{machine}" if when else "never ends by itself (--idle never, --ttl never)"


def up_text(result: UpResult) -> str:
    """The endpoint and three ways to use it."""
    name = shlex.quote(result.name)
    done = {"started": "is up", "replaced": "was replaced and is up", "unchanged": "is up already, nothing to do"}
    what, body = (
        ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
        if result.chat
        else ("completions", {"prompt": "Hello", "max_tokens": 32})
    )
    data = json.dumps({"model": result.served_model_name, **body})
    trust = f"--cacert {shlex.quote(result.ssl_cert_file)} " if result.ssl_cert_file else ""
    seconds = " + ".join(f"{phase.phase} {phase.seconds:.0f} s" for phase in result.phases)
    named = result.ssl_cert_file and f"//{result.address}:" not in result.base_url
    lines = [
        f"{result.name} {done[result.action]}: {result.base_url} ({result.model} on {result.cloud})",
        *([f"let that name point to {result.address}"] if named else []),
        *([f"phases: {seconds}"] if seconds and result.action != "unchanged" else []),
        *([f"gate: {_gate(result.gate)}"] if result.gate else []),
        *([f"check: {check_words(result.canary)}"] if result.canary else []),
        ends(result),
        "",
        "three ways to use it:",
        f"  mistralctl chat {name}",
        f'  eval "$(mistralctl env {name})"   # then any OpenAI client',
        f'  curl {trust}{result.base_url}/{what} -H "Authorization: Bearer $(cat {shlex.quote(result.key_file)})" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(data)}",
        "",
        f"stop it: mistralctl down {name}",
    ]
    return "\n".join(lines)


def down_text(results: list[DownResult]) -> str:
    """One line a name."""
    words = {
        "up": "is down", "down": "was down already", "failed": "did not come up, and is forgotten; its log stays",
        "damaged": "is down; its damaged record is kept as record.damaged",
    }  # fmt: skip
    lines = ["; ".join(filter(None, (f"{result.name} {words[result.was]}", result.left))) for result in results]
    return "\n".join(lines) or "nothing is known, nothing to do"


def _minutes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}m" if value < 120 else f"{value / 60:.1f}h"


def _spent(one: Status) -> str:
    """What a machine has cost, of what it may."""
    return ("-" if one.cost is None else f"{one.cost:.2f}") + (f" of {one.budget:.2f}" if one.budget is not None else "")


def status_text(results: list[Status]) -> str:
    """One row a name."""
    if not results:
        return "nothing is known; mistralctl up brings a model up"
    rows = [
        [r.name, r.state, " ".join(part for part in (r.cloud, r.region, r.machine) if part), r.model, r.base_url or "-",
         _minutes(r.uptime_minutes), _spent(r), _minutes(r.idle_left), _minutes(r.ttl_left)]
        for r in results
    ]  # fmt: skip
    head = ["NAME", "STATE", "WHERE", "MODEL", "ENDPOINT", "UP", "USD SO FAR", "IDLE LEFT", "TTL LEFT"]
    lines = [table(head, rows)]
    lines += [f"{r.name}: {r.why}" for r in results if r.why]
    for r in results:
        if (restarts := (r.launcher or {}).get("restarts") or {}).get("count"):
            lines.append(f"{r.name}: restart {restarts['count']} of {restarts['of']}, because {restarts.get('why')}")
        if (source := (r.launcher or {}).get("keys") or {}).get("problem"):
            lines.append(
                f"{r.name}: its keys are not followed since {_moment(source.get('since'))}, and those in force stay: {source['problem']}"
            )
        if why := ((r.launcher or {}).get("isolation") or {}).get("why"):
            lines.append(f"{r.name}: vLLM is less apart from the rest of its machine than it should be: {why}")
    for launcher in (r.launcher or {} for r in results if len(results) == 1):
        if engine := launcher.get("engine"):
            window = engine.get("sliding_window") or "none"
            lines.append(f"serves with {engine.get('class')}, window {window}, cache {engine.get('kv_cache_spec')}")
        if canary := launcher.get("canary"):
            lines.append(f"check: {check_words(canary)}")
    return "\n".join(lines)


def _moment(at: float | None) -> str:
    return "?" if not is_moment(at) else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def extended_text(result: Extended) -> str:
    """One line."""
    return f"{result.name} lives {result.by} longer: until {_moment(result.ends_at)}, {_minutes(result.ttl_left)} from now"


def _gib(value: int | None) -> str:
    return "?" if value is None else f"{value / GIB:.1f} GiB"


def _node_rows(node: dict[str, Any]) -> list[list[str]]:
    """What a deployment's machine says of itself, a row a thing."""
    gpus = [
        f"{gpu.get('name')}, {gpu.get('memory_used_mib')} of {gpu.get('memory_mib')} MiB used, capability {gpu.get('capability')}, "
        f"driver {gpu.get('driver')}" for gpu in node["gpus"] or ()
    ]  # fmt: skip
    pull = node["pull"] or {}
    speeds = []
    if pull.get("seconds"):
        speeds.append(f"{(pull.get('fetched') or 0) / 1e6 / pull['seconds']:.0f} MB/s from {pull.get('uri')}")
    if pull.get("disk_seconds"):
        speeds.append(f"disk {(pull.get('disk_written') or 0) / 1e6 / pull['disk_seconds']:.0f} MB/s while busy")
    return [
        ["image", node["image"] or "?"],
        ["system", f"{node['system']}, Linux {node['kernel']}, {node['cpus']} processors"],
        ["memory", f"{_gib(node['memory_available_bytes'])} available of {_gib(node['memory_bytes'])}"],
        ["disk", f"{_gib(node['disk_free_bytes'])} free of {_gib(node['disk_bytes'])}"],
        *(["GPU", gpu] for gpu in gpus or [f"none ({node['gpu_problem']})"]),
        *([["CUDA", f"the driver runs CUDA up to {node['cuda']}"]] if node["cuda"] else []),
        *([["devices", " ".join(node["devices"])]] if node["devices"] else []),
        ["programs", ", ".join(f"{name}: {path or 'none'}" for name, path in (node["programs"] or {}).items())],
        *([["pull", ", ".join(speeds)]] if speeds else []),
    ]


def node_text(node: dict[str, Any]) -> str:
    """What a deployment's machine says of itself now."""
    return _rows(_node_rows(node))


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(aligned(rows, least=[10]))


def fields_text(result: Any) -> str:
    """A row for each field of a result: what a command prints that has no text of its own."""
    return _rows([[name, str(value)] for name, value in plain(result).items()])


def _figure(value: Any) -> str:
    """A number of a receipt, short; ? where there is none."""
    return f"{value:.3g}" if isinstance(value, int | float) else "?"


def _training_text(result: TrainingReceipt) -> str:
    """What was trained, from what, and how it was proven."""
    told, where = (
        result.result,
        " ".join(part for part in (result.cloud, result.region, result.machine, "spot" if result.spot else "") if part),
    )
    cost = "" if result.usd is None else f", {result.usd:.2f} USD by the snapshot's price"
    loss, proof = told.get("loss") or {}, told.get("proof") or {}
    rows = [
        ["run", f"{result.name} ({told.get('method', '?')} of {result.model})"],
        ["where", where + cost],
        ["up", _moment(result.up_at)],
        ["down", "not yet" if result.down_at is None else _moment(result.down_at)],
        ["out", result.out],
        ["phases", " + ".join(f"{phase['phase']} {phase['seconds']:.0f} s" for phase in result.phases)],
        ["steps", _figure(told.get("steps"))],
        ["loss", f"{_figure(loss.get('first'))} to {_figure(loss.get('last'))}, of what was held out {_figure(loss.get('held_out'))}"],
        ["proof", f"log-probabilities of vLLM and peft differ by {_figure(proof.get('difference'))}, {_figure(proof.get('tolerance'))} is allowed"],
        ["versions", ", ".join(f"{name} {version}" for name, version in (told.get("libraries") or {}).items() if version)],
    ]  # fmt: skip
    return _rows(rows)


def receipt_text(result: Receipt | TrainingReceipt) -> str:
    """What matters most; `-o json` has it all."""
    if isinstance(result, TrainingReceipt):
        return _training_text(result)
    where = " ".join(part for part in (result.cloud, result.region, result.machine, "spot" if result.spot else "") if part)
    rows = [
        ["deployment", f"{result.name} ({result.model}, served as {result.served_model_name})"],
        ["where", where + (f", {result.price:.2f} USD an hour" if result.price is not None else "")],
        ["up", _moment(result.up_at)],
        ["down", "not yet" if result.down_at is None else _moment(result.down_at)],
        ["versions", ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)],
        ["weights", " ".join(part for part in (result.weights, result.revision) if part)],
        *(["", f"{file.name}: {file.size:,} bytes, sha256 {file.sha256}"] for file in result.files),
        *([["digest", result.weights_digest]] if result.weights_digest else []),
        ["phases", " + ".join(f"{phase['phase']} {phase['seconds']:.0f} s" for phase in result.phases)],
        ["check", check_words(result.canary)],
        ["gate", _gate(result.gate) if result.gate else "none"],
        ["flags", shlex.join(result.flags)],
        *(["evaluation", f"{model}: {file}"] for model, file in result.evaluations.items()),
        *(_node_rows(result.node) if result.node else []),
    ]  # fmt: skip
    return _rows(rows)


def _end(at: float | None) -> str:
    return "never" if at is None else _moment(at)


def keys_text(result: KeyList) -> str:
    """One row a key; whose counts are not known here has none."""
    head = [
        "ID",
        "NAME",
        "CREATED",
        "EXPIRES",
        "AT ONCE",
        "REQUESTS/MIN",
        "TOKENS/MIN",
        "TOKENS/DAY",
        "REQUESTS",
        "TOKENS",
        "REFUSED",
    ]
    rows = []
    for row in result.keys:
        limits = (row.requests_at_once, row.requests_per_minute, row.tokens_per_minute, row.tokens_per_day)
        counts = (row.requests, row.tokens, row.refused)
        rows.append(
            [row.id, row.name + (" *" if row.own else ""), _moment(row.created), _end(row.expires),
             *("-" if one is None else str(one) for one in (*limits, *counts))]
        )  # fmt: skip
    note = "*: this laptop's own" if any(row.own for row in result.keys) else ""
    asked = "" if result.live else f"{result.name} {result.why or 'is not up; these are the keys of its next up'}"
    return "\n".join([table(head, rows), *filter(None, (note, asked))])


def key_change_text(result: KeyChange) -> str:
    """What was done, and a new key in a line of its own, this once."""
    lines = [f"{result.action} {result.key_name} ({result.id}), in force {result.effective}"]
    if result.expires is not None:
        lines[0] += f", until {_end(result.expires)}"
    if result.old_id:
        lines.append(f"the key {result.old_id} before it is let in until {_end(result.old_expires)}")
    if result.key_file:
        lines.append(f"the new key is in {result.key_file}; mistralctl env {result.name} prints it")
    if result.key:
        lines += ["the key, which is stored nowhere and not shown again:", result.key]
    return "\n".join(lines)


def mirrored_text(result: Mirrored) -> str:
    """One line."""
    return f"{result.target} holds {result.source} ({result.seconds:.0f} s on a machine of {result.cloud}, which is gone)"


def step_text(step: Step) -> str:
    """How far training is, in one line."""
    left = "" if step.left_seconds is None else f", {_minutes(step.left_seconds / 60)} left"
    cost = "" if step.usd is None else f", {step.usd:.2f} USD so far"
    return f"step {step.step} of {step.steps}: loss {step.loss:.4f}, {step.tokens_per_second:.0f} tokens/s{left}{cost}"


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else _minutes(seconds / 60)


def ahead_text(ahead: Ahead) -> str:
    """What an evaluation takes, in one line: its requests, and once a few are answered, the time of the others."""
    if ahead.asked and ahead.left_seconds is not None:
        cost = "" if ahead.usd is None else f", in which the machine costs {ahead.usd:.2f} USD"
        return f"the other {ahead.open - ahead.asked:,} requests take about {_about(ahead.left_seconds)}{cost}"
    known = f", {ahead.requests - ahead.open:,} of them answered before" if ahead.open < ahead.requests else ""
    return f"{ahead.requests:,} requests{known}" + (
        "; the first ones show how long they take" if ahead.open else ": nothing is asked"
    )


def progress_text(progress: Progress) -> str:
    """How far an evaluation is, in one line."""
    left = "" if progress.left_seconds is None else f", {_about(progress.left_seconds)} left"
    return f"{progress.done:,} of {progress.of:,} requests answered{left}"


def evaluated_text(result: Evaluated) -> str:
    """A row a metric, with its interval."""
    head = ["AREA", "TASK", "METRIC", "SHOTS", "N", "VALUE", "95 % INTERVAL"]
    rows = [
        [one.area, one.task, one.metric, str(one.shots), str(one.n), f"{one.value:.3f}",
         "-" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"] for one in result.values
    ]  # fmt: skip
    asked = result.requests
    return (
        f"{result.model} of {result.name}, by {result.harness}\n\n{table(head, rows)}\n\n"
        f"{asked.all:,} requests, {asked.asked:,} of them asked now, in {_about(result.seconds)}\nkept: {result.file}"
    )


def compared_text(result: Compared) -> str:
    """A row a metric, with the difference in its standard errors."""
    head = ["TASK", "METRIC", "N", "FIRST", "SECOND", "DIFFERENCE", "STANDARD ERRORS"]
    rows = [
        [row.task, row.metric, str(row.n), f"{row.first:.3f}", f"{row.second:.3f}", f"{row.difference:+.3f}",
         ("-" if row.sigmas is None else f"{row.sigmas:+.1f}") + ("" if row.paired else " (other items)")] for row in result.rows
    ]  # fmt: skip
    return f"first:  {result.first}\nsecond: {result.second}\n\n{table(head, rows)}"


def finetuned_text(result: Finetuned) -> str:
    """Where the result is, what it took, and how it is served."""
    if result.action == "unchanged":
        return f"nothing to do: {result.out} holds the result of this run already\nserve it: {result.up}"
    seconds = ", ".join(f"{one.phase} {one.seconds:.1f} s" for one in result.phases)
    cost = "" if result.usd is None else f"; {result.usd:.2f} USD by the snapshot's price, and the machine is gone"
    loss = "" if result.loss is None else f", last loss {result.loss:.4f}"
    return f"{result.out} holds {result.method} of {result.model}{loss}{cost}\n{seconds}\nserve it: {result.up}"


def _fate(part: Found) -> str:
    """Whether a part stays, goes or went, or why nobody can say."""
    if part.problem:
        return f"{'could not be deleted' if part.due else 'unknown'}: {part.problem}"
    return "deleted" if part.deleted else part.due or "stays"


def parts_text(found: Sequence[Found]) -> str:
    """One row a machine, disk or address."""
    rows = [
        [f.name, f.kind, f.id, f"{f.cloud} {f.place}", f.size, f.state, _minutes(f.age_minutes),
         "-" if f.per_day is None else f"{f.per_day:.2f}", _fate(f)]
        for f in found
    ]  # fmt: skip
    return table(["NAME", "KIND", "ID", "WHERE", "SIZE", "STATE", "AGE", "USD/DAY", "WHAT"], rows)


def reap_text(result: Reaped) -> str:
    """What was found, and which clouds could not be asked."""
    asked = ", ".join(one.cloud for one in result.clouds if one.state in ("asked", "partly"))
    nothing = f"nothing with our labels is there ({asked})" if asked else "nobody could be asked"
    lines = [parts_text(result.parts) if result.parts else nothing]
    return "\n".join([*lines, *(f"{one.cloud} {one.state}: {one.why}" for one in result.clouds if one.state != "asked")])


def connect_text(client: Client) -> str:
    """One line."""
    return f"{client.name} answers at {client.base_url}"


def models_text(models: list[Model]) -> str:
    """The table of models."""
    rows = [
        [m.name, f"{m.shape.parameters / 1e9:.2f}B", str(m.shape.sliding_window or "none"), str(m.shape.context),
         "yes" if m.chat else "no", "yes" if m.tool_parser else "no", m.licence, "not pinned" if m.unpinned else m.checked,
         m.weights.split("#")[0], "; ".join(filter(None, (m.note, m.terms)))]
        for m in models if m.shape is not None
    ]  # fmt: skip
    return table(["MODEL", "SIZE", "WINDOW", "CONTEXT", "CHAT", "TOOLS", "LICENCE", "CHECKED", "WEIGHTS", "NOTE"], rows)


def gpus_text(gpus: GpuTable) -> str:
    """The table of GPUs, and where its prices come from."""
    rows = [
        [f"{r.accelerator}:{r.count}", f"{r.memory_gib:.1f}", "yes" if r.bfloat16 else "no", r.cloud, r.instance_type,
         r.region, _dollars(r.price), _dollars(r.spot_price)]
        for r in gpus.rows
    ]  # fmt: skip
    head = ["GPU", "GIB", "BF16", "CLOUD", "TYPE", "CHEAPEST REGION", "USD/H", "SPOT"]
    return f"{table(head, rows)}\n\nprices: a snapshot of {gpus.date}, not today's; from {gpus.source}"


def doctor_text(doctor: Doctor) -> str:
    """One row a check, and for each that is missing the command that mends it."""
    rows = [["ok" if c.ok else "--", c.name, c.found, c.needed_for, "" if c.ok else c.mend] for c in doctor.checks]
    made = "" if doctor.node.exists else " (made by the first mistralctl up --cloud local)"
    lines = [table(["", "CHECK", "FOUND", "NEEDED FOR", "TO MEND IT"], rows), ""]
    return "\n".join([*lines, f"laptop: {doctor.laptop.python}", f"node:   {doctor.node.python}{made}"])


def weights_text(result: Any) -> str:
    """What the weights tool itself says of a pull, a mirror, a check or a list."""
    from mistralctl import weights

    return weights.text(result)


def event(result: Any) -> str:
    """The last of the JSON lines of a command that told its progress in such lines."""
    return line({"event": "result", **plain(result)})


Render = Callable[[Any], str]


def dumped(result: Any, form: str, text: Render) -> str:
    """The result in the form that -o asked for."""
    return {"text": text, "json": as_json, "yaml": as_yaml}[form](result)
