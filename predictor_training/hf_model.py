"""A transformers causal LM, observed and masked layer by layer: what collection and calibration run on.

What its modules are called and how large they are comes from `families`; nothing here knows an architecture.
fc1, fc2 and out_proj are our words for the projections up, down and behind the heads, whatever their names.

Shapes: T = tokens of a batch, flattened; hidden states are [T, hidden], attention outputs [T, heads,
head_size].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import load_state_dict

from vllm_dejavu.artifact import WeightsFingerprint
from vllm_dejavu.families import family_of, geometry_of
from vllm_dejavu.manifest import ModelSpec
from vllm_dejavu.predictor import gate_input
from vllm_dejavu.selection import head_grams


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


class HfModel:
    """A dense model in transformers with its tokenizer and fingerprint.

    Args:
        name: directory or hub id. device: one, or "auto": accelerate spreads the layers over GPUs, memory and
            then `offload` on disk, for models larger than any of them. dtype: that it computes in; statistics
            want float32.
        max_memory: with "auto", what each place may take, as accelerate has it: {0: "70GiB", "cpu":
            "100GiB"}.

    Attributes:
        geometry, names: of its family. layers: its decoder layers. behind: modules between them and the head.

    Raises:
        ValueError: an architecture or activation that is not supported.
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
        self.geometry, self.names = geometry_of(self.config), family_of(self.config.architectures).names
        spread = (
            {"device_map": "auto", "offload_folder": offload, "max_memory": max_memory}
            if device == "auto"
            else {"device_map": device}
            if device != "cpu"
            else {}
        )
        spread |= _dequantized(self.config, name)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **spread).eval()
        except SafetensorError as e:
            raise ValueError(
                f"Weights of {name} cannot be read ({e}); the file is damaged or cut short."
            ) from e
        self.layers = self.model.get_submodule(self.names.layers)
        self.behind = [m for path in self.names.behind if (m := attrgetter(path)(self.model)) is not None]
        self.device = (
            self.model.get_input_embeddings().weight.device if device == "auto" else torch.device(device)
        )
        if self.device.type == "meta":  # offloaded; accelerate computes on the first device it has
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.spec = ModelSpec.from_hf_config(self.config, name, fingerprint(name))
        self.bos = self.config.bos_token_id
        self.states = [LayerStates() for _ in self.layers]

    def weight(self, layer: int, module: str, kind: str = "weight") -> torch.Tensor | None:
        """A parameter of a layer on `device`, wherever accelerate keeps it: `weight(3, names.up, "bias")`.

        None where the module has none.
        """
        found = self.layers[layer].get_submodule(module)
        if not hasattr(found, "_hf_hook"):
            value = getattr(found, kind, None)
            return None if value is None else value.detach().to(self.device)
        from accelerate.utils import align_module_device

        with align_module_device(found, self.device):
            value = getattr(found, kind, None)
            return None if value is None else value.detach().clone()

    def head_grams(self, layer: int) -> torch.Tensor:
        """What `selection.head_contributions` of a layer needs: [heads, head_size, head_size]."""
        return head_grams(self.weight(layer, self.names.out), self.geometry.num_heads)

    def fc2_norms(self, layer: int) -> torch.Tensor:
        """Norms of fc2's columns, one a neuron: [ffn], fp32."""
        return self.weight(layer, self.names.down).float().norm(dim=0)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.name)

    @contextmanager
    def observed(
        self, on_attention: OnAttention | None = None, on_mlp: OnMlp | None = None
    ) -> Iterator[None]:
        """Call back in every layer of every forward pass inside; a returned mask is applied."""
        states, names, hooks = self.states, self.names, []
        heads = (self.geometry.num_heads, self.geometry.head_size)
        mlp_residual = names.mlp_norm if self.geometry.norm == "pre" else names.up

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, x.shape[-1])

        def attn_input(index: int) -> Callable:
            def hook(module: Any, args: tuple) -> None:
                states[index].attn_input = flat(args[0])

            return hook

        def residual(index: int) -> Callable:  # in front of the MLP block: `previous` of the next layer
            def hook(module: Any, args: tuple) -> None:
                if index + 1 < len(states):
                    states[index + 1].previous = flat(args[0])

            return hook

        def attention(index: int) -> Callable:
            def hook(module: Any, args: tuple) -> Any:
                if on_attention is None:
                    return None
                attn = flat(args[0]).unflatten(-1, heads)
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
            query, out, up = (layer.get_submodule(name) for name in (names.qkv[0], names.out, names.up))
            hooks.append(query.register_forward_pre_hook(attn_input(i)))
            hooks.append(out.register_forward_pre_hook(attention(i)))
            hooks.append(layer.get_submodule(mlp_residual).register_forward_pre_hook(residual(i)))
            hooks.append(up.register_forward_hook(mlp(i)))  # in front of the activation
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
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
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
        hidden = run.hidden
        if run.layer < len(self.layers):
            self.states[run.layer].previous = run.previous
        for layer in self.layers[run.layer :]:
            hidden = _hidden(layer(hidden, **run.kwargs))
        for module in self.behind:
            hidden = module(hidden)
        logits = self.model.get_output_embeddings()(hidden[:, :-1].flatten(0, 1)).float()
        targets = run.tokens[:, 1:]
        nll = torch.nn.functional.cross_entropy(logits, targets.flatten().to(logits.device), reduction="none")
        return nll.view(targets.shape).cpu()


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # a tuple before transformers 5


def _dequantized(config: Any, name: str) -> dict[str, Any]:
    """What loads a quantized checkpoint's weights as the floats that they stand for.

    Raises:
        ValueError: quantized by a method that we have no way for.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{name} is quantized as {found.get('quant_method')!r}; predictors are trained on 16 or 32"
            " bits, or on compressed-tensors checkpoints. Train on the original, then `vllm-dejavu adopt`."
        )
    from transformers.utils.quantization_config import CompressedTensorsConfig

    known = inspect.signature(CompressedTensorsConfig).parameters
    how = {"dequantize": True} if "dequantize" in known else {"run_compressed": False}  # its older name
    return {"quantization_config": CompressedTensorsConfig(**how)}


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
