"""A first run on a real account, scripted: one machine is rented, looked at from all sides, and taken away; the report is Markdown.

    make real CLOUD=aws                    # asks before it rents; at most --max-price an hour for --ttl 1h
    .venv/bin/python benchmarks/real_run.py --cloud aws --max-price 1.50 [--model M] [--tools-model M] [--skip STEP] [--yes]

It uses `mistralctl` as a person does, with this account's credentials. Each step is tried whatever became of the others, Ctrl-C included the
machine is taken away at the end, and the exit code is 1 if a step failed. `--skip` leaves a step out (repeatable; the report says so).
The report belongs into docs/real-runs.md: it has prices, versions, the machine and its image, no key and no address.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistralctl import clouds

CLI = [sys.executable, "-m", "mistralctl"]
UP_SECONDS, DOWN_SECONDS, IDLE_SECONDS = 3600, 900, 1500
SHUT = (80, 443, 8000)  # what a stranger tries first; 22 is SSH's
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
STEPS = ("machine", "routes", "ports", "chat", "long prompt", "eight at once", "tools", "idle")


class Failed(Exception):
    """Why a step failed, in one line."""


class LeftOut(Exception):
    """Why a step could not be taken."""


@dataclass
class Row:
    """A step of the report."""

    step: str
    state: str
    seconds: float
    said: str


@dataclass
class Run:
    """What is known of the run so far; `file` has it as Markdown after each step, so that a laptop that dies loses nothing."""

    options: argparse.Namespace
    file: Path
    rows: list[Row] = field(default_factory=list)
    price: float | None = None
    rented_at: float | None = None
    receipt: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    routes: str = ""

    @property
    def name(self) -> str:
        return str(self.options.name)


def cli(*words: str, seconds: float = 120) -> str:
    """What `mistralctl` printed; Failed with its own line if it ended otherwise than with 0."""
    try:
        done = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"mistralctl {words[0]} did not end within {seconds:.0f} s") from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.startswith("mistralctl: ")] or done.stderr.splitlines()[-1:]
        raise Failed(f"mistralctl {words[0]} ended with {done.returncode}: {' '.join(last).removeprefix('mistralctl: ')[:600]}")
    return done.stdout


@contextmanager
def client(run: Run) -> Iterator[Any]:
    """An openai client of the deployment, as `mistralctl env` sets one up, and the model's name."""
    import openai

    variables = dict(word.split("=", 1) for word in shlex.split(cli("env", run.name)) if "=" in word)
    with openai.OpenAI(
        base_url=variables["OPENAI_BASE_URL"], api_key=variables["OPENAI_API_KEY"], timeout=600, max_retries=0
    ) as one:
        yield one


def streamed(one: Any, prompt: str, most: int, **more: Any) -> tuple[str, float, float, Any]:
    """The text of a streamed chat, seconds to its first piece, tokens a second after that, and its usage."""
    began, first, text, usage = time.monotonic(), 0.0, "", None
    stream = one.chat.completions.create(
        model=one.models.list().data[0].id, messages=[{"role": "user", "content": prompt}], max_tokens=most, stream=True,
        stream_options={"include_usage": True}, **more,
    )  # fmt: skip
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - began
            text += chunk.choices[0].delta.content
    if usage is None or not text:
        raise Failed("no text came")
    seconds = time.monotonic() - began - first
    return text, first, (usage.completion_tokens - 1) / seconds if seconds else 0.0, usage


# --- steps: each returns what the report says of it --------------------------------------------------------------------


def up_words(run: Run, model: str, idle: str) -> list[str]:
    of = run.options
    weights = ("--weights", of.weights) if of.weights and model == of.model else ()
    return ["up", model, "--cloud", of.cloud, "--name", run.name, "--max-price", f"{of.max_price}", "--ttl", of.ttl, "--idle", idle,
            *weights, "--yes", "-o", "json"]  # fmt: skip


def up(run: Run) -> str:
    run.rented_at = time.time()
    done = json.loads(cli(*up_words(run, run.options.model, "30m"), seconds=UP_SECONDS))
    run.receipt = json.loads(cli("receipt", run.name, "-o", "json"))
    run.price = run.receipt["price"]
    phases = ", ".join(f"{phase['phase']} {phase['seconds']:.0f}" for phase in done["phases"])
    return f"{run.receipt['machine']} in {run.receipt['region']}; check: {run.receipt['canary']['state']}; seconds: {phases}"


def machine(run: Run) -> str:
    run.machine = cli("doctor", "--node", run.name)
    found = json.loads(cli("doctor", "--node", run.name, "-o", "json"))
    return f"image {found['image'] or 'not known'}; {', '.join(gpu['name'] for gpu in found['gpus']) or found['gpu_problem']}"


def routes(run: Run) -> str:
    run.routes = (home(run) / "gate.txt").read_text("utf-8")
    gate = run.receipt["gate"]
    return f"{gate['routes']} routes asked in {gate['requests']} ways; open: {', '.join(sorted(gate['let_in']))}"


