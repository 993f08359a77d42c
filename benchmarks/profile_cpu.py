"""Where a step's time goes on a CPU: operators' own time, of a decode step, a lone prompt, or requests that
come at once. A measurement.

    python benchmarks/profile_cpu.py --geometry 1.3b --mlp-density 0.10 --head-density 0.5 --batch 4
        --sides w8a8 dejavu-int8 --output results/
    python benchmarks/profile_cpu.py --geometry 1.3b --mlp-density 0.10 --head-density 0.5 --prompt 128
        --sides w8a8 dejavu-int8 --output results/
    OMP_NUM_THREADS=1 python benchmarks/profile_cpu.py --model DIR --text FILE.txt --batch 40 --answer 64
        --output results/

The last one is what a server computes that gets 40 requests at once and gives its worker one core: their
prompts' steps, and apart from them the decode steps.

A row an operator and side: milliseconds a step by torch.profiler, share of the wall clock while it is on, and
what kind of work it is (KINDS). "(outside)" is what no operator covers: vLLM's scheduler, sampler and Python.
Profiling itself costs some microseconds an operator, which mostly falls on the host's share; `unprofiled_ms`
is the median step before it was switched on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ENGINE_GEOMETRIES, Table, median, print_rows
from engine_drive import build_llm, drive, prefill, prompts_of, start_requests
from engine_models import prepare
from engine_side import environment
from engine_sides import SIDES

# The first that an operator's name contains names its kind.
KINDS = (
    ("dejavu_cpu::mlp", "host of our operators"),
    ("dejavu_cpu::attention", "host of our operators"),
    ("select_neurons", "predictor"),
    ("score_heads", "predictor"),
    ("sparse_mlp", "MLP"),
    ("dense_mlp", "MLP"),
    ("sparse_qkv", "projections"),
    ("out_proj", "projections"),
    ("dejavu_cpu::linear", "projections"),
    ("reshape_and_cache", "cache write"),
    ("cpu_attention", "attention"),
    ("int8_quant", "rounding of inputs"),
    ("onednn", "linears"),
    ("linear", "linears"),
    ("mm", "linears"),
    ("unified_", "host of vLLM's operators"),
)


def kind_of(name: str) -> str:
    if name.startswith("dejavu::"):  # in Python: what they call has rows of its own
        return "host of our operators"
    return next((kind for part, kind in KINDS if part in name), "other operators")


class Profile:
    """Between start() and stop(): `events`, {operator: its event}, and `wall`, milliseconds."""

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.start()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.wall = 1e3 * (time.perf_counter() - self.started)
        self.profiler.stop()
        self.events = {event.key: event for event in self.profiler.key_averages()}


def own_times(llm: Any, what: dict[str, int], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `rows_of`, with the phase they are of.

    Args:
        what: `batch`; and `prompt`, tokens of a lone one, or `answer`, tokens of each of requests that come
            at once, or neither: decode steps.
    """
    steps, context, batch = spec["steps"], spec["context"][0], what["batch"]
    if what["answer"]:
        phases = ("prompts", "decode")
        plain = answer(llm, batch, context, what["answer"], spec, [None, None])
        profiles = [Profile(), Profile()]
        counts = [n for n, _ in answer(llm, batch, context, what["answer"], spec, profiles)]
        return [
            {"phase": phase, **row}
            for phase, profile, n, (_, ms) in zip(phases, profiles, counts, plain, strict=True)
            for row in rows_of(profile.events, profile.wall, ms, n)
        ]
    profile = Profile()
    if what["prompt"]:
        plain_ms = prefill(llm, what["prompt"], steps, spec)["prefill_ms"]
        profile.start()
        prefill(llm, what["prompt"], steps, spec)
        profile.stop()
    else:
        point = (llm, batch, context, spec["warmup"], steps, spec)
        plain_ms = 1e3 * median(drive(*point)["step_s"])
        drive(*point, before_timed=profile.start, after_timed=profile.stop)
    phase = "prompts" if what["prompt"] else "decode"
    return [{"phase": phase, **row} for row in rows_of(profile.events, profile.wall, plain_ms, steps)]


def answer(
    llm: Any, batch: int, context: int, tokens: int, spec: dict[str, Any], profiles: list[Profile | None]
) -> list[tuple[int, float]]:
    """(steps, mean milliseconds of one) until every request has its first token, and of the rest."""
    engine, prompts, found = llm.llm_engine, prompts_of(spec, batch, context), []
    waiting = set(start_requests(llm, prompts, tokens, spec))
    for profile in profiles:
        if profile is not None:
            profile.start()
        steps, started = 0, time.perf_counter()
        while engine.has_unfinished_requests() if found else waiting:
            waiting -= {output.request_id for output in engine.step()}
            steps += 1
        found.append((steps, 1e3 * (time.perf_counter() - started) / steps))
        if profile is not None:
            profile.stop()
    return found


