"""A folder as a model: which one is served, what it is called, and how its chat is tokenized."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from mistralctl import checkpoints, plan, weights
from mistralctl.config import load
from mistralctl.errors import Exit, UserError
from mistralctl.machine import Machine
from mistralctl.models import MODELS, Model
from mistralctl.tasks import serve
from weights_folders import AWQ, GPTQ, SMOLLM2, Shapes, gguf, tensors, whole, write

GIB = 1 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 32768, "sliding_window": None,
}  # fmt: skip
PARAMS = {
    "dim": 128, "n_layers": 2, "head_dim": 32, "hidden_dim": 256, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 512,
    "rope_theta": 1e6, "max_seq_len": 4096,
}  # fmt: skip


def folder(path: Path, files: dict[str, Any]) -> Path:
    """Writes a folder; *.safetensors hold the whole model of its configuration, if it has one that is served."""
    path.mkdir(parents=True)
    config = next((files[name] for name in ("config.json", "params.json") if isinstance(files.get(name), dict)), None)
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if name.endswith(".safetensors") and content == "":
            try:
                write(path / name, whole(config) if config and name.startswith(("model", "consolidated")) else {})
            except ValueError:
                write(path / name, {})
    if not any(name.startswith("tok") or "tekken" in name for name in files) and config:
        (path / "tokenizer.model").touch()
    return path


def resolved(path: Path) -> Model:
    return checkpoints.resolve(load({"model": str(path), "cloud": ["local"]}, {}, None))


def planned(path: Path) -> plan.Plan:
    sourced = load({"model": str(path), "cloud": ["local"]}, {}, None)
    return plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "model type 'qwen2' (Qwen2ForCausalLM) is not served"),
        (
            {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},
            "(Mistral3ForConditionalGeneration) is not served",
        ),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
    ],
)
def test_another_model_is_refused_before_anything_starts(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = folder(tmp_path / "other", {"config.json": CONFIG | fields, "model.safetensors": ""})
    with pytest.raises(UserError) as error:
        resolved(path)
    assert error.value.code is Exit.USAGE
    assert f"{path}/config.json: " in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ufffd", "[" * 100_000])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=re.escape("config.json cannot be read")):
        resolved(folder(tmp_path / "x", {"config.json": text, "model.safetensors": ""}))


def test_a_context_beyond_that_of_training_is_as_vllm_derives_it(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "linear",
        {"config.json": CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "model.safetensors": ""},
    )
    sourced = load({"model": str(path), "cloud": ["local"], "max_model_len": 65536}, {}, None)
    assert plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2)).max_model_len == 65536
    sourced = load({"model": str(path), "cloud": ["local"], "max_model_len": 131073}, {}, None)
    with pytest.raises(UserError, match="beyond the context of linear, 131072 tokens"):
        plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))


def test_a_folder_in_mistrals_own_format_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "own", {"params.json": PARAMS, "consolidated.safetensors": "", "tokenizer.model.v3": ""})
    found = planned(path)
    assert found.model.shape is not None
    assert (found.model.shape.layers, found.model.shape.head_dim, found.max_model_len) == (2, 32, 4096)
    assert (found.model.tokenizer_mode, found.model.chat, found.model.tool_parser) == ("mistral", True, "mistral")


def test_a_folder_without_any_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"config\.json is missing; name a folder in Hugging Face format, or one with consolidated"
    ):
        resolved(folder(tmp_path / "x", {"model.safetensors": ""}))


def tekken(version: str) -> dict[str, Any]:
    return {"tekken.json": {"config": {"version": version}, "vocab": []}}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (tekken("v3"), ("mistral", True, "mistral")),
        (tekken("v13"), ("mistral", True, "mistral")),
        (tekken("v2"), ("mistral", True, None)),
        ({"tekken.json": "damaged"}, ("mistral", True, "mistral")),
        ({"tokenizer.model.v1": ""}, ("mistral", True, None)),
        ({"tokenizer.model.v2": ""}, ("mistral", True, None)),
        ({"tokenizer.model.v3": ""}, ("mistral", True, "mistral")),
        ({"tokenizer.model.v7m1": ""}, ("mistral", True, "mistral")),
        ({"tokenizer.json": "{}"} | tekken("v3"), ("hf", False, None)),
        ({"tokenizer.json": "{}", "tokenizer_config.json": {"chat_template": "x"}, "tokenizer.model.v3": ""}, ("hf", True, None)),
        ({"tokenizer.json": "{}", "chat_template.jinja": "x"}, ("hf", True, None)),
        ({"tokenizer.model": ""}, ("hf", False, None)),  # any model's, by SentencePiece
    ],
)  # fmt: skip
def test_a_mistral_tokenizer_means_chat_and_from_v3_on_tools(
    tmp_path: Path, files: dict[str, Any], wanted: tuple[object, ...]
) -> None:
    found = resolved(folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": "", **files}))
    assert (found.tokenizer_mode, found.chat, found.tool_parser) == wanted


@pytest.mark.parametrize(
    "name", ["模型", "Modèle", "مدل", "My+Model(2)", "_private", "...x", "UPPER", "-dash-", "9b", "x" * 200, "ⅷ"]
)
def test_what_a_folder_is_called_is_a_name_that_the_node_takes(tmp_path: Path, name: str) -> None:
    found = planned(folder(tmp_path / name, {"config.json": CONFIG, "model.safetensors": ""}))
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", found.name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", found.weights_id)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", found.served_model_name)
    assert found.weights == f"file://{tmp_path}/{name}"
    if not name.isascii():
        assert re.fullmatch(r"m-[0-9a-f]{8}", found.served_model_name)
        assert found.name == found.served_model_name


def test_two_spellings_of_a_letter_are_one_name(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": ""}
    composed, decomposed = (resolved(folder(tmp_path / n / f"mod{e}le", files)) for n, e in (("a", "\u00e8"), ("b", "e\u0300")))
    assert composed.name == decomposed.name


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bytes that are no text; rename the folder"):
        resolved(folder(tmp_path / "x\udcff", {"config.json": CONFIG, "model.safetensors": ""}))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14483464192\n"
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ({"config.json": CONFIG, "model.bin": ""}, 10, "only as pickles, which can run code"),
        ({"config.json": CONFIG}, 4, "holds no safetensors or GGUF weights"),
        ({"config.json": CONFIG, "model-00001-of-00002.safetensors": ""}, 10, "lacks model-00002-of-00002.safetensors, which the names"),
        ({"config.json": POINTER, "model.safetensors": ""}, 10, "config.json at "),
        ({"config.json": CONFIG, "model.safetensors": "", "tokenizer.json": POINTER}, 10, "tokenizer.json at "),
        (
            {"config.json": CONFIG, "model-1.safetensors": "", "model.safetensors.index.json": INDEX}, 10,
            "lacks model-2.safetensors, which its index names",
        ),
        ({"adapter_config.json": {"r": 8}, "adapter_model.safetensors": ""}, 10, "is an adapter, not a model; name its base model, and"),
        (
            {"config.json": CONFIG, "model.safetensors": "", "adapter_model.safetensors": "", "adapter_config.json": {}}, 10,
            "holds adapter_model.safetensors beside config.json",
        ),
        ({"config.json": CONFIG, "adapter_model.safetensors": ""}, 10, "holds adapter_model.safetensors beside config.json"),
        ({"a.Q2_K.gguf": "x", "b.Q8_0.gguf": "x"}, 10, "2 GGUF files (a.Q2_K.gguf, b.Q8_0.gguf), and one is served; add its name"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(files: dict[str, Any], code: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        resolved(folder(tmp_path / "x", files))
    assert error.value.code == code
    assert says in str(error.value)
    assert str(error.value).startswith("MODEL: ")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (POINTER.encode(), "is a pointer of git-lfs, not the weights; run git lfs pull"),
        (tensors(a=("BF16", [1000]))[:-100], r"has \d+ bytes, and by its header \d+; take a whole copy"),
        (b"", "is cut short, or no safetensors file: it has 0 bytes"),
        (b"<!DOCTYPE html>" * 20, "is cut short, or no safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": [1]' + b"x", "has a header that cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_refused(data: bytes, says: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"config.json": CONFIG})
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        resolved(path)
    assert error.value.code is Exit.WEIGHTS


def test_the_size_is_that_of_the_tensors_where_they_are_more_than_config_json_says(tmp_path: Path) -> None:
    config, query = CONFIG | {"quantization_config": AWQ}, "model.layers.0.self_attn.q_proj"
    path = folder(tmp_path / "x", {"config.json": config})
    more = {f"{query}.scales": ("F32", [1_000_000]), f"{query}.qzeros": ("I32", [250_000])}
    write(path / "model.safetensors", whole(config) | more)
    sourced = load({"model": str(path), "cloud": ["local"], "dtype": "bfloat16"}, {}, None)
    got = plan.make(sourced, checkpoints.resolve(sourced), Machine(24 * GIB, 2))
    assert got.chosen.fit is not None
    assert got.chosen.fit.weight_bytes == 2 * 1_000_000 + 4 * 250_000 + 4 * len(whole(config))


def mounts(path: Path, **more: Any) -> tuple[dict[str, str], str]:
    """What travels to a node in a cloud, by its place below `upload`, and where the node finds it."""
    sourced = load({"model": str(path), "cloud": ["aws"], "accelerators": "L4", **more}, {}, None)
    rendered = serve.render(plan.make(sourced, checkpoints.resolve(sourced), None), owner="x")
    below = f"~/.mistralctl/run/{rendered['name']}/upload"
    found = {to.removeprefix(below): path for to, path in rendered["file_mounts"].items() if to.startswith(below)}
    return found, rendered["envs"]["MISTRALCTL_WEIGHTS"].removeprefix(f"file://{below}")


def test_a_snapshot_of_the_hubs_cache_travels_file_by_file(tmp_path: Path) -> None:
    home = tmp_path / "models--ORG--My-Model"
    blobs = folder(home / "blobs", {"one": CONFIG, "three": ""})
    write(blobs / "two.safetensors", whole(CONFIG))
    snapshot = folder(home / "snapshots" / "0123abcd", {})
    (snapshot / "config.json").symlink_to("../../blobs/one")
    (snapshot / "model.safetensors").symlink_to("../../blobs/two.safetensors")
    (snapshot / "tokenizer.model").symlink_to("../../blobs/three")
    assert planned(snapshot).model.name == "my-model"
    assert mounts(snapshot) == (
        {"/config.json": f"{blobs}/one", "/model.safetensors": f"{blobs}/two.safetensors", "/tokenizer.model": f"{blobs}/three"}, "",
    )  # fmt: skip


def test_one_file_of_a_folder_travels_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"a.Q2_K.gguf": "x", "b.Q8_0.gguf": gguf()})
    assert mounts(path / "b.Q8_0.gguf") == ({"/b.Q8_0.gguf": f"{path}/b.Q8_0.gguf"}, "/b.Q8_0.gguf")
    assert mounts(path / "b.Q8_0.gguf", quantization="fp8")  # it is loaded in 16 bits
    with pytest.raises(UserError, match="awq needs weights that are so quantized"):
        mounts(path / "b.Q8_0.gguf", quantization="awq")


def test_a_row_with_weights_in_a_folder(tmp_path: Path) -> None:
    other = folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": ""})
    with pytest.raises(UserError, match=r"is not mistral-7b-instruct-v0\.1: parameters .*; give it as MODEL instead"):
        checkpoints.resolve(load({"weights": f"file://{other}"}, {}, None))
    same = folder(tmp_path / "y", {"config.json": SMOLLM2, "model.safetensors": ""})
    found = checkpoints.resolve(load({"model": "smollm2-135m-instruct", "weights": f"file://{same}"}, {}, None))
    assert (found.name, found.stored.known) == ("smollm2-135m-instruct", True)


def test_a_row_whose_config_json_nobody_has_read_is_looked_at_before_anything_is_rented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sourced = load({"model": "zephyr-7b-beta"}, {}, None)
    asked: list[tuple[str, ...]] = []
    there = weights.described(f"file://{folder(tmp_path / 'x', {'config.json': CONFIG, 'model.safetensors': ''})}")

    def described(*given: str) -> weights.Described | None:
        asked.append(given)
        return there

    monkeypatch.setattr(weights, "described", described)
    assert checkpoints.resolve(sourced) is MODELS["zephyr-7b-beta"]
    assert asked == []
    with pytest.raises(UserError, match=r"is not zephyr-7b-beta: .*sliding_window None instead of 4096"):
        checkpoints.resolve(sourced, ask=True)
    assert asked == [("hf://HuggingFaceH4/zephyr-7b-beta", MODELS["zephyr-7b-beta"].revision, "MODEL")]
    checkpoints.resolve(load({"model": "mistral-7b-v0.1"}, {}, None), ask=True)
    assert len(asked) == 1


QUERY, BIAS = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"
WHOLE = whole(CONFIG)


def test_tensors_are_judged_by_the_headers_before_anything_starts(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": ""})
    half = {name: one for name, one in WHOLE.items() if ".layers.1." not in name}
    cases: list[tuple[Shapes, str]] = [
        (WHOLE | {BIAS: ("BF16", [128])}, f"{BIAS} is a bias, and the class has none"),
        (
            WHOLE | {"model.layers.2.mlp.up_proj.weight": ("BF16", [256, 128])},
            r"layers.2.mlp.up_proj.weight (BF16) has no place in",
        ),
        (WHOLE | {QUERY: ("I8", [128, 128])}, f"{QUERY} (I8) has no place in the class"),
        (WHOLE | {QUERY: ("BF16", [128, 64])}, f"{QUERY} has the shape [128, 64], and by its configuration [128, 128]"),
        (
            WHOLE | {"model.embed_tokens.weight": ("BF16", [514, 128])},
            "model.embed_tokens.weight has the shape [514, 128], and by its",
        ),
        (half, "the weights have no model.layers.1.self_attn.q_proj and 8 others; take the whole model"),
    ]
    for given, says in cases:
        write(path / "model.safetensors", given)
        with pytest.raises(UserError) as error:
            resolved(path)
        assert (error.value.code, str(error.value).count("\n")) == (Exit.WEIGHTS, 0)
        assert says in str(error.value)
    write(path / "model.safetensors", WHOLE | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [16])})
    assert resolved(path).shape is not None


def test_a_head_that_is_missing_and_one_that_is_tied(tmp_path: Path) -> None:
    headless = {name: one for name, one in WHOLE.items() if not name.startswith("lm_head")}
    for tied in (False, True):
        path = folder(tmp_path / f"tied-{tied}", {"config.json": CONFIG | {"tie_word_embeddings": tied}})
        write(path / "model.safetensors", headless)
        if tied:
            assert resolved(path).shape is not None
            continue
        with pytest.raises(UserError, match="the weights have no lm_head; take the whole model"):
            resolved(path)


def test_mistrals_own_names_are_judged_as_well(tmp_path: Path) -> None:
    path = folder(tmp_path / "own", {"params.json": PARAMS, "consolidated.safetensors": "", "tokenizer.model.v3": ""})
    given = whole(PARAMS)
    write(path / "consolidated.safetensors", given | {"layers.1.attention.wk.weight": ("BF16", [64, 64])})
    with pytest.raises(
        UserError, match=r"layers\.1\.attention\.wk\.weight has the shape \[64, 64\], and by its configuration \[64, 128\]"
    ):
        resolved(path)
    write(path / "consolidated.safetensors", {name: one for name, one in given.items() if "wo" not in name})
    with pytest.raises(UserError, match=r"the weights have no model\.layers\.0\.self_attn\.o_proj and 1 others"):
        resolved(path)


def test_two_sets_of_weights_in_a_folder(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(WHOLE, "model-00001-of-00001.safetensors")}
    files = {"config.json": CONFIG, "model-00001-of-00001.safetensors": "", "model.safetensors": ""}
    with pytest.raises(UserError, match=r"both have .*; keep the files of one set of weights"):
        resolved(folder(tmp_path / "x", files))
    with pytest.raises(
        UserError, match=r"holds model\.safetensors, which its model\.safetensors\.index\.json does not name; keep the"
    ):
        resolved(folder(tmp_path / "y", files | {"model.safetensors.index.json": index}))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": ""})
    (path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer; add tokenizer\.json, tekken\.json or tokenizer\.model") as error:
        resolved(path)
    assert error.value.code is Exit.WEIGHTS


def test_gptq_in_marlins_format(tmp_path: Path) -> None:
    marlin = CONFIG | {"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}
    with pytest.raises(
        UserError, match=r"gptq in Marlin's format is not served by vLLM 0\.32, only in GPTQ's own; use another copy"
    ):
        resolved(folder(tmp_path / "x", {"config.json": marlin, "model.safetensors": ""}))
    config = CONFIG | {"quantization_config": GPTQ}
    path = folder(tmp_path / "y", {"config.json": config})
    write(path / "model.safetensors", whole(config) | {"model.layers.0.mlp.up_proj.B": ("I32", [8, 512])})
    with pytest.raises(UserError, match=r"up_proj\.B is quantized in Marlin's format"):
        resolved(path)
    write(path / "model.safetensors", {name: one for name, one in whole(config).items() if "down_proj" not in name})
    with pytest.raises(UserError, match=r"the weights have no model\.layers\.0\.mlp\.down_proj and 1 others"):
        resolved(path)


@pytest.mark.parametrize("factor", [1e9, 1e300])
def test_a_factor_of_the_rotary_embedding_that_no_model_was_trained_with(tmp_path: Path, factor: float) -> None:
    config = CONFIG | {"rope_scaling": {"type": "linear", "factor": factor}}
    with pytest.raises(UserError, match=r"rope_parameters\.factor = .* which no model was trained for \(at most 16777216\)"):
        resolved(folder(tmp_path / "x", {"config.json": config, "model.safetensors": ""}))


def test_a_large_gguf_file_of_a_row_is_that_row(tmp_path: Path) -> None:
    """Its tensors' names, by which a second table is known, stand behind the tokens: too far for what is read."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "m.gguf").write_bytes(gguf(("token_embd.weight",), tokenizer__ggml__tokens=["a"] * 49152)[:-100])
    row = MODELS["smollm2-135m-instruct"]
    assert resolved(tmp_path / "x") != row
    found = checkpoints.resolve(load({"model": row.name, "weights": f"file://{tmp_path}/x"}, {}, None))
    assert (found.name, found.shape) == (row.name, row.shape)


