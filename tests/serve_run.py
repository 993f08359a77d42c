"""What the tests of bench_serve.py share: a result of vLLM's client, counts of a rank, options."""

from __future__ import annotations

import csv
from pathlib import Path

import serve_options

from vllm_dejavu.metrics import GATE_COUNTERS, STEP_REASONS

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "opt-books-7m"

# As vLLM 0.32 saves it, for 4 requests of 8 tokens.
RESULT = {
    "date": "20260101-000000",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "m",
    "tokenizer_id": "m",
    "num_prompts": 4,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.0,
    "completed": 4,
    "failed": 0,
    "total_input_tokens": 64,
    "total_output_tokens": 32,
    "request_throughput": 2.0,
    "request_goodput": None,
    "output_throughput": 16.0,
    "total_token_throughput": 48.0,
    "max_output_tokens_per_s": 20.0,
    "max_concurrent_requests": 4,
    "rtfx": 0.0,
    **{
        f"{kind}_{what}_ms": value
        for what, value in (("ttft", 100.0), ("tpot", 10.0), ("itl", 11.0))
        for kind in ("mean", "median", "std", "p50")
    },
    "p99_ttft_ms": 190.0,
    "p99_tpot_ms": 19.0,
    "p99_itl_ms": 21.0,
}
COUNTED = {
    "sparse_step_share",
    "mlp_density",
    "mlp_union_density",
    "head_density",
    "head_union_density",
    "cache_density",
    "survivors",
    "steps_sparse",
    "steps_prefill_or_mixed",
    "steps_other",
    "tokens_per_step",
}


def rank(sparse: int = 6, mixed: int = 3, piecewise: int = 1) -> dict:
    """One worker's counters: layer 0 gated, layer 1 dense."""
    steps = dict.fromkeys(STEP_REASONS, 0) | {
        "sparse": sparse,
        "prefill_or_mixed": mixed,
        "piecewise_graph": piecewise,
    }
    shared = dict.fromkeys(GATE_COUNTERS, 0) | {"layer": 0, "steps": sparse, "rows": 2 * sparse}
    gates = [
        {
            **shared,
            "block": "mlp",
            "units": 10,
            "selected": 4 * sparse,
            "read": 3 * sparse,
            "survived": 2 * sparse,
        },
        {**shared, "block": "attention", "units": 4, "selected": 4 * sparse, "read": 3 * sparse},
    ]
    return {
        "steps": steps,
        "num_layers": 2,
        "gates": gates,
        "artifact": {},
        "mode": "sparse",
        "weight_bits": 16,
        "lm_head_bits": 16,
        "dense_switch": False,
        "predictor_bytes": 0,
    }


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parse(*arguments: str):
    return serve_options.parse_args([*arguments])


def value_of(options: list[str], name: str) -> str:
    """The one that counts: the last."""
    return options[len(options) - options[::-1].index(name)]
