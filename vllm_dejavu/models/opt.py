"""OPT with gated attention and MLPs; reads top to bottom, embeddings to logits.

Parameter names, tensor- and pipeline-parallel layout follow vLLM's own OPT (Apache-2.0). T is the number of
tokens of a step, padded; hidden states are [T, hidden].
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import (
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import Flow
from vllm_dejavu.compat import LayerNorm
from vllm_dejavu.formats import config_of
from vllm_dejavu.models.base import DejaVuForCausalLM, Plan, connect


class DejaVuOPTLearnedPositionalEmbedding(nn.Embedding):
    """OPT's positions start at 2."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions + self.offset)


class DejaVuOPTDecoderLayer(nn.Module):
    def __init__(self, plan: Plan, prefix: str):
        super().__init__()
        config, site = plan.vllm_config.model_config.hf_config, plan.site(prefix)
        hidden, bias = plan.geometry.hidden_size, config.enable_bias
        affine = config.layer_norm_elementwise_affine
        self.pre_norm = plan.geometry.norm == "pre"  # 125m, 1.3b, ... 175b; 350m normalises after each block
        self.self_attn = GatedAttention(site.at("self_attn"), bias, plan.gates.get(site.layer, "attention"))
        self.self_attn_layer_norm = LayerNorm(hidden, elementwise_affine=affine)
        self.mlp = plan.mlp(site.at("mlp"), bias, self.self_attn.attention_name)
        self.final_layer_norm = LayerNorm(hidden, elementwise_affine=affine)

    @property
    def attention(self) -> GatedAttention:
        return self.self_attn

    def forward(self, hidden_states: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        flow = self.mlp.predict_early(hidden_states, flow)
        hidden_states, flow = self.self_attn(hidden_states, flow)
        hidden_states = residual + hidden_states
        if not self.pre_norm:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states, flow = self.mlp(hidden_states, residual, flow)
        hidden_states = residual + hidden_states
        if not self.pre_norm:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, flow


class DejaVuOPTDecoder(nn.Module):
    def __init__(self, plan: Plan, prefix: str):
        super().__init__()
        config, hidden = plan.vllm_config.model_config.hf_config, plan.geometry.hidden_size
        embed_dim = config.word_embed_proj_dim
        tied = config_of(plan.settings.head_bits) if config.tie_word_embeddings else None
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, embed_dim, quant_config=tied)
        self.embed_positions = DejaVuOPTLearnedPositionalEmbedding(config.max_position_embeddings, hidden)
        self.project_in = self.project_out = None
        if embed_dim != hidden:  # 350m
            self.project_in = ReplicatedLinear(embed_dim, hidden, bias=False, prefix=f"{prefix}.project_in")
            self.project_out = ReplicatedLinear(hidden, embed_dim, bias=False, prefix=f"{prefix}.project_out")
        self.final_layer_norm = None
        # `_remove_final_layer_norm` marks checkpoints fine-tuned before transformers 4.20.1
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = LayerNorm(hidden, elementwise_affine=config.layer_norm_elementwise_affine)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DejaVuOPTDecoderLayer(plan, prefix),
            prefix=f"{prefix}.layers",
        )
        connect(self.local_layers())

    def local_layers(self) -> list[DejaVuOPTDecoderLayer]:
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
            if self.project_in is not None:
                hidden_states, _ = self.project_in(hidden_states)
            hidden_states = hidden_states + self.embed_positions(positions)
        else:
            assert intermediate_tensors is not None, "a later stage needs the hidden states of the one before"
            hidden_states = intermediate_tensors["hidden_states"]

        flow = Flow(positions)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, flow = layer(hidden_states, flow)

        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states, _ = self.project_out(hidden_states)
        return hidden_states


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class DejaVuOPTModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", plan: Plan):
        super().__init__()
        self.decoder = DejaVuOPTDecoder(plan, f"{prefix}.decoder")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], plan.geometry.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)


class DejaVuOPTForCausalLM(DejaVuForCausalLM):
    """`--model-impl dejavu` for OPT."""

    # By which a quantized checkpoint's schemes are found for our layers.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".fc1": ".mlp.fc1", ".fc2": ".mlp.fc2"})

    def build(self, plan: Plan, prefix: str) -> Iterable[DejaVuOPTDecoderLayer]:
        config = self.config
        self.model = DejaVuOPTModel(
            vllm_config=plan.vllm_config, prefix=maybe_prefix(prefix, "model"), plan=plan
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.word_embed_proj_dim,
            quant_config=config_of(plan.settings.head_bits),
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.decoder.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        return self.model.decoder.local_layers()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.decoder.embed_tokens(input_ids)

    def parameter_name(self, name: str) -> tuple[str | None, str | None]:
        if name.startswith("decoder."):
            name = "model." + name
        if name.startswith("lm_head.") and self.config.tie_word_embeddings:
            return None, None
        name = name.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")
        for projection in "qkv":
            if f".{projection}_proj." in name:
                return name.replace(f".{projection}_proj.", ".qkv_proj."), projection
        return name, None
