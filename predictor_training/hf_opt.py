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
from transformers.modeling_utils import load_state_dict

from vllm_dejavu.artifact import WeightsFingerprint
from vllm_dejavu.families import family_of, geometry_of
from vllm_dejavu.manifest import ModelSpec
from vllm_dejavu.predictor import gate_input


@dataclass
class LayerStates:
    """Hidden states of one layer that a predictor may read; filled as the layer runs."""

    attn_input: torch.Tensor | None = None
    mlp_input: torch.Tensor | None = None
    previous: torch.Tensor | None = None

    def named(self, name: str) -> torch.Tensor:
        """By the name that `predictor.state_name` gives."""
        return getattr(self, name)

    def gate_input(self, block: str, lookahead: str) -> torch.Tensor:
        """Input of a gate of this layer, by the same function as in serving."""
        block_input = self.mlp_input if block == "mlp" else self.attn_input
        return gate_input(
            lookahead, block_input=block_input, attn_input=self.attn_input, previous=self.previous
        )


# (layer, states, attention output [T, heads, head_size]) -> head mask [T, heads] or None
OnAttention = Callable[[int, LayerStates, torch.Tensor], torch.Tensor | None]
# (layer, states, pre-activations [T, ffn]) -> neuron mask [T, ffn] or None
OnMlp = Callable[[int, LayerStates, torch.Tensor], torch.Tensor | None]


