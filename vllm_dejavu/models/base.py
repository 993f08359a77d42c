"""What every served model has: its artifact, gates, counters, the fingerprint of its weights, and a banner.

A family adds its layers (`build`) and its names (`parameter_name`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.sequence import IntermediateTensors

from vllm_dejavu import artifact, engine, metrics, ops, quantization, tune, warm_up
from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import Site
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.exact import ExactMLP
from vllm_dejavu.families import Geometry, geometry_of
from vllm_dejavu.formats import fill_dummies
from vllm_dejavu.gate import Calibrated, Gate, Recorder
from vllm_dejavu.kernels import cpu, interface
from vllm_dejavu.manifest import Manifest, check_fingerprint
from vllm_dejavu.mlp import GatedMLP
from vllm_dejavu.native import NativeBlocks, native_blocks
from vllm_dejavu.steps import Step, current_step

logger = init_logger("vllm.dejavu")


class Layer(Protocol):
    """What is asked of a decoder layer."""

    attention: GatedAttention
    mlp: GatedMLP | ExactMLP


class Gates(NamedTuple):
    """The artifact as this engine uses it: which blocks of which layers are gated, by what.

    Attributes:
        loaded: the verified artifact, or None in mode "dense".
        tuned: what was measured on this device, or None.
        first_layer: of this pipeline stage; gates that look at the layer before it are dropped there.
    """

    loaded: artifact.Artifact | None
    tuned: tune.Tuned | None
    blocks: tuple[str, ...]
    first_layer: int

    def get(self, layer: int, block: str) -> Calibrated | None:
        """The gate of a block; None where it runs dense."""
        if self.loaded is None or block not in self.blocks or block not in self.loaded.manifest.layers[layer]:
            return None
        spec, tensors = self.loaded.gate(layer, block)
        if not spec.sparse:
            return None
        if spec.lookahead == "previous" and layer == self.first_layer:
            logger.warning(
                "layer %d is the first of its pipeline stage: its %s gate (lookahead 'previous') runs dense",
                layer,
                block,
            )
            return None
        if self.tuned is None:
            return Calibrated(spec, tensors, None, None)
        return Calibrated(spec, tensors, self.tuned.crossovers[block], self.tuned.cache_crossover)


class Plan(NamedTuple):
    """What a family builds its layers by."""

    vllm_config: VllmConfig
    settings: DejaVuConfig
    geometry: Geometry
    gates: Gates

    def site(self, prefix: str) -> Site:
        """Of a layer, by vLLM's name for it."""
        layer = int(prefix.rsplit(".", 1)[1])
        return Site(self.vllm_config, self.settings, self.geometry, layer, prefix)

    def mlp(self, site: Site, bias: bool, attention_name: str) -> GatedMLP | ExactMLP:
        """Of a layer whose attention is called so."""
        if self.settings.mode == "exact":
            return ExactMLP(site, bias, attention_name)
        return GatedMLP(site, bias, self.gates.get(site.layer, "mlp"), attention_name)


def connect(layers: Sequence[Layer]) -> None:
    """Let each MLP's predictor score the heads of the next layer too, where it can: one launch less."""
    for layer, following in pairwise(layers):
        layer.mlp.carry(following.attention)