def rows_of(events: dict[str, Any], wall: float, plain: float, steps: int) -> list[dict[str, Any]]:
    """By time; what takes less than a thousandth together."""
    times = {name: (event.self_cpu_time_total / 1e3, event.count) for name, event in events.items()}
    small = [name for name, (ms, _) in times.items() if ms < wall / 1000]
    rest = sum(times.pop(name)[0] for name in small)
    times["(others)"] = (rest, 0)
    times["(outside)"] = (wall - sum(ms for ms, _ in times.values()), 0)
    rows = [
        {
            "kind": "outside of operators" if name == "(outside)" else kind_of(name),
            "share": ms / wall,
            "ms": ms / steps,
            "calls": calls / steps,
            "wall_ms": wall / steps,
            "unprofiled_ms": plain,
            "operator": name,
        }
        for name, (ms, calls) in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = {row["kind"]: [r for r in rows if r["kind"] == row["kind"]] for row in rows}
    summed = [
        {"side": of[0]["side"], "kind": kind}
        | {k: sum(row[k] for row in of) for k in ("share", "ms", "calls")}
        for kind, of in kinds.items()
    ]
    return sorted(summed, key=lambda row: -row["ms"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Operators' own time in a step, on a CPU.")
    parser.add_argument("--geometry", choices=ENGINE_GEOMETRIES, default="1.3b")
    sides = [name for name, side in SIDES.items() if side.impl != "hf"]
    parser.add_argument("--sides", nargs="+", choices=sides, default=["dense", "dejavu"])
    parser.add_argument(
        "--model", nargs=1, type=Path, metavar="DIR", help="instead: a checkpoint with tokenizer and artifact"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="prompts for --model")
    parser.add_argument("--true-rates", action="store_true", help="see bench_engine.py")
    parser.add_argument("--mlp-density", type=float)
    parser.add_argument("--head-density", type=float)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument(
        "--prompt", type=int, default=0, help="instead of decode steps: lone prompts of so many"
    )
    parser.add_argument(
        "--answer", type=int, default=0, help="instead: so many tokens for each of --batch requests at once"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dejavu-bench")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a side's spec
    args = parser.parse_args()
    if args.model and not args.text:
        parser.error("--model needs --text FILE: its prompts")
    return args


def child(spec: dict[str, Any], what: dict[str, int]) -> None:
    rows = own_times(build_llm(spec), what, spec)
    Path(spec["rows"]).write_text(json.dumps(rows), encoding="utf-8")
    os._exit(0)


def main() -> None:
    args = parse_args()
    os.environ.update(environment(False))
    what = {name: getattr(args, name) for name in ("batch", "prompt", "answer")}
    if args.child:
        return child(json.loads(args.child), what)
    asked = {**vars(args), "device": "cpu", "batch": [args.batch], "warmup": 4, "dry_run": False}
    asked["context"] = [args.prompt or args.context]
    if args.answer:
        asked["steps"] = args.answer
    name = args.model[0].name if args.model else args.geometry
    spec = prepare(argparse.Namespace(**asked), name)
    kind = f"prompt{args.prompt}" if args.prompt else f"batch{args.batch}"
    if args.answer:
        kind += f"-answer{args.answer}"
    table = Table(args.output / f"profile-cpu-{name}-{kind}.csv")
    for side in args.sides:
        with tempfile.TemporaryDirectory() as directory:
            spec |= {"side": side, "rows": f"{directory}/rows.json"}
            command = [sys.executable, __file__, "--child", json.dumps(spec)]
            command += [text for name, value in what.items() for text in (f"--{name}", str(value))]
            log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if log.returncode:
                raise SystemExit(f"{side}: {log.stdout[-3000:]}")
            rows = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
        for row in rows:
            point = {"geometry": name, **what, "side": side}
            table.add(benchmark="profile", synthetic=spec["synthetic"], **point, **row)
        for phase in dict.fromkeys(row["phase"] for row in rows):
            own = [row for row in table.rows[-len(rows) :] if row["phase"] == phase]
            print_rows(own[:25], ("side", "share", "ms", "calls", "wall_ms", "unprofiled_ms", "operator"))
            print_rows(by_kind(own), ("side", "share", "ms", "calls", "kind"))


if __name__ == "__main__":
    main()
