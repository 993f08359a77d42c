"""Whole engines, dense vLLM against dejavu: time per token, time to first token, throughput, memory. A measurement.

    python benchmarks/bench_engine.py --geometry 6.7b --output results/
    python benchmarks/bench_engine.py --dry-run --output /tmp/out        # tiny, on a CPU; times mean nothing
    python benchmarks/bench_engine.py --smoke examples/opt-books-7m

Each side runs in a process of its own with the same settings; sides alternate, and their order changes from repeat to
repeat. In a process every (batch, context) is driven step by step. Weights and predictors are synthetic (synthetic.py):
speed only. Densities in a row are those counted in its timed steps. The ratio of each repeat is printed, then their
median beside the roofline MODEL at the counted densities.

Sides: `dense` is vLLM's own OPT; `dejavu` the sparse one; `dejavu-dense` ours with mode "dense"; `hf` is Hugging Face
Transformers, eager, one point. Time per token is the host's clock between two steps that gave tokens, without async
scheduling unless asked for: what the host adds is in it, on both sides.
"""
from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import synthetic
from common import Budget, Table, geometry, median, model_line, percentile, print_rows, provenance

from vllm_dejavu.roofline import GEOMETRIES

VLLM_SIDES = ("dense", "dejavu", "dejavu-dense")
SIDES = (*VLLM_SIDES, "hf")
PREFILL_TOKENS = 8192  # of one step
MAX_LEN = 2048
ESTIMATED_START_S = 60.0
SMOKE_PROMPTS = ("It was late in the evening when the old gentleman", "The ship had been three weeks at sea, and", "My dear sister,")


# --- in a child process: one engine -------------------------------------------------------------------------------------


def environment(dry_run: bool) -> dict[str, str]:
    """Of every engine, set before vLLM is imported: in this process, nothing looked up."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if dry_run:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return env


def build_llm(spec: dict[str, Any]) -> Any:
    """The engine of a side, with synthetic weights."""
    from vllm import LLM

    options: dict[str, Any] = {
        "model": spec["model"], "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0, "disable_log_stats": True,
        "max_num_seqs": max(spec["batch"]), "max_num_batched_tokens": PREFILL_TOKENS, "enable_prefix_caching": False,
        "async_scheduling": spec["async_scheduling"],
    }  # fmt: skip
    if spec["dry_run"]:
        options |= {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    else:
        options |= {
            "dtype": "float16", "max_model_len": MAX_LEN, "gpu_memory_utilization": spec["memory"],
            "compilation_config": {"cudagraph_capture_sizes": sorted({1, *spec["batch"]})},
        }  # fmt: skip
    if spec["side"] == "dense":
        options["model_impl"] = "vllm"
    else:
        settings = {"mode": "dense"}
        if spec["side"] == "dejavu":
            settings = {"mode": "sparse", "predictor": spec["predictor"], "blocks": spec["blocks"], "overlap": spec["overlap"]}
        options |= {"model_impl": "dejavu", "additional_config": {"dejavu": settings}}
    if spec["dense_projections"]:
        from vllm_dejavu import ops

        kernels = ops.implementation
        ops.implementation = functools.cache(lambda device_type: synthetic.DenseProjections(kernels(device_type)))
    llm = LLM(**options)
    llm.apply_model(lambda model: synthetic.init_weights(model, survive=spec["survive"], seed=spec["seed"]))
    if spec["side"] == "dejavu":
        calibrate(llm, spec)
    return llm


def model_of(llm: Any) -> Any:
    """The model of an in-process engine."""
    return llm.apply_model(lambda model: model)[0]


def attention_backend(llm: Any) -> str:
    names = {m.attn_backend.get_name() for m in model_of(llm).modules() if hasattr(m, "attn_backend")}
    return "+".join(sorted(names)) or "unknown"


def counted(llm: Any) -> dict[str, Any]:
    from vllm_dejavu.metrics import summarize

    return summarize(llm.collective_rpc("dejavu_metrics"))


def calibrate(llm: Any, spec: dict[str, Any], rounds: int = 3) -> None:
    """Bring densities per token to the artifact's, by what the engine counts."""
    batch, context = min(8, max(spec["batch"])), min(spec["context"])
    for _ in range(rounds):
        drive(llm, batch, context, warmup=2, steps=4 if spec["dry_run"] else 24, spec=spec)
        worst = synthetic.calibrate(model_of(llm), counted(llm)["layers"])
        print(f"calibration: largest miss of a layer's density {worst:.1%}", flush=True)
        if worst <= 0.1:
            return


_request_ids = itertools.count()


