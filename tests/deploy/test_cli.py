"""The command line as a person sees it: exact lines, exit codes, nothing created."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from mistralctl import state

Run = Callable[..., CompletedProcess[str]]

ERRORS = [
    (("up", "mistral-7b"), 2, "MODEL: unknown model 'mistral-7b'; did you mean mistral-7b-instruct-v0.1? (mistralctl models lists them; "
     "a folder begins with ./ or /)"),
    (("up", "--cloud", "gpc"), 2, "--cloud[0]: 'gpc' is not one of aws, gcp, azure, local; did you mean gcp?"),
    (("up", "--accelerators", "T4", "--dry-run"), 3, "--accelerators: mistral-7b-instruct-v0.1 does not fit: T4:1: no bf16, and "
     "13.5 GiB of weights leave no room for the cache; A10, A10G, L4, L40S, A100, A100-80GB, H100 would fit"),
    (("up", "--lora", "sql"), 2, "--lora: 'sql' should be NAME=URI, for example sql=s3://bucket/sql"),
    (("up", "--lora", "a=s3://b/x", "--lora", "a=s3://b/y"), 2, "--lora: the adapter 'a' is given twice; keep one of them"),
    (("up", "--vllm-arg=--port=9"), 2, "--vllm-arg: --port would set --port, which mistralctl sets itself: use --port"),
    (("up", "-f", "none.yaml"), 2, "-f: none.yaml does not exist; name an existing file"),
    (("up", "--idle", "soon"), 2, "--idle: 'soon' is not a duration; write for example 30m, 12h, 2d or never"),
    (("up", "--nmae", "x"), 2, "No such option: --nmae (Possible options: --image, --name, --zone) (mistralctl --help)"),
    (("up", "-o", "xml"), 2, "Invalid value for '-o' / '--output': 'xml' is not one of 'text', 'json', 'yaml'. "
     "(mistralctl --help)"),
    (("down",), 2, "NAME: none is given; name a deployment or say --all (mistralctl status lists them)"),
    (("down", "x", "--all"), 2, "--all: names are given as well; leave one of the two out"),
    (("down", "ghost"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("status", "ghost"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("logs", "ghost"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("env", "ghost"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("chat", "ghost", "-m", "hi"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("status", "../../etc"), 4, "there is no deployment '../../etc'; mistralctl status lists what there is"),
    (("extend", "ghost", "2h"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("extend", "ghost", "soon"), 2, "DURATION: 'soon' is not a duration; write for example 30m, 12h or 2d"),
    (("extend", "ghost", "never"), 2, "DURATION: never is no length; write for example 2h, or run mistralctl up with --ttl never"),
    (("receipt", "ghost"), 4, "there is no deployment 'ghost'; mistralctl status lists what there is"),
    (("up", "--vllm-arg=--hf-token=hf_x"), 2, "--vllm-arg: --hf-token would set --hf-token, which mistralctl sets itself: a token "
     "in an argument is read by everybody; set HF_TOKEN or log in with hf auth login"),
    (("extend", "ghost", "5x"), 2, "DURATION: '5x' is not a duration; write for example 30m, 12h or 2d"),
    (("chat",), 4, "NAME: nothing is up; mistralctl up brings a model up"),
    (("plan", "mistral7b"), 2, "MODEL: unknown model 'mistral7b'; did you mean mistral-7b-instruct-v0.1? (mistralctl models lists them; a folder "
     "begins with ./ or /)"),
    (("nonsense",), 2, "No such command 'nonsense'. (mistralctl --help)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "line"), ERRORS, ids=[" ".join(case[0]) for case in ERRORS])
def test_an_error_is_one_line_with_a_code_and_creates_nothing(
    arguments: tuple[str, ...], code: int, line: str, mistralctl: Run, home: Path
) -> None:
    done = mistralctl(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"mistralctl: {line}\n")
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ((), ("--help",)),
        (("help",), ("--help",)),
        (("weights",), ("weights", "--help")),
        (("help", "weights", "pull"), ("weights", "pull", "-h")),
    ],
)
def test_a_command_alone_and_help_print_the_help(words: tuple[str, ...], same: tuple[str, ...], mistralctl: Run) -> None:
    done = mistralctl(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == mistralctl(*same).stdout
    assert "..." not in done.stdout.replace("]...", "")


def test_a_name_may_be_left_out_or_written_as_the_model_is(mistralctl: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALCTL_HOME", str(home / ".mistralctl"))
    one = state.Record("mistral-7b-v0-1", "local", "down", "mistral-7b-v0.1", "m", 8000, "/node", "s", 1.0)
    state.save(one)
    for words in ((), ("mistral-7b-v0.1",), ("mistral-7b-v0-1",)):
        assert mistralctl("env", *words).stderr == f"mistralctl: mistral-7b-v0-1 is down; run {one.again} first\n"
    state.save(replace(one, name="other"))
    assert mistralctl("env").stderr == "mistralctl: NAME: say which of mistral-7b-v0-1, other is meant\n"
    state.save(replace(one, name="other", state="starting"))
    assert mistralctl("env").stderr.startswith("mistralctl: other is starting")


@pytest.mark.interpreter  # whose hashes differ from run to run
def test_dry_run_prints_the_task_alone_and_the_same_bytes_every_time(mistralctl: Run) -> None:
    first, second = (mistralctl("up", "--cloud", "gcp", "--cloud", "aws", "--dry-run") for _ in range(2))
    assert first.stdout == second.stdout
    assert first.stderr == ""
    task = yaml.safe_load(first.stdout)
    assert [entry["infra"] for entry in task["resources"]["any_of"]] == ["gcp", "aws", "aws"]
    steps = [
        {"do": "check", "text": "ask whether the quotas allow it and the weights may be read", "ask": ""},
        {"do": "rent", "text": "rent the cheapest of gcp L4:1, aws L4:1, aws A10G:1, set it up, start its server", "ask": ""},
        {"do": "connect", "text": "open the tunnel to it", "ask": ""},
        {"do": "walk", "text": "wait until its node has walked every route and opened, and walk them again from here", "ask": ""},
    ]
    shown = json.loads(mistralctl("up", "--cloud", "gcp", "--cloud", "aws", "--dry-run", "-o", "json").stdout)
    assert shown == {"version": 1} | task | {"steps": steps}


def test_a_secret_of_the_environment_is_not_in_the_task(mistralctl: Run) -> None:
    variables = {"HF_TOKEN": "hf_marked", "AWS_SECRET_ACCESS_KEY": "marked", "OPENAI_API_KEY": "marked"}
    assert "marked" not in mistralctl("up", "--dry-run", **variables).stdout


def test_max_price_becomes_the_limit_of_the_task(mistralctl: Run) -> None:
    task = yaml.safe_load(mistralctl("up", "--max-price", "1.5", "--dry-run").stdout)
    assert task["resources"]["max_hourly_cost"] == 1.5


def test_the_file_in_the_folder_is_read(mistralctl: Run, tmp_path: Path) -> None:
    (tmp_path / "cwd" / "mistralctl.yaml").write_text("model: mistral-7b-v0.3\nname: mine\n")
    assert yaml.safe_load(mistralctl("up", "--dry-run").stdout)["name"] == "mine"
    assert yaml.safe_load(mistralctl("up", "--dry-run", MISTRALCTL_NAME="theirs").stdout)["name"] == "theirs"
    assert yaml.safe_load(mistralctl("up", "--dry-run", "--name", "ours", MISTRALCTL_NAME="theirs").stdout)["name"] == "ours"


def keys(data: object) -> object:
    """The structure of a JSON value: keys of mappings, the first entry of lists."""
    if isinstance(data, dict):
        return {key: keys(value) for key, value in data.items()}
    if isinstance(data, list):
        return [keys(data[0])] if data else []
    return type(data).__name__


PLAN_KEYS = ["name", "model", "spec", "device", "weights", "revision", "weights_id", "served_model_name", "max_model_len",
             "max_num_seqs", "max_batched_tokens", "sliding_window", "dtype", "tensor_parallel", "kv_cache_gib",
             "idle_minutes", "ttl_minutes", "options", "refused", "rights", "quotas", "endpoints", "lora_versions",
             "weights_digest"]  # fmt: skip
OPTION_KEYS = ["cloud", "accelerator", "count", "instance_type", "region", "price", "spot_price", "fit", "reason"]
FIT_KEYS = ["weight_bytes", "kv_bytes_per_token", "cache_bytes", "cache_tokens", "request_tokens",
            "request_tokens_without_window", "concurrency", "concurrency_without_window", "reason", "adapter_bytes"]  # fmt: skip


def test_the_json_of_results_is_a_contract(mistralctl: Run, home: Path) -> None:
    plan = json.loads(mistralctl("plan", "-o", "json").stdout)
    assert list(plan) == ["version", *PLAN_KEYS]
    assert list(plan["options"][0]) == OPTION_KEYS
    assert list(plan["options"][0]["fit"]) == FIT_KEYS
    doctor = json.loads(mistralctl("doctor", "-o", "json").stdout)
    assert list(doctor) == ["version", "home", "laptop", "node", "checks"]
    assert doctor["node"]["python"].startswith(f"{home}/.mistralctl/node/envs/cpu-")
    assert doctor["node"]["exists"] is False
    assert Path(doctor["laptop"]["python"]).exists()
    assert list(doctor["checks"][0]) == ["name", "ok", "found", "needed_for", "mend"]
    gpus = json.loads(mistralctl("gpus", "-o", "json").stdout)
    assert list(gpus) == ["version", "date", "source", "rows"]
    models = json.loads(mistralctl("models", "-o", "json").stdout)["items"]
    assert models[0]["name"] == "mistral-7b-instruct-v0.1"
    assert models[0]["shape"] == {
        "parameters": 7241732096, "tables": 262144000, "layers": 32, "kv_heads": 8, "head_dim": 128, "sliding_window": 4096, "context": 32768,
        "heads": 32, "hidden": 4096, "intermediate": 14336, "vocabulary": 32000, "rope_type": "default", "windows": [4096] * 32,
    }  # fmt: skip
    assert mistralctl("status", "-o", "json").stdout == '{\n "version": 1,\n "items": []\n}\n'


def test_tables_name_their_source(mistralctl: Run) -> None:
    assert mistralctl("gpus").stdout.splitlines()[-1] == (
        "prices: a snapshot of 2026-11-23, not today's; from skypilot-org/skypilot-catalog "
        "(a hand-kept subset; see mistralctl/clouds/SOURCE.md)"
    )
    assert (
        mistralctl("models")
        .stdout.splitlines()[1]
        .startswith("mistral-7b-instruct-v0.1         7.24B   4096    32768    yes   no ")
    )


def test_plan_as_a_person_reads_it(mistralctl: Run) -> None:
    lines = mistralctl("plan", "--cloud", "azure", "--accelerators", "A100-80GB").stdout.splitlines()
    assert lines == [
        "mistral-7b-instruct-v0-1: mistral-7b-instruct-v0.1, 32768 tokens, bfloat16",
        "weights 13.49 GiB and 131,072 B of cache a token on each GPU",
        "one request holds at most 6,160 tokens of cache (window 4096); with full attention 32,768",
        "",
        "CLOUD  MACHINE      TYPE                      REGION  USD/H  SPOT  CACHE TOKENS  REQUESTS  WITHOUT WINDOW",
        "azure  A100-80GB:1  Standard_NC24ads_A100_v4  eastus  3.67   0.44  477,824       77.6      14.6",
        "",
        "prices: a snapshot of 2026-11-23, cheapest region; SkyPilot's own catalog decides at launch",
    ]


@pytest.mark.slow
def test_help_and_completion(mistralctl: Run) -> None:
    overview = mistralctl("--help").stdout
    for command in (
        "up",
        "plan",
        "down",
        "status",
        "logs",
        "env",
        "chat",
        "models",
        "gpus",
        "doctor",
        "weights",
        "extend",
        "receipt",
    ):
        assert f"\n  {command}" in overview
        assert mistralctl(command, "--help").returncode == 0
    assert "Examples:" in mistralctl("up", "--help").stdout
    script = mistralctl("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", SHELL="/bin/bash")
    assert "mistralctl" in script.stdout + script.stderr


def test_the_version_is_that_of_the_package(mistralctl: Run) -> None:
    import tomllib

    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert mistralctl("--version").stdout == f"mistralctl {tomllib.loads(pyproject.read_text())['project']['version']}\n"


def test_a_damaged_record_is_named(mistralctl: Run, home: Path) -> None:
    folder = home / ".mistralctl" / "deployments" / "broken"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{")
    done = mistralctl("status", "broken")
    assert done.returncode == 5
    assert done.stderr.startswith(f"mistralctl: {folder}/record.json is damaged (")
    assert done.stderr.endswith("; delete it and run up again\n")
