"""One side of bench_engine.py in a process of its own: all points in vLLM or Transformers, or a smoke test.

bench_engine.py starts it with a spec in JSON (`engine_models.prepare` makes one); it appends a row a point to
spec["rows"].
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from common import Budget
from engine_columns import (
    Others,
    cache_bytes,
    densities,
    peak_memory_gb,
    prefill_columns,
    rate,
    timings,
    weight_bytes,
)
from engine_drive import (
    CALIBRATION_ROWS,
    SHORT_PROMPT,
    attention_backend,
    build_llm,
    compilation,
    counted,
    drive,
    fill,
    model_of,
    prefill,
    prompts_of,
    shape_of,
)
from engine_sides import SIDES

SMOKE_PROMPTS = (
    "It was late in the evening when the old gentleman",
    "The ship had been three weeks at sea, and",
    "My dear sister,",
)


def environment(dry_run: bool) -> dict[str, str]:
    """Of every engine, set before vLLM is imported: in this process, nothing looked up.

    In this process also means that vLLM binds no threads on a CPU: all cores work. A server's worker is bound
    by vLLM, which keeps one core for its scheduler.
    """
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if dry_run:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env


def steps_needed(batch: int, context: int, spec: dict[str, Any]) -> int:
    """Tokens of the longest sequence of a point: the first request decodes while the others' prompts are
    still read.
    """
    prefill_steps = -(-batch * context // max(1, spec["prefill_tokens"] - batch))
    return context + spec["warmup"] + spec["steps"] + prefill_steps + 2


def run_vllm(spec: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    import torch

    budget, started = Budget(spec["budget_s"]), time.monotonic()
    cpu, g, itemsize = spec["device"] == "cpu", shape_of(spec), getattr(torch, spec["dtype"]).itemsize
    llm = build_llm(spec)
    cache = llm.llm_engine.vllm_config.cache_config
    common = {
        "backend": attention_backend(llm),
        "compilation": compilation(llm),
        "threads": torch.get_num_threads(),
        "async_scheduling": bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling),
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "start_s": time.monotonic() - started,
    }
    predictor_bytes = 0
    side = SIDES[spec["side"]]
    sizes = {"itemsize": itemsize * side.bits / 16, "head_itemsize": itemsize * side.head_bits / 16}
    if side.sparse:
        buffers = [item for gate in model_of(llm).gates for item in gate.predictor.named_buffers()]
        common["predictor_mb"] = sum(t.numel() * t.element_size() for _, t in buffers) / 1e6
        # which no step reads
        predictor_bytes = sum(
            t.numel() * t.element_size() for name, t in buffers if name != "activation_rate"
        )
    if cpu and not (side.sparse and spec["synthetic"]):  # calibration warms up too
        drive(
            llm,
            min(CALIBRATION_ROWS, spec["slots"]),
            min(SHORT_PROMPT, *spec["context"]),
            warmup=2,
            steps=2,
            spec=spec,
        )
    slowest_s, alone = 10.0, functools.cache(lambda context: prefill(llm, context, spec["prefill"], spec))
    for context, batch in itertools.product(spec["context"], spec["batch"]):
        point, began = {"batch": batch, "context": context}, time.monotonic()
        needed = steps_needed(batch, context, spec)
        if needed > spec["max_model_len"] or (common["kv_tokens"] and batch * needed > common["kv_tokens"]):
            emit({**point, **common, "status": "does not fit"})
            continue
        if not budget.allows(slowest_s):
            emit({**point, **common, "status": "not run: out of time"})
            continue
        lone = alone(context)
        if not cpu:
            # compiles what this shape needs, out of the measurement
            drive(llm, batch, context, warmup=1, steps=2, spec=spec)
        result = drive(llm, batch, context, spec["warmup"], spec["steps"], spec)
        row = {**point, **common, "status": "ok", **timings(result, batch), **lone}
        read = weight_bytes(g, **sizes)
        # in the middle of the timed steps
        tokens = batch * (context + spec["warmup"] + spec["steps"] / 2)
        row["cache_mb"] = cache_bytes(g, 1 if side.cache == "fp8" else itemsize, tokens) / 1e6
        if side.counts:
            summary = counted(llm)
            row |= densities(summary)
            sparse = summary["sparse_step_share"] or 0.0
            row["cache_mb"] *= 1 - sparse * (1 - (row["cache_density"] or 1.0))
            if not side.sparse:  # fc1 is read whole
                for layer in summary["layers"]:
                    layer["mlp"] |= {"read_density": 1.0}
            read += sparse * (
                weight_bytes(g, **sizes, layers=summary["layers"], predictor_bytes=predictor_bytes) - read
            )
        row |= rate(read, row)
        row["peak_memory_gb"] = peak_memory_gb(spec["device"])
        emit(row)
        slowest_s = max(slowest_s, time.monotonic() - began)


def run_hf(spec: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Transformers' OPT, eager, its default cache, greedy; the first batch and context only, unless
    `hf_points` is all.
    """
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    budget, g = Budget(spec["budget_s"]), shape_of(spec)
    cuda = spec["device"] == "cuda" and torch.cuda.is_available() and not spec["dry_run"]
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, spec["dtype"])
    if spec["synthetic"]:
        config = OPTConfig.from_pretrained(spec["model"])
        torch.set_default_dtype(dtype)
        with torch.device("meta"):  # its own random weights would be thrown away
            model = OPTForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.to_empty(device=device).tie_weights()
        fill(model, spec)
    else:
        model = OPTForCausalLM.from_pretrained(spec["model"], dtype=dtype).to(device)
        config = model.config
    model.eval()
    common = {
        "backend": f"transformers {config._attn_implementation}",
        "compilation": "eager",
        "threads": torch.get_num_threads(),
    }

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def drive_hf(batch: int, context: int, warmup: int, steps: int) -> dict[str, Any]:
        """As `drive`."""
        tokens = torch.tensor(prompts_of(spec, batch, context), device=device)
        start = clock()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        ttft = clock() - start
        others, stamps = Others(), [clock()]
        for step in range(warmup + steps):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            if step >= warmup - 1:
                stamps.append(clock())
        return {
            "ttft_s": [ttft] * batch,
            "step_s": [b - a for a, b in itertools.pairwise(stamps[-steps - 1 :])],
            "others_cores": others.cores(),
        }

    if not cuda:
        drive_hf(1, min(SHORT_PROMPT, *spec["context"]), warmup=1, steps=2)

    @functools.cache
    def alone(context: int) -> dict[str, float]:
        return prefill_columns(
            [1e3 * drive_hf(1, context, warmup=0, steps=0)["ttft_s"][0] for _ in range(spec["prefill"])]
        )

    slowest_s = 0.0
    for context, batch in hf_points(spec):
        point, began = {"batch": batch, "context": context}, time.monotonic()
        if context + spec["warmup"] + spec["steps"] > config.max_position_embeddings:
            emit({**point, **common, "status": "does not fit"})
            continue
        if not budget.allows(slowest_s):
            emit({**point, **common, "status": "not run: out of time"})
            continue
        lone = alone(context)
        if cuda:
            drive_hf(batch, context, warmup=2, steps=spec["steps"])  # the first pass warms up
        row = {
            **point,
            **common,
            "status": "ok",
            **timings(drive_hf(batch, context, spec["warmup"], spec["steps"]), batch),
            **lone,
        }
        row |= rate(weight_bytes(g, dtype.itemsize), row)
        row["peak_memory_gb"] = peak_memory_gb(device.type)
        emit(row)
        slowest_s = max(slowest_s, time.monotonic() - began)