def test_what_a_gguf_file_is_is_read_here(tmp_path: Path) -> None:
    def named(data: bytes | str) -> Model:
        path = tmp_path / "x"
        path.mkdir(exist_ok=True)
        (path / "m.gguf").write_bytes(data if isinstance(data, bytes) else data.encode())
        return resolved(path)

    whole = named(gguf(("token_embd.weight", "output_norm.weight")))
    assert whole.shape == MODELS["smollm2-135m-instruct"].shape
    assert whole.runs_on_cpu
    tokens = gguf(llama__vocab_size=0, tokenizer__ggml__tokens=["a"] * 500)
    for cut in (tokens, tokens[:-100]):  # the length of an array stands before it
        found = named(cut).shape
        assert found is not None
        assert found.vocabulary == 500
    for data, says in (
        (b"x" * 100, "m.gguf at .*: it does not begin like a GGUF file"),
        (b"", "it does not begin like a GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(16), "it is of version 1 with 0 keys"),
        (gguf(general__architecture="qwen2"), "its architecture is qwen2, not llama"),
        (gguf(general__type="adapter"), "it is of the type adapter, not model"),
        (gguf(llama__expert_count=8), r"its llama\.expert_count = 8 asks for a computation"),
        (gguf(llama__attention__head_count=7), "7 query heads, 3 key-value heads"),
    ):
        with pytest.raises(UserError, match=says) as error:
            named(data)
        assert (error.value.code, str(error.value).count("\n")) == (Exit.WEIGHTS, 0)


def test_a_digest_that_the_weights_have_not_is_refused_before_anything_starts(mistralctl: Run, tmp_path: Path) -> None:
    source = folder(tmp_path / "x", {"config.json": CONFIG, "model.safetensors": ""})
    assert mistralctl("weights", "pull", f"file://{source}", str(tmp_path / "set")).returncode == 0
    said = json.loads(mistralctl("weights", "verify", str(tmp_path / "set"), "-o", "json").stdout.splitlines()[-1])
    digest, other = said["digest"], f"sha256:{'0' * 64}"
    place = ["plan", str(tmp_path / "set"), "--cloud", "local"]
    assert f"only those with the digest {digest}" in mistralctl(*place, "--weights-digest", digest).stdout
    assert f"their manifest says the digest {digest}" in mistralctl(*place).stdout
    refused = mistralctl(*place, "--weights-digest", other)
    assert (refused.returncode, refused.stderr.count("\n")) == (10, 1)
    assert f"say --weights-digest {digest}" in refused.stderr
    assert mistralctl(*place, "--weights-digest", "sha256:1").returncode == 2