def home(run: Run) -> Path:
    folder = Path(os.environ.get("MISTRALCTL_HOME") or Path.home() / ".mistralctl")
    return folder / "deployments" / run.name


def ports(run: Run) -> str:
    found = re.search(r"HostName (\S+)", (home(run) / "ssh_config").read_text("utf-8"))
    if found is None:
        raise Failed("the machine's address is not known")
    answering = []
    for port in SHUT:
        try:
            socket.create_connection((found[1], port), timeout=5).close()
            answering.append(port)
        except OSError:
            continue
    if answering:
        raise Failed(f"the machine answers from outside at {answering}")
    return f"nothing answers at {', '.join(map(str, SHUT))} from here"


def chat(run: Run) -> str:
    with client(run) as one:
        text, first, rate, _ = streamed(one, "Why is the sky blue? Answer in three sentences.", 200, temperature=0.7, top_p=0.9)
    return f"top_p 0.9: first token after {first:.2f} s, then {rate:.1f} tokens/s: {' '.join(text.split())[:120]!r}"


def long_prompt(run: Run) -> str:
    [status] = json.loads(cli("status", run.name, "-o", "json"))["items"]
    room = status["launcher"]["engine"]["max_model_len"] - 200
    wanted = min(run.options.prompt_tokens, room)
    ask = "\nHow many different words are above this line?"
    with client(run) as one:
        # A small model may end at once: what is measured needs an answer, whatever it says.
        usages = [streamed(one, "one " * count + ask, 4, temperature=0, extra_body={"min_tokens": 4})[3] for count in (100, 300)]
        per_word = (usages[1].prompt_tokens - usages[0].prompt_tokens) / 200
        count = 300 + int((wanted - usages[1].prompt_tokens) / per_word)
        _, first, _, usage = streamed(one, "one " * count + ask, 32, temperature=0, extra_body={"min_tokens": 32})
    short = "" if wanted == run.options.prompt_tokens else f" (the context allows no {run.options.prompt_tokens})"
    return f"{usage.prompt_tokens} tokens{short}: first token after {first:.2f} s, {usage.prompt_tokens / first:.0f} tokens/s"


def eight(run: Run) -> str:
    with client(run) as one:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(streamed, one, f"Write about the number {n}.", 128, temperature=0.7) for n in range(8)]
            tokens = sum(answer.result()[3].completion_tokens for answer in asked)
        return f"{tokens} tokens in {time.monotonic() - began:.1f} s: {tokens / (time.monotonic() - began):.0f} tokens/s"


def tools(run: Run) -> str:
    model = run.options.tools_model
    if not any(row["name"] == model and row["tool_parser"] for row in json.loads(cli("models", "-o", "json"))["items"]):
        raise LeftOut(f"{model} calls no tools")
    began = time.monotonic()
    cli(*up_words(run, model, "30m"), seconds=UP_SECONDS)
    replaced = time.monotonic() - began
    with client(run) as one:
        answer = one.chat.completions.create(
            model=one.models.list().data[0].id, messages=[{"role": "user", "content": "What is the weather in Paris now?"}],
            tools=[TOOL], temperature=0, max_tokens=200,
        )  # fmt: skip
    calls = answer.choices[0].message.tool_calls or []
    if not calls or calls[0].function.name != "weather" or "Paris" not in calls[0].function.arguments:
        raise Failed(f"{model} called no tool but said {answer.choices[0].message.content!r}"[:300])
    return f"{model} (server replaced in {replaced:.0f} s) calls weather({calls[0].function.arguments})"


def idle(run: Run) -> str:
    [status] = json.loads(cli("status", run.name, "-o", "json"))["items"]
    cli(*up_words(run, status["model"], "1m"), seconds=UP_SECONDS)
    began = time.monotonic()
    while time.monotonic() - began < IDLE_SECONDS:
        if not parts(run, "machine"):
            return f"without a request the machine was gone after {time.monotonic() - began:.0f} s (idle 1m, then SkyPilot's autostop)"
        time.sleep(10)
    raise Failed(f"the machine is still there {IDLE_SECONDS} s after the last request")


def parts(run: Run, kind: str | None = None) -> list[dict[str, Any]]:
    """What the cloud lists of this run, but for what is on its way out."""
    found = json.loads(cli("reap", "--dry-run", "--cloud", run.options.cloud, "-o", "json"))["parts"]
    going = ("shutting-down", "deleting")
    return [
        one for one in found
        if one["name"] == run.name and kind in (None, one["kind"]) and one["state"].lower() not in going
    ]  # fmt: skip


