"""Nemotron (Minitron, Nemotron-Mini) with gated attention and MLPs: LayerNorm by 1 + w, partly rotated heads,
grouped queries, ReLU squared, no biases.

Layout and arithmetic follow vLLM's own Nemotron (Apache-2.0). T is the number of tokens of a step, padded;
hidden states are [T, hidden].
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.nemotron import NemotronLayerNorm1P
from vllm.model_executor.models.utils import (
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import Flow
from vllm_dejavu.formats import config_of
from vllm_dejavu.models.base import DejaVuForCausalLM, Plan, connect

# A checkpoint's modules by the names of our blocks.
RENAMED = {".o_proj": ".out_proj", ".up_proj": ".fc1", ".down_proj": ".fc2"}


class DejaVuNemotronDecoderLayer(nn.Module):
    def __init__(self, plan: Plan, prefix: str):
        super().__init__()
        config, site = plan.vllm_config.model_config.hf_config, plan.site(prefix)
        geometry = plan.geometry
        rotary = get_rope(
            geometry.head_size,
            max_position=geometry.max_positions,
            rope_parameters=config.rope_parameters,
        )
        bias = bool(getattr(config, "attention_bias", False) or getattr(config, "bias", False))
        gate = plan.gates.get(site.layer, "attention")
        self.self_attn = GatedAttention(site.at("self_attn"), bias, gate, rotary)
        mlp_bias = bool(getattr(config, "mlp_bias", False))
        self.mlp = plan.mlp(site.at("mlp"), mlp_bias, self.self_attn.attention_name)
        self.input_layernorm = NemotronLayerNorm1P(geometry.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = NemotronLayerNorm1P(geometry.hidden_size, eps=config.norm_eps)

    @property
    def attention(self) -> GatedAttention:
        return self.self_attn

    def forward(self, hidden_states: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        flow = self.mlp.predict_early(hidden_states, flow)
        hidden_states, flow = self.self_attn(hidden_states, flow)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states, flow = self.mlp(hidden_states, residual, flow)
        return hidden_states + residual, flow


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class DejaVuNemotronModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", plan: Plan):
        super().__init__()
        config, hidden = vllm_config.model_config.hf_config, plan.geometry.hidden_size
        tied = config_of(plan.settings.head_bits) if config.tie_word_embeddings else None
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, hidden, quant_config=tied)
        self.start_layer, self.end_layer, self.layers = make_layers(
            plan.geometry.num_layers,
            lambda prefix: DejaVuNemotronDecoderLayer(plan, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = NemotronLayerNorm1P(hidden, eps=config.norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], hidden
        )
        connect(self.local_layers())

    def local_layers(self) -> list[DejaVuNemotronDecoderLayer]:
        """Layers of this pipeline stage."""
        return list(islice(self.layers, self.start_layer, self.end_layer))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None, "a later stage needs the hidden states of the one before"
            hidden_states = intermediate_tensors["hidden_states"]
        flow = Flow(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, flow = layer(hidden_states, flow)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class DejaVuNemotronForCausalLM(DejaVuForCausalLM):
    """`--model-impl dejavu` for Nemotron."""

    # By which a quantized checkpoint's schemes are found for our layers.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=RENAMED)

    def build(self, plan: Plan, prefix: str) -> Iterable[DejaVuNemotronDecoderLayer]:
        config = self.config
        self.model = DejaVuNemotronModel(
            vllm_config=plan.vllm_config, prefix=maybe_prefix(prefix, "model"), plan=plan
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            plan.geometry.hidden_size,
            quant_config=config_of(plan.settings.head_bits),
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=getattr(config, "logit_scale", 1.0))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        return self.model.local_layers()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def parameter_name(self, name: str) -> tuple[str | None, str | None]:
        if "rotary_emb.inv_freq" in name or (name.startswith("lm_head.") and self.config.tie_word_embeddings):
            return None, None
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        for projection in "qkv":
            if f".{projection}_proj." in name:
                return name.replace(f".{projection}_proj.", ".qkv_proj."), projection
        return name, None