class DejaVuForCausalLM(nn.Module, SupportsPP):
    """`--model-impl dejavu`.

    Predictor tensors are loaded in `__init__` into non-persistent buffers, from our own verified reader: no
    load format (auto, dummy, sharded_state) touches them afterwards. The checkpoint's fingerprint is taken
    while its weights stream through `load_weights` and kept in a persistent buffer, so that a sharded state
    carries it along.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        self.model_name = model_config.model
        self.load_format = vllm_config.load_config.load_format
        self.checkpoint_bits = quantization.checkpoint_bits(vllm_config.quant_config)
        settled = engine.settle(vllm_config, in_worker=True)
        self.settings, self.loaded = settled.settings, settled.loaded
        self.artifact_path = "" if settled.directory is None else str(settled.directory)
        self.tuned: tune.Tuned | None = None
        if self.loaded is not None:
            tp = vllm_config.parallel_config.tensor_parallel_size
            bits = min(self.settings.weight_bits, self.checkpoint_bits)
            key = tune.Key.of(self.loaded, torch.get_default_device(), model_config.dtype, tp, bits)
            self.tuned = tune.load(settled.directory, key)
        if self.settings.mode != "dense":
            engine.add_capture_size(vllm_config)
        splitting_ops = vllm_config.compilation_config.splitting_ops
        if splitting_ops:
            splitting_ops.extend(op for op in ops.SPLITTING_OPS if op not in splitting_ops)

        self.geometry = geometry_of(self.config)
        pp = get_pp_group()
        first_layer = get_pp_indices(self.geometry.num_layers, pp.rank_in_group, pp.world_size)[0]
        gated = None if self.settings.mode == "dense" else self.loaded  # nothing is in mode exact
        gates = Gates(gated, self.tuned, self.settings.blocks, first_layer)
        layers = list(self.build(Plan(vllm_config, self.settings, self.geometry, gates), prefix))
        blocks = [block for layer in layers for block in (layer.attention, layer.mlp)]

        self.register_buffer("weights_fingerprint", torch.zeros(32, dtype=torch.uint8))
        self.register_buffer("step_counters", metrics.new_step_counters(), persistent=False)
        self.gates: list[Gate] = [block.gate for block in blocks if block.gate is not None]
        exact = [block for block in blocks if isinstance(block, ExactMLP)]
        self.counted: list[Gate | ExactMLP] = [*self.gates, *exact]
        self.num_local_layers = len(layers)
        pairs = [(layer.attention, layer.mlp) for layer in layers]
        self.native: NativeBlocks | None = native_blocks(self.settings, pairs)
        self.predictor_bytes = sum(
            t.numel() * t.element_size() for g in self.gates for t in g.predictor.buffers()
        )
        self.switched_dense = False
        self.first_attention = layers[0].attention.attention_name
        layers[0].attention.attn.after_loading = self.verify_weights
        self._allocate_workspace(vllm_config, [b for b in blocks if b.gate is not None or b in exact])
        warm_up.complete_warm_up()
        self._announce()

    def build(self, plan: Plan, prefix: str) -> Iterable[Layer]:
        """Make `model`, `lm_head` and `logits_processor`; returns the layers of this pipeline stage."""
        raise NotImplementedError

    def parameter_name(self, name: str) -> tuple[str | None, str | None]:
        """(Our name of a checkpoint's tensor, which shard of it), either None: left out; whole."""
        raise NotImplementedError

    # Steps

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        with self.step(positions.shape[-1]):
            return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @contextlib.contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Around each forward pass, outside the compiled part."""
        step = current_step(self.first_attention, self.settings.apply_to)
        self.count_step(step, num_tokens)
        if self.native is None:
            yield
            return
        self.native.begin(step, num_tokens)
        try:
            yield
        finally:
            self.native.end()

    def count_step(self, step: Step | None, num_tokens: int) -> None:
        """Run by Python in eager and PIECEWISE steps, captured as one addition in FULL graphs."""
        if step is not None:
            reason = step.reason if self.gates else "mode_dense"
            if self.settings.mode == "exact":  # prompts too
                reason = "sparse"
            elif reason == "sparse" and not any(
                gate.takes(num_tokens) or gate.reads_selected(step) for gate in self.gates
            ):
                reason = "above_crossover"
            self.step_counters[metrics.STEP_REASONS.index(reason)] += 1

    # Weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Checkpoint tensors into this rank's parameters; every parameter must be filled.

        Raises:
            ValueError: a parameter is missing from the checkpoint. ArtifactError: the artifact is another
                model's.
        """
        fingerprint = artifact.WeightsFingerprint()
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for stored_name, tensor in fingerprint.tee(weights):
            name, shard = self.parameter_name(stored_name)
            if name is None or is_pp_missing_parameter(name, self):
                continue
            if name not in params:  # packed, where the layer is ours
                if name.endswith(".weight_shape"):
                    continue
                if name.endswith(f".{quantization.PACKED}"):
                    name = f"{name.removesuffix(quantization.PACKED)}weight"
                    if (made := getattr(params.get(name), "integers", None)) is not None:
                        tensor = made.laid_out(quantization.unpacked(tensor, made.bits))
            if name not in params:
                raise ValueError(
                    f"Checkpoint of {self.model_name} holds {name!r}, which {type(self).__name__} lacks."
                )
            param = params[name]
            if param.is_floating_point() and not tensor.is_floating_point():
                raise ValueError(
                    f"Checkpoint of {self.model_name} holds integers as {stored_name!r}, where its"
                    " quantization_config has 16 bits: the two do not belong together."
                )
            owner = params.get(name.removesuffix("_scale"))
            if name.endswith(".weight_scale") and (made := getattr(owner, "integers", None)) is not None:
                tensor = made.scales_of(tensor, param.shape[-1])
            # Behind the fingerprint: predictors stay those trained for the checkpoint, whatever its weights
            # are rounded to.
            parts = {name: tensor}
            integers: quantization.Integers | None = getattr(param, "integers", None)
            if integers is not None and tensor.is_floating_point():
                names = (name, f"{name}_scale", f"{name.removesuffix('weight')}output_scale")
                parts = dict(zip(names, integers.rounded(tensor), strict=False))
            for part, value in parts.items():
                load = getattr(params[part], "weight_loader", default_weight_loader)
                load(params[part], value, *([] if shard is None else [shard]))
                loaded.add(part if shard is None else f"{part}:{shard}")
        expected = {n + s for n in params for s in ((":q", ":k", ":v") if ".qkv_proj." in n else ("",))}
        missing = sorted(expected - loaded)
        if missing:
            raise ValueError(
                f"Checkpoint of {self.model_name} lacks {len(missing)} tensor(s), first {missing[0]!r}."
            )
        digest = bytes.fromhex(fingerprint.hexdigest().removeprefix("sha256:"))
        self.weights_fingerprint.copy_(torch.tensor(list(digest), dtype=torch.uint8))
        return set(params)

    def verify_weights(self) -> None:
        """Compare the weights in place with those the predictors were trained on; called once after any load
        format.

        Raises:
            ArtifactError: they differ.
        """
        if str(self.load_format) == "dummy":
            fill_dummies(self)
        if self.loaded is None:
            return
        found = self.fingerprint()
        if found is None:
            logger.warning(
                "weights of %s carry no fingerprint (dummy weights?): the predictors may not fit them",
                self.model_name,
            )
            return
        check_fingerprint(self.loaded.manifest, found, self.model_name)

    def fingerprint(self) -> str | None:
        """Fingerprint of the loaded weights; None if they did not come from a checkpoint."""
        digest = bytes(self.weights_fingerprint.tolist())
        return "sha256:" + digest.hex() if any(digest) else None

    # What is watched and switched from outside

    def metrics(self) -> dict[str, Any]:
        """This rank's counts as plain numbers; `metrics.summarize` makes densities of them."""
        manifest = None if self.loaded is None else self.loaded.manifest
        # at once: one wait for the device
        counts = torch.stack([c.counters for c in self.counted]).tolist() if self.counted else []
        return {
            "mode": self.settings.mode,
            "weight_bits": min(self.settings.weight_bits, self.checkpoint_bits),
            "lm_head_bits": self.settings.head_bits,
            "dense_switch": self.switched_dense,
            "predictor_bytes": self.predictor_bytes,
            "num_layers": self.geometry.num_layers,
            "steps": dict(zip(metrics.STEP_REASONS, self.step_counters.tolist(), strict=True)),
            "gates": [
                {
                    "layer": c.layer,
                    "block": c.block,
                    "units": c.units,
                    "calibrated": c.calibrated,
                }
                | dict(zip(metrics.GATE_COUNTERS, values, strict=True))
                for c, values in zip(self.counted, counts, strict=True)
            ],
            "artifact": {
                "path": self.artifact_path,
                "digest": "" if self.loaded is None else self.loaded.digest,
                "fingerprint": "" if manifest is None else manifest.model.fingerprint,
                "weights_fingerprint": self.fingerprint(),
                "fingerprint_verified": manifest is not None
                and manifest.model.fingerprint == self.fingerprint(),
            },
        }

    def reset_metrics(self) -> None:
        for counters in (self.step_counters, *(c.counters for c in self.counted)):
            counters.zero_()

    def set_dense(self, dense: bool) -> None:
        """Select everything in every gate, or what the predictors say again. The prefix cache is the caller's
        (`control`).

        Raises:
            ValueError: a mode in which predictors decide nothing.
        """
        if self.settings.mode != "sparse":
            raise ValueError(
                f"The dense switch needs mode 'sparse', this engine runs in mode {self.settings.mode!r}."
            )
        for gate in self.gates:
            gate.select_everything(dense)
        self.switched_dense = dense

    def set_recorder(self, recorder: Recorder | None) -> None:
        """Observe every selection; for tests on eager engines."""
        for gate in self.gates:
            gate.recorder = recorder

    # At the start

    def _allocate_workspace(
        self, vllm_config: VllmConfig, gated: list[GatedAttention | GatedMLP | ExactMLP]
    ) -> None:
        """Scratch memory of the Triton kernels, now, so that vLLM's memory profile counts it."""
        if torch.get_default_device().type != "cuda" or not gated:
            return
        from vllm_dejavu.kernels.workspace import Workspace

        workspace = Workspace.for_model(
            torch.device("cuda", torch.cuda.current_device()),
            vllm_config.model_config.dtype,
            num_tokens=max(vllm_config.scheduler_config.max_num_seqs, *(b.most_rows for b in gated)),
            ffn=max((b.units for b in gated if not isinstance(b, GatedAttention)), default=0),
            head_size=max((b.head_size for b in gated if isinstance(b, GatedAttention)), default=0),
        )
        self.register_buffer("kernel_semaphores", workspace.semaphore_memory, persistent=False)
        for block in gated:
            block.workspace = workspace

    def _announce(self) -> None:
        bits, head_bits = self.settings.weight_bits, self.settings.head_bits
        if self.checkpoint_bits < 16:
            logger.info("dejavu: INT%d weights as the checkpoint has them", self.checkpoint_bits)
        if min(bits, head_bits) < 16:
            logger.info("dejavu: %s", quantization.describe(bits, head_bits))
        device = self.weights_fingerprint.device.type
        kernels = interface.implementation(device)
        if device == "cpu" and kernels is not cpu.KERNELS:
            logger.warning("dejavu: %s", cpu.MISSING)
        if self.settings.mode == "exact":
            logger.info(
                "dejavu: %s served exactly (mode='exact'): no predictors, fc2 of %d layers skips neurons that"
                " came out 0, by %s",
                self.model_name,
                self.num_local_layers,
                kernels.describe(),
            )
            return
        if self.loaded is None:
            logger.info("dejavu: %s served dense (mode='dense'), no predictors", self.model_name)
            return
        if not self.gates:
            logger.warning(
                "dejavu: the artifact %s gates no block that is served here: every step runs dense",
                self.artifact_path,
            )
        count = {b: sum(g.block == b for g in self.gates) for b in ("mlp", "attention")}
        recalls = [g.spec.recall for g in self.gates if g.block == "mlp" and g.spec.recall is not None]
        recall = (
            f", MLP recall {sum(recalls) / len(recalls):.2f} on their calibration text" if recalls else ""
        )
        crossovers = f"crossover {self.settings.crossover}"
        if self.settings.crossover is None:
            built_in = "built-in crossovers (`vllm-dejavu tune` measures them)"
            crossovers = "crossovers as measured here" if self.tuned else built_in
        logger.info(
            "dejavu: mode=%s apply_to=%s, %d of %d MLP and %d attention blocks gated here by %s, %s,"
            " predictors %s (%.1f MB%s; %s)",
            self.settings.mode,
            self.settings.apply_to,
            count["mlp"],
            self.num_local_layers,
            count["attention"],
            kernels.describe(),
            crossovers,
            self.artifact_path,
            self.predictor_bytes / 1e6,
            recall,
            _origin(self.loaded.manifest),
        )


def _origin(manifest: Manifest) -> str:
    """What predictors were trained on, for the banner: predictors made without data should show it."""
    sources = manifest.training.get("data")
    if not isinstance(sources, list):
        return "origin unknown"
    adopted = manifest.calibration.get("adopted_from")
    if isinstance(adopted, dict):
        return f"adopted from {adopted.get('model')}, perplexity {100 * adopted['ppl_increase']:+.2f}% here"
    rise = manifest.calibration.get("ppl_increase")
    text = "text that the model wrote itself" if sources == ["self"] else ", ".join(map(str, sources))
    return f"made from {text}" + (
        f", perplexity {100 * rise:+.2f}% on such text" if isinstance(rise, float) else ""
    )
