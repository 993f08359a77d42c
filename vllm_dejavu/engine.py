"""One engine settled: what it may not be asked for, what follows from its settings, and its artifact.

The front end does it once, before any worker starts, so that what is wrong is a plain error there and not one
in a worker's log; each worker does it again, for harnesses that start workers alone.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dejavu.config import DIGEST_KEY, SETTINGS_KEY, DejaVuConfig
from vllm_dejavu.families import geometry_of

if TYPE_CHECKING:  # torch is not imported to register the plugin
    from vllm_dejavu.artifact import Artifact

logger = logging.getLogger("vllm.dejavu")


class Settled(NamedTuple):
    """The settings, with the artifact that they name: verified, None in mode `dense` without one."""

    settings: DejaVuConfig
    loaded: Artifact | None
    directory: Path | None


def settle(vllm_config: Any, *, in_worker: bool) -> Settled:
    """Check and complete an engine's configuration; in the front end before anything of it is used.

    Raises:
        ValueError: a setting, an option of vLLM's or a model that is not supported.
        ArtifactError: no artifact, or not this model's.
    """
    from vllm_dejavu import artifact, auto, locate
    from vllm_dejavu.manifest import ModelSpec, check_model

    settings, model = DejaVuConfig.from_vllm_config(vllm_config), vllm_config.model_config
    geometry_of(model.hf_config)
    if in_worker:  # where a scheduler counts on the configuration as it is
        check_engine(vllm_config, settings, in_worker=True)
    loaded = directory = None
    if settings.mode != "exact" and (settings.mode != "dense" or settings.predictor is not None):
        directory = locate.resolve(settings.predictor, model.model, model.revision)
        loaded = artifact.load(directory)
        check_model(loaded.manifest, ModelSpec.from_hf_config(model.hf_config, model.model))
        if settings.predictor == auto.AUTO:  # made once, in the front end; workers read it
            settings = replace(settings, predictor=str(directory))
    update_engine(vllm_config, settings, "" if loaded is None else loaded.digest)
    if not in_worker:
        check_engine(vllm_config, settings, in_worker=False)
    return Settled(settings, loaded, directory)


def check_engine(vllm_config: Any, settings: DejaVuConfig, *, in_worker: bool) -> None:
    """Refuse engine features the sparse path cannot honour; called in the front end and again in every
    worker.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.platforms import current_platform

    from vllm_dejavu import quantization

    geometry = geometry_of(vllm_config.model_config.hf_config)
    quantization.check_model(geometry, settings.weight_bits)
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config

    def refuse(option: str, value: Any, why: str) -> None:
        raise ValueError(
            f"model_impl='dejavu' does not support {option}={value!r}: {why} Remove the option, or serve"
            " without --model-impl dejavu."
        )

    if model.quantization and model.quantization != "compressed-tensors":
        why = "its rows cannot be gathered; those of compressed-tensors' W8A8, W8A16 and W4A16 can."
        refuse("quantization", model.quantization, why)
    if not in_worker:
        # vLLM has not come to it yet
        quant_config = VllmConfig._get_quantization_config(model, vllm_config.load_config)
        exact = settings.mode == "exact"
        quantization.check_checkpoint(quant_config, model.hf_config, settings.weight_bits, exact)
    if model.runner_type == "pooling":
        refuse("runner", "pooling", "it reads only prompts, which run dense.")
    if vllm_config.lora_config is not None:
        refuse("enable_lora", True, "predictors are trained for the weights without adapters.")
    # On a CPU vLLM's own operators read the cache.
    own = ("auto", str(model.dtype).removeprefix("torch."))
    if str(cache.cache_dtype) not in own and not current_platform.is_cpu():
        refuse("kv_cache_dtype", cache.cache_dtype, "selected heads are read from an unquantized cache.")
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode == CUDAGraphMode.FULL:
        refuse(
            "cudagraph_mode",
            "FULL",
            "one full graph would be replayed for decode and prefill alike; use FULL_AND_PIECEWISE.",
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            refuse(option, getattr(parallel, option), "the cache of a sequence would be spread over ranks.")
    if getattr(parallel, "enable_dbo", False):
        refuse("enable_dbo", True, "microbatches have no common step.")
    if vllm_config.kv_transfer_config is not None:
        refuse(
            "kv_transfer_config",
            vllm_config.kv_transfer_config.kv_connector,
            "the cache depends on mode and predictor artifact, which a connector's keys do not hold.",
        )
    if getattr(cache, "kv_offloading_size", None):
        refuse(
            "kv_offloading_size",
            cache.kv_offloading_size,
            "offloaded blocks are found again by keys that do not hold mode and artifact.",
        )
    ranks = parallel.tensor_parallel_size
    if geometry.num_heads % ranks or geometry.ffn_dim % ranks:
        refuse(
            "tensor_parallel_size",
            ranks,
            f"{geometry.num_heads} heads and {geometry.ffn_dim} neurons cannot be split evenly.",
        )
    # Only reached in a worker whose front end did not run `update_engine`: its scheduler already counts on
    # the cache.
    if settings.apply_to == "all" and cache.enable_prefix_caching:
        refuse("enable_prefix_caching", True, 'with apply_to="all" every prompt token must be scored.')


def add_capture_size(vllm_config: Any) -> None:
    """Capture a graph for the largest batch of decoding requests; called in a worker, where vLLM has settled
    the sizes.

    vLLM pads a decode step up to the next captured size but captures full decode graphs only up to
    max_num_seqs: when that is not a captured size, the largest batches would fall to PIECEWISE graphs, which
    stay dense.
    """
    from vllm.config import CUDAGraphMode

    config, largest = vllm_config.compilation_config, vllm_config.scheduler_config.max_num_seqs
    sizes, mode = config.cudagraph_capture_sizes, config.cudagraph_mode
    if not sizes or mode in (None, CUDAGraphMode.NONE):
        return
    if not mode.decode_mode() == CUDAGraphMode.FULL:
        logger.warning(
            "dejavu: cudagraph_mode=%s replays decode steps in piecewise graphs, which run dense; use"
            " FULL_AND_PIECEWISE",
            mode.name,
        )
        return
    if largest > max(sizes):
        logger.warning(
            "dejavu: batches of more than %d requests run without a graph; raise max_cudagraph_capture_size"
            " to %d",
            max(sizes),
            largest,
        )
    elif largest not in sizes:
        config.cudagraph_capture_sizes = sorted([*sizes, largest])


def update_engine(vllm_config: Any, settings: DejaVuConfig, digest: str) -> None:
    """Settle what follows from the settings: compile-cache key, worker extension, prefix caching and
    graphs.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    from vllm_dejavu.kernels import cpu

    own = dict((vllm_config.additional_config or {}).get(SETTINGS_KEY, {}))
    # Native ops are compiled in by name: a graph that holds them is another one.
    own[DIGEST_KEY] = digest + (" native" if current_platform.is_cpu() and cpu.available() else "")
    if settings.predictor is not None:
        own["predictor"] = settings.predictor
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), SETTINGS_KEY: own}
    parallel = vllm_config.parallel_config
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = "vllm_dejavu.metrics.WorkerExtension"
    if settings.apply_to == "all" and vllm_config.cache_config.enable_prefix_caching:
        logger.info('dejavu: apply_to="all" scores every prompt token, so prefix caching is turned off')
        vllm_config.cache_config.enable_prefix_caching = False
    attention = getattr(vllm_config, "attention_config", None)
    if (
        current_platform.is_cuda()
        and attention is not None
        and attention.backend is None
        and current_platform.has_device_capability(100)
    ):
        # vLLM's first choice on Blackwell is FlashInfer, whose metadata and cache our kernels do not read.
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        attention.backend = AttentionBackendEnum.TRITON_ATTN
        logger.info("dejavu: attention backend TRITON_ATTN (FlashInfer's cache layout is not supported)")
    if settings.apply_to == "all" or settings.measure or settings.mode in ("oracle", "random", "static"):
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
