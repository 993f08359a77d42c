"""OPT with predictor-gated attention heads and MLP neurons; reads top to bottom, embeddings to logits.

Parameter names, tensor- and pipeline-parallel layout follow vLLM's own OPT (Apache-2.0). T is the number of
tokens of a step, padded; hidden states are [T, hidden].
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_dejavu import artifact, metrics, ops, quantization, support, tune
from vllm_dejavu.compat import LayerNorm
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.families import geometry_of
from vllm_dejavu.kernels import cpu
from vllm_dejavu.layers import DejaVuMLP, DejaVuSelfAttention, Recorder
from vllm_dejavu.predictor import gate_input

logger = init_logger("vllm.dejavu")


class Gates:
    """The artifact as this engine uses it: which blocks of which layers are gated, by what.

    Args:
        loaded: the verified artifact, or None in mode "dense".
        tuned: crossovers {block: {tokens: union density}} measured on this device, or None.
        first_layer: first layer of this pipeline stage; gates that look at the layer before it are dropped
            there.
    """

    def __init__(
        self,
        loaded: artifact.Artifact | None,
        tuned: dict[str, dict[int, float]] | None,
        settings: DejaVuConfig,
        first_layer: int,
    ):
        self.loaded, self.tuned, self.settings, self.first_layer = loaded, tuned, settings, first_layer

    def get(self, layer: int, block: str) -> tuple | None:
        """(spec, tensors, tuned) of a gated block, as `layers.Gate` takes them; None where it runs dense."""
        if self.loaded is None or block not in self.settings.blocks:
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
        return spec, tensors, None if self.tuned is None else self.tuned[block]


class DejaVuOPTLearnedPositionalEmbedding(nn.Embedding):
    """OPT's positions start at 2."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(positions + self.offset)


class DejaVuOPTDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, settings: DejaVuConfig, gates: Gates, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        layer = int(prefix.rsplit(".", 1)[1])
        self.do_layer_norm_before = config.do_layer_norm_before
        affine = config.layer_norm_elementwise_affine
        self.self_attn = DejaVuSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.enable_bias,
            layer,
            gates.get(layer, "attention"),
            settings,
            vllm_config,
            f"{prefix}.self_attn",
        )
        self.self_attn_layer_norm = LayerNorm(config.hidden_size, elementwise_affine=affine)
        self.mlp = DejaVuMLP(
            config.hidden_size,
            config.ffn_dim,
            config.enable_bias,
            config.activation_function,
            layer,
            gates.get(layer, "mlp"),
            settings,
            vllm_config,
            f"{prefix}.mlp",
            self.self_attn.attention_name,
        )
        self.final_layer_norm = LayerNorm(config.hidden_size, elementwise_affine=affine)

    def carries(self, later: DejaVuOPTDecoderLayer) -> bool:
        """Whether this layer's MLP predictor scores the heads of the next layer too: one launch less.

        Both read what is known in front of this layer's MLP: its input, and the residual the next layer calls
        `previous`.
        """
        gate, head_gate = self.mlp.gate, later.self_attn.gate
        if gate is None or head_gate is None or gate.settings.mode != "sparse":
            return False
        return gate.lookahead == "self" and head_gate.lookahead == "previous"

    def forward(
        self,
        hidden_states: torch.Tensor,
        previous: torch.Tensor | None,
        head_scores: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One layer.

        Args:
            hidden_states: [T, hidden]. previous: residual in front of the MLP of the layer before, None in
                the first.
            head_scores: [T, heads], if the layer before has scored them already.

        Returns:
            The layer's output, the next layer's `previous`, the next layer's `head_scores` or None.
        """
        attn_gate, mlp_gate = self.self_attn.gate, self.mlp.gate
        residual = hidden_states
        if self.do_layer_norm_before:  # 125m, 1.3b, ... 175b; 350m normalises after each block
            hidden_states = self.self_attn_layer_norm(hidden_states)
        attn_input = hidden_states

        chosen = next_scores = None
        if attn_gate is not None and head_scores is None:
            x = gate_input(
                attn_gate.lookahead, block_input=attn_input, attn_input=attn_input, previous=previous
            )
            head_scores = self.self_attn.choose(x, positions)
        if mlp_gate is not None and mlp_gate.lookahead != "self":  # can run beside the attention
            x = gate_input(
                mlp_gate.lookahead, block_input=attn_input, attn_input=attn_input, previous=previous
            )
            chosen, _ = self.mlp.choose(x, positions)

        hidden_states = residual + self.self_attn(attn_input, head_scores)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = previous = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        if mlp_gate is not None and mlp_gate.lookahead == "self":
            x = gate_input("self", block_input=hidden_states, attn_input=attn_input, previous=None)
            chosen, next_scores = self.mlp.choose(x, positions, previous)
        hidden_states = residual + self.mlp(hidden_states, chosen)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, previous, next_scores


class DejaVuOPTDecoder(nn.Module):
    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: DejaVuConfig,
        loaded: artifact.Artifact | None,
        tuned: dict[str, dict[int, float]] | None,
        prefix: str,
    ):
        super().__init__()
        config = vllm_config.model_config.hf_config
        embed_dim = config.word_embed_proj_dim
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, embed_dim)
        self.embed_positions = DejaVuOPTLearnedPositionalEmbedding(
            config.max_position_embeddings, config.hidden_size
        )
        self.project_in = self.project_out = None
        if embed_dim != config.hidden_size:  # 350m
            self.project_in = ReplicatedLinear(
                embed_dim, config.hidden_size, bias=False, prefix=f"{prefix}.project_in"
            )
            self.project_out = ReplicatedLinear(
                config.hidden_size, embed_dim, bias=False, prefix=f"{prefix}.project_out"
            )
        self.final_layer_norm = None
        # `_remove_final_layer_norm` marks checkpoints fine-tuned before transformers 4.20.1
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = LayerNorm(
                config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine
            )

        from vllm.distributed.utils import get_pp_indices

        pp = get_pp_group()
        first_layer = get_pp_indices(config.num_hidden_layers, pp.rank_in_group, pp.world_size)[0]
        gates = Gates(loaded, tuned, settings, first_layer)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DejaVuOPTDecoderLayer(vllm_config, settings, gates, prefix),
            prefix=f"{prefix}.layers",
        )
        for layer, later in pairwise(self.local_layers()):
            if layer.carries(later):
                layer.mlp.carry(later.self_attn)

    def local_layers(self) -> Iterable[DejaVuOPTDecoderLayer]:
        """Layers of this pipeline stage."""
        return islice(self.layers, self.start_layer, self.end_layer)

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
            assert intermediate_tensors is not None, (
                "a later pipeline stage needs the hidden states of the one before"
            )
            hidden_states = intermediate_tensors["hidden_states"]

        previous = head_scores = None
        for layer in self.local_layers():
            hidden_states, previous, head_scores = layer(hidden_states, previous, head_scores, positions)

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
    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        settings: DejaVuConfig,
        loaded: artifact.Artifact | None,
        tuned: dict[str, dict[int, float]] | None,
    ):
        super().__init__()
        self.decoder = DejaVuOPTDecoder(vllm_config, settings, loaded, tuned, f"{prefix}.decoder")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], vllm_config.model_config.hf_config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)


class DejaVuOPTForCausalLM(nn.Module, SupportsPP):
    """`--model-impl dejavu` for OPT.

    Predictor tensors are loaded in `__init__` into non-persistent buffers, from our own verified reader: no
    load format (auto, dummy, sharded_state) touches them afterwards. The checkpoint's fingerprint is taken
    while its weights stream through `load_weights` and kept in a persistent buffer, so that a sharded state
    carries it along.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        self.settings = settings = DejaVuConfig.from_vllm_config(vllm_config)
        geometry_of(config)
        support.check_engine(vllm_config, settings)
        self.load_format = vllm_config.load_config.load_format

        self.model_name = model_config.model
        self.loaded: artifact.Artifact | None = None
        self.artifact_path = ""
        self.tuned: dict[str, dict[int, float]] | None = None
        if settings.mode != "dense" or settings.predictor is not None:
            path = artifact.resolve(settings.predictor, model_config.model, model_config.revision)
            self.artifact_path = str(path)
            self.loaded = artifact.load(path)
            artifact.check_model(
                self.loaded.manifest, artifact.ModelSpec.from_hf_config(config, self.model_name)
            )
            # Reached without the front end's hook (a bare worker harness, hf_overrides): settle the same
            # things here.
            support.update_engine(vllm_config, settings, self.loaded.digest)
            tp = vllm_config.parallel_config.tensor_parallel_size
            self.tuned = tune.load(
                path, tune.Key.of(self.loaded, torch.get_default_device(), model_config.dtype, tp)
            )

        if settings.mode != "dense":
            support.add_capture_size(vllm_config)
        splitting_ops = vllm_config.compilation_config.splitting_ops
        if splitting_ops:
            splitting_ops.extend(op for op in ops.SPLITTING_OPS if op not in splitting_ops)

        gated = None if settings.mode == "dense" else self.loaded
        self.model = DejaVuOPTModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            settings=settings,
            loaded=gated,
            tuned=self.tuned,
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.word_embed_proj_dim, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.decoder.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

        # Rounded weights must not pass for the checkpoint: a sharded state saved from them lacks this and is
        # refused on loading.
        self.register_buffer(
            "weights_fingerprint", torch.zeros(32, dtype=torch.uint8), persistent=settings.weight_bits == 16
        )
        self.register_buffer("step_counters", metrics.new_step_counters(), persistent=False)
        layers = list(self.model.decoder.local_layers())
        self._allocate_workspace(vllm_config, layers)
        self.gates = [g for layer in layers for g in (layer.self_attn.gate, layer.mlp.gate) if g is not None]
        self.predictor_bytes = sum(
            t.numel() * t.element_size() for g in self.gates for t in g.predictor.buffers()
        )
        self.switched_dense = False
        self.first_attention = layers[0].self_attn.attention_name
        layers[0].self_attn.attn.after_loading = self.verify_weights
        support.complete_warm_up()
        self._announce()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.decoder.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        self._count_step(positions.shape[-1])
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def _count_step(self, num_tokens: int) -> None:
        # Outside the compiled part: run by Python in eager and PIECEWISE steps, captured as one addition in
        # FULL graphs.
        step = ops.current_step(self.first_attention, self.settings.apply_to)
        if step is not None:
            reason = step.reason if self.gates else "mode_dense"
            if reason == "sparse" and not any(gate.takes(num_tokens) for gate in self.gates):
                reason = "above_crossover"
            self.step_counters[metrics.STEP_REASONS.index(reason)] += 1

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Checkpoint tensors into this rank's parameters; every parameter must be filled.

        Raises:
            ValueError: a parameter is missing from the checkpoint. ArtifactError: the artifact is another
            model's.
        """
        fingerprint = artifact.WeightsFingerprint()
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, tensor in fingerprint.tee(weights):
            stored_name = name
            if name.startswith("decoder."):
                name = "model." + name
            if name.startswith("lm_head.") and self.config.tie_word_embeddings:
                continue
            name = name.replace(".fc1.", ".mlp.fc1.").replace(".fc2.", ".mlp.fc2.")
            shard: tuple[str, ...] = ()
            for projection in "qkv":
                if f".{projection}_proj." in name:
                    name, shard = name.replace(f".{projection}_proj.", ".qkv_proj."), (projection,)
            if is_pp_missing_parameter(name, self):
                continue
            if name not in params:
                raise ValueError(f"Checkpoint of {self.model_name} holds {name!r}, which OPT does not have.")
            param = params[name]
            # Behind the fingerprint: predictors stay those trained for the checkpoint, whatever its weights
            # are rounded to.
            tensor = quantization.quantize_dequantize(stored_name, tensor, self.settings.weight_bits)
            getattr(param, "weight_loader", default_weight_loader)(param, tensor, *shard)
            loaded.add(name + "".join(f":{s}" for s in shard))
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
            ArtifactError: they differ. ValueError: they should be rounded, and did not come through
            `load_weights`.
        """
        if self.settings.weight_bits < 16 and self.fingerprint() is None:
            raise quantization.refusal(
                self.load_format,
                self.settings.weight_bits,
                "its weights did not come through the model's load_weights",
            )
        if self.loaded is None:
            return
        found = self.fingerprint()
        if found is None:
            logger.warning(
                "weights of %s carry no fingerprint (dummy weights?): the predictors may not fit them",
                self.model_name,
            )
            return
        artifact.check_fingerprint(self.loaded.manifest, found, self.model_name)

    def fingerprint(self) -> str | None:
        """Fingerprint of the loaded weights; None if they did not come from a checkpoint."""
        digest = bytes(self.weights_fingerprint.tolist())
        return "sha256:" + digest.hex() if any(digest) else None

    def metrics(self) -> dict[str, Any]:
        """This rank's counts as plain numbers; `metrics.summarize` makes densities of them."""
        manifest = None if self.loaded is None else self.loaded.manifest
        # at once: one wait for the device
        counts = torch.stack([g.counters for g in self.gates]).tolist() if self.gates else []
        return {
            "mode": self.settings.mode,
            "dense_switch": self.switched_dense,
            "predictor_bytes": self.predictor_bytes,
            "num_layers": self.config.num_hidden_layers,
            "steps": dict(zip(metrics.STEP_REASONS, self.step_counters.tolist(), strict=True)),
            "gates": [
                {
                    "layer": g.layer,
                    "block": g.block,
                    "units": g.units,
                    "calibrated": {"density": g.spec.density["mean"], "recall": g.spec.recall},
                }
                | dict(zip(metrics.GATE_COUNTERS, values, strict=True))
                for g, values in zip(self.gates, counts, strict=True)
            ],
            "artifact": {
                "path": self.artifact_path,
                "digest": "" if self.loaded is None else self.loaded.digest,
                "fingerprint": "" if manifest is None else manifest.model.fingerprint,
                "weights_fingerprint": self.fingerprint(),
                "fingerprint_verified": (
                    manifest is not None and manifest.model.fingerprint == self.fingerprint()
                ),
            },
        }

    def reset_metrics(self) -> None:
        for counters in (self.step_counters, *(g.counters for g in self.gates)):
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
            gate.set_dense(dense)
        self.switched_dense = dense

    def set_recorder(self, recorder: Recorder | None) -> None:
        """Observe every selection; for tests on eager engines."""
        for gate in self.gates:
            gate.recorder = recorder

    def _allocate_workspace(self, vllm_config: VllmConfig, layers: list[DejaVuOPTDecoderLayer]) -> None:
        """Scratch memory of the Triton kernels, now, so that vLLM's memory profile counts it."""
        device = torch.get_default_device()
        mlps = [x.mlp for x in layers if x.mlp.gate is not None]
        attentions = [x.self_attn for x in layers if x.self_attn.gate is not None]
        if device.type != "cuda" or not (mlps or attentions):
            return
        from vllm_dejavu.kernels.launch import Workspace

        workspace = Workspace.for_model(
            torch.device("cuda", torch.cuda.current_device()),
            vllm_config.model_config.dtype,
            num_tokens=vllm_config.scheduler_config.max_num_seqs,
            ffn=max((m.units for m in mlps), default=0),
            head_size=max((a.head_dim for a in attentions), default=0),
        )
        self.register_buffer("kernel_semaphores", workspace.semaphore_memory, persistent=False)
        for block in (*mlps, *attentions):
            block.workspace = workspace

    def _announce(self) -> None:
        if self.settings.weight_bits < 16:
            logger.warning("dejavu: %s", quantization.describe(self.settings.weight_bits))
        if self.loaded is None:
            logger.info("dejavu: OPT served dense (mode='dense'), no predictors")
            return
        if not self.gates:
            logger.warning(
                "dejavu: the artifact %s gates no block that is served here: every step runs dense",
                self.artifact_path,
            )
        device = self.weights_fingerprint.device.type
        kernels = ops.implementation(device)
        if device == "cpu" and kernels is not cpu:
            logger.warning("dejavu: %s", cpu.MISSING)
        count = {b: sum(g.block == b for g in self.gates) for b in ("mlp", "attention")}
        recalls = [g.spec.recall for g in self.gates if g.block == "mlp" and g.spec.recall is not None]
        crossovers = (
            "crossovers as measured here"
            if self.tuned
            else "built-in crossovers (`vllm-dejavu tune` measures them)"
        )
        logger.info(
            "dejavu: mode=%s apply_to=%s, %d of %d MLP and %d attention blocks gated here by %s, %s,"
            " predictors %s (%.1f MB%s; %s)",
            self.settings.mode,
            self.settings.apply_to,
            count["mlp"],
            len(list(self.model.decoder.local_layers())),
            count["attention"],
            kernels.describe(),
            crossovers if self.settings.crossover is None else f"crossover {self.settings.crossover}",
            self.artifact_path,
            self.predictor_bytes / 1e6,
            f", MLP recall {sum(recalls) / len(recalls):.2f} on their calibration text" if recalls else "",
            _origin(self.loaded.manifest),
        )


def _origin(manifest: artifact.Manifest) -> str:
    """What predictors were trained on, for the banner: predictors made without data should show it."""
    sources = manifest.training.get("data")
    if not isinstance(sources, list):
        return "origin unknown"
    rise = manifest.calibration.get("ppl_increase")
    text = "text that the model wrote itself" if sources == ["self"] else ", ".join(map(str, sources))
    return f"made from {text}" + (
        f", perplexity {100 * rise:+.2f}% on such text" if isinstance(rise, float) else ""
    )
