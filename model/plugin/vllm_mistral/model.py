"""Mistral 7B as a vLLM model: grouped-query attention over a sliding window, in vLLM's paged KV cache.

Shapes are flat, as everywhere in vLLM: T tokens of all running requests lie behind one another, [T, ...]. Which request
and which cache block each of them belongs to is known to `Attention` alone. A layer with a window of W tokens attends to
the distances 0 .. W-1 and declares a sliding-window cache spec, so that vLLM gives the blocks behind the window back to the
pool while the request still runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from mistral_contract import architecture, tensors
from mistral_contract.architecture import Architecture
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    SupportsEagle,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_mistral.inspection import EngineReport


def window_of(config: Any, layer: int) -> int | None:
    """The window of a layer in tokens, None for full attention.

    `layer_types` decides layer by layer where the configuration has it; otherwise `sliding_window` holds for all.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return int(window) if window else None


def served(config: Any) -> Architecture:
    """Return the sizes of a model; ValueError for a configuration that asks for a computation which is not in this file."""
    try:
        return architecture.read(config.to_dict() | {"model_type": config.model_type})  # to_dict has the type of the class alone
    except architecture.Refused as refused:
        raise ValueError(str(refused)) from None


class MistralMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), [T, hidden] to [T, hidden]; gate and up are one matrix."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary positions: [T, hidden] to [T, hidden].

    Each GPU of a tensor-parallel group has heads / size of the query heads and at least one of the key-value heads.
    """

    def __init__(self, config: Any, cache_config: CacheConfig | None, quant_config: Any, prefix: str) -> None:
        super().__init__()
        shards = get_tensor_model_parallel_world_size()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.q_size = heads // shards * head_dim
        self.kv_size = max(1, kv_heads // shards) * head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, bias=False, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * head_dim, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = get_rope(
            head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters, is_neox_style=True
        )
        window = window_of(config, extract_layer_index(prefix))
        if window is None and cache_config is not None and cache_config.sliding_window is not None:
            # A layer without a window of its own would inherit the cache's.
            cache_config = copy.copy(cache_config)
            cache_config.sliding_window = None
        self.attn = Attention(
            heads // shards, head_dim, head_dim**-0.5, num_kv_heads=max(1, kv_heads // shards), cache_config=cache_config,
            quant_config=quant_config, per_layer_sliding_window=window, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class MistralLayer(nn.Module):
    """One decoder layer. The residual travels beside the hidden states, so that each norm adds it in the same kernel."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_text_config, vllm_config.quant_config
        self.self_attn = MistralAttention(config, vllm_config.cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = MistralMLP(config, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"}, "positions": {0: "b"}, "intermediate_tensors": {0: "b"}, "inputs_embeds": {0: "b"},
    }
)  # fmt: skip
class MistralDecoder(nn.Module, EagleModelMixin):
    """Embedding, this pipeline stage's layers, final norm: token ids [T] to hidden states [T, hidden]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        stage = get_pp_group()
        embeds = stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank)
        self.embed_tokens = (
            VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=f"{prefix}.embed_tokens"
            )
            if embeds
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: MistralLayer(vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if stage.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        residual: torch.Tensor | None = None
        if get_pp_group().is_first_rank:
            hidden_states = inputs_embeds if inputs_embeds is not None else self.embed_input_ids(input_ids)
        elif intermediate_tensors is None:
            raise ValueError("a later pipeline stage needs what the stage before it computed")
        else:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        aux_hidden_states: list[torch.Tensor] = []
        self._maybe_add_hidden_state(aux_hidden_states, self.start_layer, hidden_states, residual)
        for index, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer + 1):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(aux_hidden_states, index, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return (hidden_states, aux_hidden_states) if aux_hidden_states else hidden_states


class MistralSWAForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsEagle, SupportsEagle3, SupportsQuant):
    """The decoder and its head; the class that vLLM runs for the architecture of this name."""

    # No adapter has embeddings or a head. With lm_head here, log-probabilities of prompts with an adapter end a CPU's engine (vllm#16668).
    embedding_modules: ClassVar[dict[str, str]] = {}
    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1),
        }
    )  # fmt: skip

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_text_config
        # The modules of the checkpoint with the shapes of their weights: of the whole model, and their names in this pipeline stage.
        self.everything = tensors.shapes(served(vllm_config.model_config.hf_config))
        self.model = MistralDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )  # fmt: skip
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            self.logits_processor = LogitsProcessor(config.vocab_size)
        else:
            self.lm_head = PPMissingLayer()
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        ends = {"model.embed_tokens": self.model.embed_tokens, "model.norm": self.model.norm, "lm_head": self.lm_head}
        stage = range(self.model.start_layer, self.model.end_layer)
        self.places = [
            name
            for name in self.everything
            if (
                hasattr(ends[name], "weight") and not (name == "lm_head" and config.tie_word_embeddings)
                if name in ends
                else int(name.split(".")[2]) in stage
            )
        ]
        self.loaded = False
        self.report = EngineReport(self, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        self.report.once()
        return self.logits_processor(self.lm_head, hidden_states)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits over this GPU's part of the vocabulary, not gathered; vLLM can then sample in parts."""
        self.report.once()
        return self.logits_processor(self.lm_head, hidden_states, skip_gather=True)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills every parameter; ValueError for one that no tensor fills, and for a tensor that has no place.

        vLLM drops biases without a parameter, and does not see that a part of a merged matrix is missing.
        """
        filled: set[str] = set()
        loaded = AutoWeightsLoader(self).load_weights(self.placed(weights, filled), mapper=self.hf_to_vllm_mapper)
        missing = [name for name in self.places if name not in filled]
        if missing and not self.loaded:  # later, parts of the weights may be replaced
            raise ValueError(
                f"the weights have no {missing[0]}{tensors.others(missing)}; take the whole model, with all its files"
            )
        self.loaded = True
        return loaded

    def placed(self, weights: Iterable[tuple[str, torch.Tensor]], filled: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that have a place, under Hugging Face's names; notes in `filled` the modules that they fill.

        Where a folder has the weights in both formats, those of Hugging Face count, whichever come first.
        """
        own, seen = set[str](), set[str]()
        tables: dict[str, torch.Tensor] = {}
        for stored, given in weights:
            if tensors.ANGLES.search(stored):
                continue
            name = tensors.hugging_face(stored)
            module, _, kind = name.rpartition(".")
            if kind == "bias":  # GPTQ stores biases of models that have none, all zero
                if given.count_nonzero():
                    raise ValueError(f"{stored} is a bias, and the class has none; {tensors.UNFIT}")
                continue
            if self.quant_config is None:
                if kind != "weight" or module not in self.everything or not given.is_floating_point():
                    dtype = str(given.dtype).removeprefix("torch.")
                    raise ValueError(f"{stored} ({dtype}) has no place in the class; {tensors.UNFIT}")
                tensors.check_shape(stored, module, tuple(given.shape), self.everything)
            tensor = given if name == stored else self.unpermuted(stored, given)
            if name != stored and module in filled:
                continue
            if name == stored and name in seen:
                raise ValueError(f"two files have {stored}; keep the files of one set of weights")
            seen |= {name} if name == stored else set()
            (filled if name == stored else own).add(module)
            if self.config.tie_word_embeddings and module in ("lm_head", "model.embed_tokens"):
                tables[name] = tensor
                if module == "lm_head":
                    continue
            yield name, tensor
        if not filled:
            filled |= own
        if len(tables) == 2 and not torch.equal(*tables.values()):
            raise ValueError(
                "lm_head is not model.embed_tokens, and tie_word_embeddings is true; set it to false in the configuration"
            )

    def unpermuted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a consolidated checkpoint as Hugging Face keeps it.

        Mistral's own checkpoints keep the two numbers that one angle rotates beside each other, Hugging Face keeps them
        half a head apart: rows 0 1 2 3 of a head with head_dim 4 become 0 2 1 3.
        """
        heads = {"wq": self.config.num_attention_heads, "wk": self.config.num_key_value_heads}
        part, kind = name.split(".")[-2:]
        if part not in heads or kind != "weight":
            return tensor
        rows, columns = tensor.shape
        n = heads[part]
        return tensor.view(n, rows // n // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
