"""The folder that vLLM is given: the weights as they were pulled, or what a GGUF file becomes in Hugging Face format."""

from __future__ import annotations

import gc
import json
import mmap
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mistral_contract import architecture, files, sets, untrusted
from mistral_contract import gguf as metadata
from mistral_contract import quantization as schemes
from mistral_node import log
from mistral_node.contract import Code, LaunchError

RECORD = ".mistralctl-converted.json"  # what a conversion wrote
# What vLLM's libraries read beside the configuration.
DOCUMENTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "tekken.json", "chat_template.json",
)  # fmt: skip
CONVERTED = ".hf2"  # with the number of `convert`: what another version of it made is not served


def is_consolidated(folder: Path) -> bool:
    """Whether the folder has weights in Mistral's own format only: consolidated*.safetensors with params.json."""
    return architecture.config_file(file.name for file in folder.glob("*")) == "params.json"


def model_dir(folder: Path, digest: str = "") -> Path:
    """The folder to serve; LaunchError if there is nothing that can be served in it, or other weights than those of `digest`."""
    if not folder.is_dir():
        raise LaunchError(Code.WEIGHTS, f"{folder} is missing; run mistralctl up again, which pulls the weights")
    check_named(folder, digest)
    if any(folder.glob("*.safetensors")):
        try:
            architecture.read_folder(folder)
        except architecture.Refused as refused:
            raise LaunchError(Code.WEIGHTS, str(refused)) from None
        _check_documents(folder)
        return folder
    found = sorted(folder.rglob("*.gguf"))
    if len(found) != 1:
        raise LaunchError(Code.WEIGHTS, f"{folder} holds {len(found)} GGUF files and no *.safetensors; one set is needed")
    target = folder.with_name(folder.name + CONVERTED)
    if not _is_as_converted(target):
        # In a process of its own, so that the launcher does not keep torch in its memory.
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(found[0]), str(target)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            why = (done.stdout.strip().splitlines() or [f"the conversion ended with code {done.returncode}"])[-1]
            raise LaunchError(Code.WEIGHTS, why)
    return target


def check_named(folder: Path, digest: str = "") -> None:
    """LaunchError unless exactly what the manifest names lies in the folder of a set; what has no manifest is said not to be checked."""
    try:
        named = sets.check(folder)
    except sets.Wrong as wrong:
        raise LaunchError(Code.WEIGHTS, f"{wrong}; run mistralctl up again, which puts the set in order") from None
    if digest and (named is None or sets.digest(named) != digest):
        raise LaunchError(Code.WEIGHTS, f"{folder} does not hold the weights with the digest {digest}; run mistralctl up again")
    if named is None:
        log.line(f"{folder} has no {files.MANIFEST.name}: what lies in it is served unchecked")


def _check_documents(folder: Path) -> None:
    """LaunchError for a file that vLLM's libraries would follow as deep as it is nested."""
    for path in sorted(folder.glob("*.json")):
        if path.name in DOCUMENTS or path.name.endswith(".index.json"):
            try:
                untrusted.read_any(untrusted.contents(path, untrusted.MOST_TOKENIZER_BYTES), untrusted.MOST_TOKENIZER_BYTES)
            except (OSError, ValueError) as error:
                raise LaunchError(Code.WEIGHTS, f"{path} cannot be read ({error}); mirror the model again") from None


def _is_as_converted(target: Path) -> bool:
    """Whether a conversion made this folder, and it is as that left it; anything else there is taken away."""
    try:
        if sets.check(target, RECORD) is not None:
            return True
    except sets.Wrong as wrong:
        log.line(f"{wrong}; it is converted again")
    shutil.rmtree(target, ignore_errors=True)
    return False