def down(run: Run) -> str:
    cli("down", run.name, seconds=DOWN_SECONDS)
    if left := parts(run):
        raise Failed(f"left behind: {', '.join(one['kind'] + ' ' + one['id'] for one in left)}")
    hours = (time.time() - (run.rented_at or time.time())) / 3600
    cost = f"; the machine cost at most {run.price * hours:.2f} USD" if run.price is not None else ""
    return f"the cloud's listing has nothing of it{cost}"


# --- the run -----------------------------------------------------------------------------------------------------------


def take(run: Run, step: str, function: Callable[[Run], str]) -> bool:
    """Takes a step and notes what became of it; whether it passed."""
    began = time.monotonic()
    state, said = "passed", ""
    try:
        if step in run.options.skip:
            raise LeftOut("by --skip")
        said = function(run)
    except LeftOut as why:
        state, said = "left out", str(why)
    except Failed as error:
        state, said = "failed", str(error)
    except Exception as error:  # noqa: BLE001 - of a client or a file; the machine must go in any case
        state, said = "failed", f"{type(error).__name__}: {error}"
    run.rows.append(Row(step, state, time.monotonic() - began, " ".join(said.split())))
    print(f"{step:14} {state:8} {run.rows[-1].seconds:6.0f} s  {run.rows[-1].said}", flush=True)
    run.file.write_text(report(run), "utf-8")
    return state == "passed"


def report(run: Run) -> str:
    """The run as Markdown."""
    of, failed = run.options, [row for row in run.rows if row.state == "failed"]
    ended = f"{len(failed)} failed" if failed else "every step passed" if run.rows[-1].step == "down" else "not finished"
    versions = ", ".join(f"{name} {version}" for name, version in (run.receipt.get("versions") or {}).items() if version)
    price = "" if run.price is None else f", {run.price:.2f} USD an hour"
    lines = [
        f"## {of.cloud}, {time.strftime('%Y-%m-%d')}: {of.model}, {ended}",
        "",
        f"`benchmarks/real_run.py --cloud {of.cloud} --max-price {of.max_price} --ttl {of.ttl}`{price}; {versions or 'no versions known'}",
        "",
        "| step | result | seconds | what was seen |",
        "|---|---|---|---|",
        *(f"| {row.step} | {row.state} | {row.seconds:.0f} | {row.said.replace('|', chr(92) + '|')} |" for row in run.rows),
    ]  # fmt: skip
    for title, text in (("The machine", run.machine), ("Routes, asked from outside", run.routes)):
        if text:
            lines += ["", f"<details><summary>{title}</summary>", "", "```", text.rstrip(), "```", "", "</details>"]
    if run.receipt:
        flags = " ".join(run.receipt["flags"])
        lines += ["", f"vLLM's flags: `{flags.replace(str(Path.home()), '~')}`"]
    return "\n".join(lines) + "\n"


def ask_first(run: Run) -> None:
    """Shows what it costs, and ends unless somebody says yes."""
    of = run.options
    words = [word for word in up_words(run, of.model, "30m")[1:] if word != "--yes"]
    chosen = json.loads(cli("plan", *words))["options"][0]
    price = "a price not known here" if chosen["price"] is None else f"about {chosen['price']:.2f} USD an hour"
    print(f"rents {chosen['instance_type']} on {of.cloud}: {price}, at most {of.max_price} USD an hour for {of.ttl}", flush=True)
    if not of.yes and input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit("nothing was rented")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cloud", required=True, choices=clouds.names())
    parser.add_argument("--max-price", required=True, help="USD an hour")
    parser.add_argument("--ttl", default="1h", help="the machine ends by then in any case")
    parser.add_argument("--model", default="mistral-7b-instruct-v0.1")
    parser.add_argument("--weights", help="pull the weights of --model from here")
    parser.add_argument("--tools-model", default="mistral-7b-instruct-v0.3")
    parser.add_argument("--prompt-tokens", type=int, default=20_000)
    parser.add_argument("--name", default="real")
    parser.add_argument("--skip", action="append", default=[], choices=STEPS)
    parser.add_argument("--report", type=Path, help="Markdown file [default: real-run-CLOUD-DATE.md]")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    options = parser.parse_args()
    if os.environ.get("CI"):
        raise SystemExit("real_run.py rents a machine and is never run in CI (CI is set)")
    run = Run(options, options.report or Path(f"real-run-{options.cloud}-{time.strftime('%Y-%m-%d')}.md"))
    try:
        ask_first(run)
    except Failed as error:
        raise SystemExit(str(error)) from None
    inside = (machine, routes, ports, chat, long_prompt, eight, tools, idle)
    try:
        if take(run, "up", up):
            for step, function in zip(STEPS, inside, strict=True):
                take(run, step, function)
    except KeyboardInterrupt:
        run.rows.append(Row("interrupted", "failed", 0.0, "by Ctrl-C"))
    finally:
        take(run, "down", down)
        print(f"the report is {run.file}; paste it into docs/real-runs.md")
    return 1 if any(row.state == "failed" for row in run.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