def hf_points(spec: dict[str, Any]) -> list[tuple[int, int]]:
    """(context, batch) that Transformers is measured at."""
    every = list(itertools.product(spec["context"], spec["batch"]))
    return every if spec.get("hf_points") == "all" else every[:1]


def run_smoke(spec: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Answers of a real model; `variant` dense, dejavu or dejavu-eager."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "model": spec["smoke"],
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    # Variants run beside each other: what vLLM would find free, and measure as taken, is not one's own.
    options |= {"kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.15}
    options["enforce_eager"] = spec["dry_run"] or spec["side"].endswith("eager")
    options["model_impl"] = "vllm" if spec["side"] == "dense" else "dejavu"
    llm = LLM(**options)
    outputs = llm.generate(
        list(SMOKE_PROMPTS), SamplingParams(temperature=0, max_tokens=48, ignore_eos=True), use_tqdm=False
    )
    row = {
        "variant": spec["side"],
        "backend": attention_backend(llm),
        "cudagraph_mode": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "text": outputs[0].outputs[0].text,
    }
    if spec["side"] != "dense":
        summary = counted(llm)
        row |= densities(summary) | {"steps": summary["steps"]}
    emit(row)


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.environ.update(environment(spec["dry_run"]))
    if spec["limit_s"]:
        faulthandler.dump_traceback_later(max(1.0, spec["limit_s"] - 5))
    with open(spec["rows"], "w", encoding="utf-8") as file:

        def emit(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)

        (run_smoke if spec.get("smoke") else run_hf if spec["side"] == "hf" else run_vllm)(spec, emit)
    sys.stdout.flush()
    os._exit(0)  # an engine's shutdown has nothing left to do, and may take its time


if __name__ == "__main__":
    main()