def drive(llm: Any, batch: int, context: int, warmup: int, steps: int, spec: dict[str, Any], before_timed: Any = None) -> dict[str, Any]:
    """One point, step by step: prompts of `context` random tokens, `warmup` decode steps, `steps` timed ones.

    Returns:
        ttft_s: of each request, all of them arriving at once; step_s: of each timed step.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, numbers = llm.llm_engine, random.Random(spec["seed"] + 1000 * batch + context)
    params = SamplingParams(
        temperature=0, max_tokens=_max_len(spec) - context, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    ids = [f"r{next(_request_ids)}" for _ in range(batch)]
    vocab = geometry(spec["geometry"]).vocab
    prompts = [[2, *(numbers.randrange(4, vocab) for _ in range(context - 1))] for _ in ids]
    first: dict[str, float] = {}
    start = time.perf_counter()
    for request, prompt in zip(ids, prompts, strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, params)
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
    stamps = [time.perf_counter()]
    while len(stamps) <= steps:
        if engine.step():
            stamps.append(time.perf_counter())
    gc.enable()
    engine.abort_request(ids)
    while engine.has_unfinished_requests():
        engine.step()
    return {"ttft_s": list(first.values()), "step_s": [b - a for a, b in itertools.pairwise(stamps)]}


def _max_len(spec: dict[str, Any]) -> int:
    return 256 if spec["dry_run"] else MAX_LEN


def timings(result: dict[str, Any], batch: int) -> dict[str, float]:
    ms = [1e3 * s for s in result["step_s"]]
    return {
        "tpot_p50_ms": median(ms), "tpot_p20_ms": percentile(ms, 0.2), "tpot_p80_ms": percentile(ms, 0.8), "tpot_p99_ms": percentile(ms, 0.99),
        "ttft_p50_ms": 1e3 * median(result["ttft_s"]), "ttft_max_ms": 1e3 * max(result["ttft_s"]),
        "tokens_per_s": 1e3 * batch * len(ms) / sum(ms),
    }  # fmt: skip


def densities(llm: Any) -> dict[str, Any]:
    """Counted since the last reset."""
    summary = counted(llm)

    def mean(block: str, what: str) -> float | None:
        values = [layer[block].get(what) for layer in summary["layers"]]
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    read, survived = mean("mlp", "read_density"), mean("mlp", "survived_density")
    return {
        "sparse_step_share": summary["sparse_step_share"],
        "mlp_density": summary["mlp_density"], "mlp_union_density": read,
        "head_density": summary["head_density"], "head_union_density": mean("attention", "read_density"),
        "survivors": survived / read if survived is not None and read else None,
    }  # fmt: skip


def run_vllm(spec: dict[str, Any], emit: Any) -> None:
    import torch

    budget, started = Budget(spec["budget_s"]), time.monotonic()
    llm = build_llm(spec)
    cache = llm.llm_engine.vllm_config.cache_config
    common = {
        "backend": attention_backend(llm),
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "start_s": time.monotonic() - started,
    }
    if spec["side"] == "dejavu":
        gates = model_of(llm).gates
        common["predictor_mb"] = sum(t.numel() * t.element_size() for g in gates for t in g.predictor.buffers()) / 1e6
    slowest_s = 10.0
    for context, batch in itertools.product(spec["context"], spec["batch"]):
        point, began = {"batch": batch, "context": context}, time.monotonic()
        needed = context + spec["warmup"] + spec["steps"] + -(-batch * context // PREFILL_TOKENS) + 2
        if needed > _max_len(spec) or (common["kv_tokens"] and batch * needed > common["kv_tokens"]):
            emit({**point, **common, "status": "does not fit"})
            continue
        if not budget.allows(slowest_s):
            emit({**point, **common, "status": "not run: out of time"})
            continue
        drive(llm, batch, context, warmup=1, steps=2, spec=spec)  # compiles what this shape needs, out of the measurement
        result = drive(llm, batch, context, spec["warmup"], spec["steps"], spec)
        row = {**point, **common, "status": "ok", **timings(result, batch)}
        if spec["side"] == "dejavu":
            row |= densities(llm)
        if torch.cuda.is_available():
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        emit(row)
        slowest_s = max(slowest_s, time.monotonic() - began)


def run_hf(spec: dict[str, Any], emit: Any) -> None:
    """Transformers' OPT, eager, its default cache, greedy: the first batch and context only."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    cuda = torch.cuda.is_available() and not spec["dry_run"]
    device = torch.device("cuda" if cuda else "cpu")
    batch, context = spec["batch"][0], spec["context"][0]
    config = OPTConfig.from_pretrained(spec["model"])
    torch.set_default_dtype(torch.float16 if cuda else torch.float32)
    with device:
        model = OPTForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    synthetic.init_weights(model, survive=spec["survive"], seed=spec["seed"])

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for warmup in (2, spec["warmup"]):  # the first pass warms up
        with torch.inference_mode():
            tokens = torch.randint(4, config.vocab_size, (batch, context), device=device)
            start = clock()
            out = model(tokens, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            ttft = clock() - start
            stamps = []
            for step in range(warmup + spec["steps"]):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                if step >= warmup - 1:
                    stamps.append(clock())
    result = {"ttft_s": [ttft] * batch, "step_s": [b - a for a, b in itertools.pairwise(stamps)]}
    row = {"batch": batch, "context": context, "status": "ok", **timings(result, batch), "backend": f"transformers {config._attn_implementation}"}
    if cuda:
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    emit(row)


def run_smoke(spec: dict[str, Any], emit: Any) -> None:
    """Answers of a real model; `variant` dense, dejavu or dejavu-eager."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"model": spec["smoke"], "max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": False}
    options |= {"kv_cache_memory_bytes": 64 << 20} if spec["dry_run"] else {"gpu_memory_utilization": 0.3}
    options["enforce_eager"] = spec["dry_run"] or spec["side"].endswith("eager")
    options["model_impl"] = "vllm" if spec["side"] == "dense" else "dejavu"
    llm = LLM(**options)
    outputs = llm.generate(list(SMOKE_PROMPTS), SamplingParams(temperature=0, max_tokens=48, ignore_eos=True), use_tqdm=False)
    row = {
        "variant": spec["side"], "backend": attention_backend(llm),
        "cudagraph_mode": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
        "tokens": [list(o.outputs[0].token_ids) for o in outputs], "text": outputs[0].outputs[0].text,
    }  # fmt: skip
    if spec["side"] != "dense":
        row |= densities(llm) | {"steps": counted(llm)["steps"]}
    emit(row)


def child(spec: dict[str, Any]) -> None:
    os.environ.update(environment(spec["dry_run"]))
    with open(spec["rows"], "w", encoding="utf-8") as file:

        def emit(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)

        (run_smoke if spec.get("smoke") else run_hf if spec["side"] == "hf" else run_vllm)(spec, emit)
    sys.stdout.flush()
    os._exit(0)  # an engine's shutdown has nothing left to do, and may take its time


# --- in the parent: sides in turn, rows, ratios -------------------------------------------------------------------------


def run_child(spec: dict[str, Any], log: Path, timeout_s: float | None) -> tuple[list[dict[str, Any]], str]:
    """Rows a side has emitted, and "" or why it ended early."""
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = log.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", json.dumps({**spec, "rows": str(rows)})]
    error = ""
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s)
            if done.returncode:
                error = f"failed with status {done.returncode}, see {log}"
        except subprocess.TimeoutExpired:
            error = "not run: out of time"
    if error.startswith("failed"):
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]))
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else [], error


def prepare(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Synthetic model and artifact of a geometry, made once per set of parameters; what children need to know."""
    rank = args.rank or synthetic.rank_of(geometry(name))
    recipe = f"{zlib.crc32(Path(synthetic.__file__).read_bytes()):08x}"
    directory = args.work / f"{name}-rank{rank}-{args.mlp_lookahead}-spread{args.spread:g}-seed{args.seed}-{recipe}"
    if not (directory / "dejavu" / "dejavu.json").exists():
        # in a process of its own, whose memory on the device is free again before an engine measures what is left
        options = {"geometry": name, "output": directory, "rank": rank, "mlp-lookahead": args.mlp_lookahead, "spread": args.spread, "seed": args.seed}
        subprocess.run([sys.executable, synthetic.__file__, *(f"--{k}={v}" for k, v in options.items())], check=True)
    return {
        "geometry": name, "model": str(directory), "predictor": str(directory / "dejavu"), "rank": rank, "batch": args.batch,
        "context": args.context, "blocks": args.blocks, "overlap": args.overlap, "mlp_lookahead": args.mlp_lookahead, "survive": args.survive,
        "spread": args.spread, "seed": args.seed, "steps": args.steps, "warmup": args.warmup, "memory": args.memory,
        "async_scheduling": args.async_scheduling, "dense_projections": args.dense_projections, "dry_run": args.dry_run,
    }  # fmt: skip


def run_geometry(args: argparse.Namespace, name: str, budget: Budget) -> list[dict[str, Any]]:
    label = f"{name}{'-' + args.label if args.label else ''}"
    spec, table = prepare(args, name), Table(args.output / f"engine-{label}.csv")
    shared = {k: spec[k] for k in ("geometry", "rank", "overlap", "mlp_lookahead", "survive", "spread", "seed", "steps", "async_scheduling", "dense_projections")}
    shared |= {"label": args.label, "blocks": "+".join(spec["blocks"]), "synthetic": True, "dry_run": args.dry_run}
    shared |= {"dtype": "float32" if args.dry_run else "float16", "weights": "random"}
    took = dict.fromkeys(args.sides, 0.0 if args.dry_run else ESTIMATED_START_S)
    for repeat in range(args.repeats):
        order = args.sides if repeat % 2 == 0 else args.sides[::-1]
        for side in order:
            if side == "hf" and repeat:
                continue
            rows, error = [], "not run: out of time"
            # hands of time: a side that cannot finish the alternation would only spoil the ratio
            if budget.allows(took[side]):
                began = time.monotonic()
                left = None if args.budget_s is None else budget.left_s
                child_spec = {**spec, "side": side, "budget_s": None if left is None else left - 15}
                rows, error = run_child(child_spec, args.output / "logs" / f"engine-{label}-{side}-{repeat}.log", left)
                took[side] = time.monotonic() - began
            seen = {(row["batch"], row["context"]) for row in rows}
            points = [(args.batch[0], args.context[0])] if side == "hf" else list(itertools.product(args.batch, args.context))
            rows += [{"batch": b, "context": c, "status": error or "not run"} for b, c in points if (b, c) not in seen]
            for row in rows:
                table.add(benchmark="engine", side=side, repeat=repeat, **shared, **row)
            good = [row for row in rows if row["status"] == "ok"]
            print(f"{label} {side} repeat {repeat}: {len(good)} of {len(points)} points, {took[side]:.0f} s {error}", flush=True)
            for row in good:
                print(f"    batch {row['batch']} x {row['context']}: {row['tpot_p50_ms']:.3f} ms a token", flush=True)
    return table.rows


def ratios(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per point and side: dense time over this side's, of each repeat; beside it the model at the counted densities."""
    out = []
    keys = dict.fromkeys((r["geometry"], r["context"], r["batch"]) for r in rows)
    for name, context, batch in keys:
        at = [r for r in rows if (r["geometry"], r["context"], r["batch"]) == (name, context, batch) and r["status"] == "ok"]
        dense = {r["repeat"]: r for r in at if r["side"] == "dense"}
        for side in (s for s in args.sides if s != "dense"):
            mine = [r for r in at if r["side"] == side]
            # Transformers runs once: against the dense run of its repeat
            pairs = [(dense[r["repeat"]], r) for r in mine if r["repeat"] in dense]
            point = {"geometry": name, "batch": batch, "context": context, "side": side, "synthetic": True, "label": args.label}
            if not pairs:
                if side != "hf" or mine:
                    out.append({**point, "speedup": "not measured"})
                continue
            values = [d["tpot_p50_ms"] / r["tpot_p50_ms"] for d, r in pairs]
            row = {
                **point, "dense_ms": median(d["tpot_p50_ms"] for d, _ in pairs), "side_ms": median(r["tpot_p50_ms"] for _, r in pairs),
                "speedup": median(values), "speedup_min": min(values), "speedup_max": max(values), "repeats": len(values),
                "ttft_ratio": median(d["ttft_p50_ms"] / r["ttft_p50_ms"] for d, r in pairs),
                "kv_ratio": pairs[0][1].get("kv_tokens", 0) / (pairs[0][0].get("kv_tokens") or 1),
            }  # fmt: skip
            last = mine[-1]
            if side == "dejavu":
                row |= {k: last[k] for k in ("mlp_density", "mlp_union_density", "head_density", "head_union_density", "survivors", "sparse_step_share")}
                line, row["model_speedup"] = model_line(
                    name, batch, context, provenance()["device"], mlp_density=last["mlp_union_density"] or 1.0,
                    head_density=last["head_density"] or 1.0, head_union_density=last["head_union_density"],
                    survivors=1.0 if last["survivors"] is None else last["survivors"], predictor_rank=last["rank"],
                )  # fmt: skip
                print(line)
            out.append(row)
    return out


def smoke(args: argparse.Namespace) -> None:
    """Both sides answer; steps ran sparse; graphs and eager agree."""
    results = {}
    for variant in ("dense", "dejavu", "dejavu-eager"):
        spec = {"smoke": str(args.smoke), "side": variant, "dry_run": args.dry_run}
        rows, error = run_child(spec, args.output / "logs" / f"smoke-{variant}.log", args.budget_s)
        if error or not rows:
            raise SystemExit(f"smoke: {variant}: {error or 'no answer'}")
        results[variant] = row = rows[0]
        print(f"{variant}: backend {row['backend']}, graphs {row['cudagraph_mode']}, steps {row.get('steps', '-')}")
        print(f"    {SMOKE_PROMPTS[0]} ...{row['text']!r}")

    def agreement(a: str, b: str) -> float:
        """Mean share of an answer before the first different token."""
        pairs = zip(results[a]["tokens"], results[b]["tokens"], strict=True)
        return sum(next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x)) / len(x) for x, y in pairs) / len(SMOKE_PROMPTS)

    share = results["dejavu"]["sparse_step_share"]
    graphs, dense = agreement("dejavu", "dejavu-eager"), agreement("dense", "dejavu")
    r = results["dejavu"]
    print(f"sparse steps {share:.1%}; MLP density {r['mlp_density']:.3f}, heads {r['head_density']:.3f}")
    print(f"tokens before the first difference: graphs and eager {graphs:.0%}, dense and sparse {dense:.0%} (approximate by design)")
    if share <= 0.9:
        raise SystemExit("smoke: at most 90% of the steps ran sparse")
    if graphs < 0.5:
        raise SystemExit("smoke: graphs and eager part in the first half of their answers; rounding alone seldom does that")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dense vLLM against dejavu, whole engines, synthetic weights.")
    parser.add_argument("--geometry", nargs="+", choices=[*GEOMETRIES, "tiny"], default=["6.7b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[256, 1920], help="prompt tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["dense", "dejavu"])
    parser.add_argument("--side", choices=SIDES, help="this side alone, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps of a point")
    parser.add_argument("--warmup", type=int, default=8, help="decode steps before them")
    parser.add_argument("--blocks", nargs="+", choices=["mlp", "attention"], default=["mlp", "attention"])
    parser.add_argument("--mlp-lookahead", choices=["self", "attn_input"], default="self")
    parser.add_argument("--overlap", action="store_true", help="predict on a side stream; takes --mlp-lookahead attn_input")
    parser.add_argument("--survive", type=float, default=1.0, help="share of neurons that fc1 brings out positive for a token")
    parser.add_argument("--rank", type=int, help="of the MLP predictor; a small one shows what its bytes cost (not given: 3%% of the MLP)")
    parser.add_argument("--spread", type=float, default=0.0, help="densities of layers vary by this share")
    parser.add_argument("--dense-projections", action="store_true", help="ablation: Q and out_proj read every head; head densities are not counted then")
    parser.add_argument("--async-scheduling", action="store_true", help="on both sides")
    parser.add_argument("--memory", type=float, default=0.9, help="gpu_memory_utilization (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="put into file names and rows: the name of an ablation")
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dejavu-bench", help="synthetic models (%(default)s)")
    parser.add_argument("--budget-s", type=float, help="stop starting points after this; they are reported as not run")
    parser.add_argument("--dry-run", action="store_true", help="tiny geometry on the CPU, eager: the script, not the speed")
    parser.add_argument("--smoke", type=Path, metavar="MODEL", help="instead: both sides answer a prompt of this model")
    args = parser.parse_args()
    if args.overlap and args.mlp_lookahead == "self":
        parser.error("--overlap needs --mlp-lookahead attn_input: what reads the MLP's own input cannot run before it")
    if args.side:
        args.sides, args.repeats = [args.side], 1
    if args.dry_run:
        args.geometry, args.batch, args.context = ["tiny"], [b for b in args.batch if b <= 8], [min(64, args.context[0])]
        args.steps, args.warmup, args.repeats = min(args.steps, 8), min(args.warmup, 2), min(args.repeats, 2)
    return args


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        return child(json.loads(sys.argv[2]))
    args = parse_args()
    os.environ.update(environment(args.dry_run))
    if args.smoke:
        return smoke(args)
    budget, every = Budget(args.budget_s), []
    for name in args.geometry:
        rows = run_geometry(args, name, budget)
        if "dense" not in args.sides:
            continue
        table = Table(args.output / f"engine-{name}{'-' + args.label if args.label else ''}-ratios.csv")
        for row in ratios(args, rows):
            table.add(benchmark="engine ratio", dry_run=args.dry_run, **row)
        every += table.rows
    if not every:
        return
    print(f"\nsynthetic weights and selections; time per output token, dense over side{'; DRY RUN, no measurement' if args.dry_run else ''}")
    columns = ("geometry", "batch", "context", "side", "dense_ms", "side_ms", "speedup", "speedup_min", "speedup_max", "repeats", "model_speedup", "mlp_union_density", "head_density", "ttft_ratio", "kv_ratio")
    print_rows(every, columns)


if __name__ == "__main__":
    main()