def quantization(wanted: str | None, folder: Path) -> str | None:
    """What vLLM's --quantization is told; LaunchError if these weights are quantized in another way, or in one that is not served."""

    def content(name: str) -> dict[str, Any]:
        try:
            return untrusted.read_file(folder / name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read ({error})") from None

    try:
        config = content("params.json" if is_consolidated(folder) else "config.json")
        scheme = schemes.read(config, {name: content(name) for name in schemes.BESIDE})
        schemes.check(wanted, scheme)
    except ValueError as error:
        raise LaunchError(Code.WEIGHTS, f"{folder}: {error}") from None
    return schemes.vllm_name(wanted, scheme)


# Names of GGUF, as those of Hugging Face.
TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


# Tables of angles that old converters wrote, and that are computed anew.
ANGLES = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


def hugging_face_name(name: str) -> str:
    """The name of a GGUF tensor in a Hugging Face checkpoint; ValueError for one that no such model has.

    >>> hugging_face_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    part = TENSORS.get(match[2], "") if match else ""
    if not match or not part or (match[1] is None) != part.startswith(("model.", "lm_head")):
        raise ValueError(f"it has the tensor {name}, for which the class has no place")
    return f"{part}.weight" if match[1] is None else f"model.layers.{match[1]}.{part}.weight"


def _check_header(gguf_file: Path) -> None:
    """ValueError for a header that a reader without bounds would follow anywhere."""
    with gguf_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if metadata.read(data, len(data)).tensors is None:
            raise ValueError("its header goes on behind its end: it is damaged")


def convert(gguf_file: Path, target: Path) -> None:
    """Writes a llama-shaped GGUF model as a Mistral checkpoint (bfloat16 safetensors, config, tokenizer); all or nothing.

    GGUF keeps the two numbers that one angle rotates beside each other, Hugging Face half a head apart, so the rows of
    queries and keys are put back.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, MistralConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".new", dir=target.parent))
    try:
        _check_header(gguf_file)
        reader = gguf.GGUFReader(gguf_file)

        def value(key: str) -> Any:
            field = reader.get_field(key)
            if field is None:
                raise ValueError(f"it has no {key}")
            return field.contents()

        kind = value("general.architecture")
        purpose = reader.get_field("general.type")
        metadata.check_kind(kind, purpose and purpose.contents())
        ids = {word: int(value(f"tokenizer.ggml.{word}_token_id")) for word in ("bos", "eos")}
        words = len(field.data) if (field := reader.get_field("tokenizer.ggml.tokens")) else 0
        said = {name.removeprefix("llama."): value(name) for name in reader.fields if name.startswith("llama.")}
        freqs = next((tensor.data.tolist() for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
        shape = metadata.hugging_face_config(said, freqs)
        tensors = {}
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight" or ANGLES.fullmatch(tensor.name):
                continue
            data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            if tensor.name.endswith(".bias") and not data.count_nonzero():
                continue
            name = hugging_face_name(tensor.name)
            for part, count in (("q_proj", shape["num_attention_heads"]), ("k_proj", shape["num_key_value_heads"])):
                if part in name:
                    rows, columns = data.shape
                    if rows != count * shape["head_dim"]:
                        raise ValueError(f"its {tensor.name} has {rows} rows, and {count} heads of {shape['head_dim']}")
                    data = data.view(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
            tensors[name] = data.to(torch.bfloat16).contiguous()
        config = MistralConfig(
            **shape, vocab_size=tensors["model.embed_tokens.weight"].shape[0], tie_word_embeddings="lm_head.weight" not in tensors,
            bos_token_id=ids["bos"], eos_token_id=ids["eos"], architectures=["MistralForCausalLM"], dtype="bfloat16",
        )  # fmt: skip
        architecture.read(config.to_dict())
        if config.vocab_size < words:
            raise ValueError(f"it has {words} tokens and embeddings for {config.vocab_size}")
        size, free = sum(2 * tensor.numel() for tensor in tensors.values()), shutil.disk_usage(temporary).free
        if size >= free:
            raise LaunchError(
                Code.WEIGHTS,
                f"the disk of {target.parent} has {free / 1e9:.2f} GB free and {size / 1e9:.2f} GB are needed; free some space",
            )
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        GenerationConfig(bos_token_id=ids["bos"], eos_token_id=ids["eos"]).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(temporary)
        (temporary / RECORD).write_text(json.dumps(sets.describe(temporary, RECORD)), "utf-8")
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # somebody else was faster
                raise
    except LaunchError:
        raise
    except Exception as error:  # of any library that reads the file
        raise LaunchError(Code.WEIGHTS, f"{gguf_file} cannot be converted ({error}); check where it came from") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    gc.disable()  # a sixth of its time, for what is imported and for a vocabulary that is read word by word
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except LaunchError as failure:
        sys.stdout.write(f"{failure}\n")
        raise SystemExit(failure.code) from None
