"""A transformers OPT, observed and masked layer by layer: what collection and calibration run on.

Shapes: T = tokens of a batch, flattened; hidden states are [T, hidden].
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, OPTForCausalLM

from vllm_dejavu import support
from vllm_dejavu.artifact import ModelSpec, WeightsFingerprint
from vllm_dejavu.predictor import gate_input


@dataclass
class LayerStates:
    """Hidden states of one layer that a predictor may read; filled as the layer runs."""

    attn_input: torch.Tensor | None = None
    mlp_input: torch.Tensor | None = None
    previous: torch.Tensor | None = None

    def gate_input(self, block: str, lookahead: str) -> torch.Tensor:
        """Input of a gate of this layer, by the same function as in serving."""
        block_input = self.mlp_input if block == "mlp" else self.attn_input
        return gate_input(lookahead, block_input=block_input, attn_input=self.attn_input, previous=self.previous)


# (layer, states, attention output [T, heads, head_size]) -> head mask [T, heads] or None
OnAttention = Callable[[int, LayerStates, torch.Tensor], torch.Tensor | None]
# (layer, states, pre-activations [T, ffn]) -> neuron mask [T, ffn] or None
OnMlp = Callable[[int, LayerStates, torch.Tensor], torch.Tensor | None]


class OptModel:
    """A dense OPT in transformers with its tokenizer and fingerprint.

    Args:
        name: directory or hub id. device, dtype: where and in what it computes; statistics want float32.

    Raises:
        ValueError: not an OPT, or not ReLU.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import AutoConfig

        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ValueError(f"Model {name}: no such directory, and not a hub id (ORG/NAME).")
        self.name = name
        self.config = AutoConfig.from_pretrained(name)
        support.map_architecture(self.config.architectures or [])
        support.check_hf_config(self.config)
        # In fp32, which holds any checkpoint exactly, so that the fingerprint is that of the values as stored: "auto" would
        # follow the config, and some fp32 checkpoints come with a 16-bit config.
        try:
            model = OPTForCausalLM.from_pretrained(name, dtype=torch.float32)
        except SafetensorError as e:
            raise ValueError(f"Weights of {name} cannot be read ({e}); the file is damaged or cut short.") from e
        fingerprint = WeightsFingerprint()
        for key, tensor in model.state_dict().items():
            fingerprint.add(key, tensor)
        self.model = model.to(device=device, dtype=dtype).eval()
        self.device = torch.device(device)
        self.spec = ModelSpec.from_hf_config(self.config, name, fingerprint.hexdigest())
        self.layers = self.model.model.decoder.layers
        self.bos = self.config.bos_token_id

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.name)

    @contextmanager
    def observed(self, on_attention: OnAttention | None = None, on_mlp: OnMlp | None = None) -> Iterator[None]:
        """Call back in every layer of every forward pass inside; a returned mask is applied."""
        states = [LayerStates() for _ in self.layers]
        hooks = []
        pre_ln = self.config.do_layer_norm_before
        heads = self.config.num_attention_heads

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, x.shape[-1])

        def attn_input(index: int) -> Callable:
            def hook(module: Any, args: tuple) -> None:
                states[index].attn_input = flat(args[0])

            return hook

        def residual(index: int) -> Callable:  # in front of this layer's MLP block: `previous` of the next layer
            def hook(module: Any, args: tuple) -> None:
                if index + 1 < len(states):
                    states[index + 1].previous = flat(args[0])

            return hook

        def attention(index: int) -> Callable:
            def hook(module: Any, args: tuple) -> Any:
                if on_attention is None:
                    return None
                attn = flat(args[0]).unflatten(-1, (heads, -1))
                mask = on_attention(index, states[index], attn)
                return None if mask is None else ((attn * mask[:, :, None]).view_as(args[0]),)

            return hook

        def mlp(index: int) -> Callable:
            def hook(module: Any, args: tuple, output: torch.Tensor) -> Any:
                states[index].mlp_input = flat(args[0])
                if on_mlp is None:
                    return None
                mask = on_mlp(index, states[index], flat(output))
                return None if mask is None else torch.where(mask.view_as(output), output, 0.0)

            return hook

        for i, layer in enumerate(self.layers):
            hooks.append(layer.self_attn.q_proj.register_forward_pre_hook(attn_input(i)))
            hooks.append(layer.self_attn.out_proj.register_forward_pre_hook(attention(i)))
            hooks.append((layer.final_layer_norm if pre_ln else layer.fc1).register_forward_pre_hook(residual(i)))
            hooks.append(layer.fc1.register_forward_hook(mlp(i)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def decoder(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the layers alone (no logits): tokens [B, L] -> hidden states."""
        return self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state

    @torch.inference_mode()
    def nll(self, tokens: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of tokens[:, 1:], in nats: [B, L] -> [B, L - 1], fp32 on the CPU."""
        tokens = tokens.to(self.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").cpu()