class _Enough(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


@dataclass
class Resumable:
    """A batch on its way through the layers: what layer `layer` gets, and the residual that it may call
    `previous`.
    """

    tokens: torch.Tensor
    layer: int
    hidden: torch.Tensor
    kwargs: dict[str, Any]
    previous: torch.Tensor | None


class OptModel:
    """A dense OPT in transformers with its tokenizer and fingerprint.

    Args:
        name: directory or hub id. device: one, or "auto": accelerate spreads the layers over GPUs, memory and
            then `offload` on disk, for models larger than any of them. dtype: that it computes in; statistics
            want float32.
        max_memory: with "auto", what each place may take, as accelerate has it: {0: "70GiB", "cpu":
            "100GiB"}.

    Raises:
        ValueError: not an OPT, or not ReLU.
    """

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: Path | None = None,
        max_memory: dict[int | str, Any] | None = None,
    ):
        from transformers import AutoConfig

        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise ValueError(f"Model {name}: no such directory, and not a hub id (ORG/NAME).")
        self.name = name
        self.config = AutoConfig.from_pretrained(name)
        self.geometry = geometry_of(self.config)
        self.names = family_of(self.config.architectures).names
        spread = (
            {"device_map": "auto", "offload_folder": offload, "max_memory": max_memory}
            if device == "auto"
            else {"device_map": device}
            if device != "cpu"
            else {}
        )
        try:
            self.model = OPTForCausalLM.from_pretrained(name, dtype=dtype, **spread).eval()
        except SafetensorError as e:
            raise ValueError(
                f"Weights of {name} cannot be read ({e}); the file is damaged or cut short."
            ) from e
        self.layers = self.model.model.decoder.layers
        self.device = (
            self.model.model.decoder.embed_tokens.weight.device if device == "auto" else torch.device(device)
        )
        if self.device.type == "meta":  # offloaded; accelerate computes on the first device it has
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.spec = ModelSpec.from_hf_config(self.config, name, fingerprint(name))
        self.bos = self.config.bos_token_id
        self.states = [LayerStates() for _ in self.layers]

    def weight(self, layer: int, module: str, kind: str = "weight") -> torch.Tensor | None:
        """A parameter of a layer on `device`, wherever accelerate keeps it: `weight(3, "fc1", "bias")`."""
        found = self.layers[layer].get_submodule(module)
        if not hasattr(found, "_hf_hook"):
            value = getattr(found, kind)
            return None if value is None else value.detach().to(self.device)
        from accelerate.utils import align_module_device

        with align_module_device(found, self.device):
            value = getattr(found, kind)
            return None if value is None else value.detach().clone()

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.name)

    @contextmanager
    def observed(
        self, on_attention: OnAttention | None = None, on_mlp: OnMlp | None = None
    ) -> Iterator[None]:
        """Call back in every layer of every forward pass inside; a returned mask is applied."""
        states = self.states
        hooks = []
        pre_ln = self.config.do_layer_norm_before
        heads = self.config.num_attention_heads

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, x.shape[-1])

        def attn_input(index: int) -> Callable:
            def hook(module: Any, args: tuple) -> None:
                states[index].attn_input = flat(args[0])

            return hook

        def residual(
            index: int,
        ) -> Callable:  # in front of this layer's MLP block: `previous` of the next layer
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
            hooks.append(
                (layer.final_layer_norm if pre_ln else layer.fc1).register_forward_pre_hook(residual(i))
            )
            hooks.append(layer.fc1.register_forward_hook(mlp(i)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def decoder(self, tokens: torch.Tensor, last_layer: int | None = None) -> None:
        """Run the layers alone (no logits), up to `last_layer`. tokens: [B, L]."""

        def enough(module: Any, args: tuple, output: Any) -> None:
            raise _Enough

        hook = self.layers[len(self.layers) - 1 if last_layer is None else last_layer].register_forward_hook(
            enough
        )
        self._run_until(hook, tokens)

    def _run_until(self, hook: Any, tokens: torch.Tensor) -> None:
        """The model, until this hook has had enough; the hook is removed."""
        try:
            self.model.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Enough:
            pass
        finally:
            hook.remove()

    @torch.inference_mode()
    def nll(self, tokens: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of tokens[:, 1:], in nats: [B, L] -> [B, L - 1], fp32 on the CPU."""
        return self.nll_from(self.start(tokens))

    @torch.inference_mode()
    def start(self, tokens: torch.Tensor) -> Resumable:
        """A batch in front of layer 0. tokens: [B, L]."""
        caught: dict[str, Any] = {}

        def catch(module: Any, args: tuple, kwargs: dict) -> None:
            caught.update(kwargs, hidden=args[0])
            raise _Enough

        hook = self.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        self._run_until(hook, tokens)
        return Resumable(tokens, 0, caught.pop("hidden"), caught, None)

    @torch.inference_mode()
    def advance(
        self, run: Resumable, on_attention: OnAttention | None = None, on_mlp: OnMlp | None = None
    ) -> Resumable:
        """The batch behind the layer it stands in front of; callbacks as in `observed`."""
        self.states[run.layer].previous = run.previous
        with self.observed(on_attention, on_mlp):
            hidden = _hidden(self.layers[run.layer](run.hidden, **run.kwargs))
        following = run.layer + 1
        previous = self.states[following].previous if following < len(self.layers) else None
        return Resumable(run.tokens, following, hidden, run.kwargs, previous)

    @torch.inference_mode()
    def nll_from(self, run: Resumable) -> torch.Tensor:
        """As `nll`, running only the layers still to come."""
        decoder, hidden = self.model.model.decoder, run.hidden
        if run.layer < len(self.layers):
            self.states[run.layer].previous = run.previous
        for layer in self.layers[run.layer :]:
            hidden = _hidden(layer(hidden, **run.kwargs))
        for module in (decoder.final_layer_norm, decoder.project_out):
            hidden = hidden if module is None else module(hidden)
        logits = self.model.lm_head(hidden[:, :-1].flatten(0, 1)).float()
        targets = run.tokens[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits, targets.flatten().to(logits.device), reduction="none")
        return nll.view(targets.shape).cpu()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5


def fingerprint(name: str) -> str:
    """Fingerprint of a checkpoint's tensors as stored, whatever it is loaded in."""
    digest = WeightsFingerprint()
    for key, tensor in checkpoint_tensors(name):
        digest.add(key, tensor)
    return digest.hexdigest()


def checkpoint_tensors(name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint that has been loaded before, from its files, one file at a time."""
    directory = Path(name)
    if not directory.is_dir():
        from transformers.utils import cached_file

        directory = Path(cached_file(name, "config.json")).parent
    for path in sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin")):
        yield from load_state_dict(path).items()
