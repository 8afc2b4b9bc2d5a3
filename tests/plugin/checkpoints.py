"""Tiny random Mistral checkpoints in both formats, and what Hugging Face computes with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM, MistralModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.mistral.configuration_mistral import MistralConfig

ARCHITECTURE = "MistralSWAForCausalLM"
VOCABULARY = 512


def write(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """A checkpoint in Hugging Face format, float32. Its weights are large enough for the distant past to matter."""
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "sliding_window": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = MistralConfig(**(fields | shape), dtype="float32")
    torch.manual_seed(seed)
    model = MistralForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0, 0.15)
            else:
                parameter.normal_(0, 1.6 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


class _Layered(MistralModel):
    """Hugging Face's model, with the mask that `layer_types` asks for in each layer (its own ignores them)."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:  # type: ignore[override]
        x = self.embed_tokens(input_ids)
        position_ids = torch.arange(x.shape[1])[None]
        arguments = {
            "config": self.config, "inputs_embeds": x, "attention_mask": None, "past_key_values": None,
            "position_ids": position_ids,
        }  # fmt: skip
        masks = {"full_attention": create_causal_mask(**arguments)}
        if self.config.sliding_window:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        angles = self.rotary_emb(x, position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, attention_mask=masks[kind], position_embeddings=angles, position_ids=position_ids)
        return self.norm(x)


def hugging_face(folder: Path, **changed: Any) -> MistralForCausalLM:
    """Hugging Face's own model in float32 with eager attention; `changed` fields of its configuration."""
    config = MistralConfig.from_pretrained(folder)
    for name, value in changed.items():
        setattr(config, name, value)
    return MistralForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[T, vocabulary]: entry t is about the token behind ids[t]; natural logarithms."""
    row = torch.tensor([list(ids)])
    if getattr(model.config, "layer_types", None):
        model.model.__class__ = _Layered
        logits = model.lm_head(model.model(row))
    else:
        logits = model(row).logits
    return logits[0].float().log_softmax(-1)


def of_tokens(logprobs: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """[T - 1]: the log-probability of each token but the first."""
    return logprobs[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0]


def largest_difference(found: Sequence[torch.Tensor], reference: Any, batch: Sequence[Sequence[int]]) -> float:
    """Over all positions of all prompts, between the log-probabilities found and those of a Hugging Face model."""
    wanted = [of_tokens(log_probabilities(reference, ids), ids) for ids in batch]
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def difference_behind(prompt: list[int], tokens: list[int], logprobs: torch.Tensor, reference: Any) -> float:
    """The same, over the tokens generated behind a prompt."""
    wanted = of_tokens(log_probabilities(reference, prompt + tokens), prompt + tokens)[-len(tokens) :]
    return float((logprobs - wanted).abs().max())


def prompts(lengths: Sequence[int], *, seed: int = 1, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random token ids, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def _permuted(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows as Mistral's own files have them: the inverse of what the class does when it loads them."""
    rows, columns = w.shape
    return w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


PARTS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def consolidated(source: Path, target: Path) -> Path:
    """The same weights as consolidated.safetensors with params.json."""
    config = json.loads((source / "config.json").read_text())
    tensors = {}
    for name, w in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in ENDS:
            tensors[f"{ENDS[stem]}.weight"] = w
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            w = _permuted(w, config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"])
        tensors[f"layers.{layer}.{PARTS[part]}.weight"] = w
    target.mkdir()
    save_file(tensors, target / "consolidated.safetensors")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"], "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_parameters"]["rope_theta"], "max_position_embeddings": config["max_position_embeddings"],
        "tied_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip
    if config["sliding_window"]:
        params["sliding_window"] = config["sliding_window"]
    (target / "params.json").write_text(json.dumps(params))
    return target


# Files in mistral_common's data folder, and their names on the hub.
TOKENIZERS = {
    "tokenizer.model.v1": "tokenizer.model",
    "mistral_instruct_tokenizer_240323.model.v3": "tokenizer.model.v3",
}


def mistral_tokenizer(folder: Path, file: str) -> Path:
    """Puts one of mistral_common's real tokenizers beside the weights, under the name that the hub has it under."""
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / file
    shutil.copy(source, folder / TOKENIZERS[file])
    return folder
