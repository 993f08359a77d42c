"""What an engine runs on: a synthetic model or a checkpoint with its prompts, as large as its points need."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import quantized
import synthetic
import synthetic_rates
import synthetic_weights
from common import geometry
from engine_drive import CALIBRATION_ROWS, SHORT_PROMPT
from engine_options import PREFILL_TOKENS, complete
from engine_side import steps_needed
from engine_sides import SIDES

from vllm_dejavu.families import Geometry

MAX_LEN = 2048
RECIPE = (synthetic, synthetic_rates, synthetic_weights)  # what a synthetic model was made by
CPU_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU


def prepare(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What children need to know: of a geometry, whose synthetic model and artifact are made once per set of
    parameters, or of the model directory that `name` is one of."""
    args = complete(args)
    spec = real(args, name) if args.model else synthetic_model(args, name)
    schemes = {SIDES[side].scheme for side in args.sides} - {None}
    spec["quantized"] = {
        s: str(quantized.write(Path(spec["model"]), args.work / f"{name}-{s}", s)) for s in schemes
    }
    g = Geometry(**spec["shape"])
    spec |= {k: getattr(args, k) for k in PASSED_ON}
    spec |= {
        "prefill_tokens": PREFILL_TOKENS[args.device],
        "max_model_len": min(MAX_LEN, g.max_positions),
        "slots": max(args.batch),
    }
    if args.device == "cpu" and not args.dry_run:
        spec |= cpu_sizes(g, spec)
    if args.dry_run:
        spec |= {"dtype": "float32", "max_model_len": 256}
    return spec


# Options that children get as they are.
PASSED_ON = (
    "device",
    "dtype",
    "batch",
    "context",
    "blocks",
    "overlap",
    "mlp_lookahead",
    "survive",
    "true_rates",
    "spread",
    "seed",
    "steps",
    "warmup",
    "prefill",
    "temperature",
    "hf_points",
    "memory",
    "async_scheduling",
    "dense_projections",
    "dry_run",
)


def synthetic_model(args: argparse.Namespace, name: str) -> dict[str, Any]:
    g = geometry(name)
    rank = args.rank or synthetic.rank_of(g, args.predictor_dtype)
    profile, heads, source = synthetic_rates.target(name, args.mlp_density, args.head_density)
    code = b"".join(Path(module.__file__).read_bytes() for module in RECIPE)
    recipe = f"{zlib.crc32(code):08x}"
    directory = (
        args.work
        / f"{name}-rank{rank}-{args.predictor_dtype}-mlp{profile[1]:g}-heads{heads:g}-{args.mlp_lookahead}"
        f"-spread{args.spread:g}-seed{args.seed}-{recipe}"
    )
    if not (directory / "dejavu" / "dejavu.json").exists():
        # in a process of its own, whose memory on the device is free again before an engine measures what is
        # left
        options = {
            "geometry": name,
            "output": directory,
            "rank": rank,
            "predictor-dtype": args.predictor_dtype,
            "mlp-density": args.mlp_density,
        }
        options |= {
            "head-density": args.head_density,
            "mlp-lookahead": args.mlp_lookahead,
            "spread": args.spread,
            "seed": args.seed,
        }
        subprocess.run(
            [
                sys.executable,
                synthetic.__file__,
                *(f"--{k}={v}" for k, v in options.items() if v is not None),
            ],
            check=True,
        )
    return {
        "geometry": name,
        "shape": dataclasses.asdict(g),
        "synthetic": True,
        "model": str(directory),
        "predictor": str(directory / "dejavu"),
        "rank": rank,
        "predictor_dtype": args.predictor_dtype,
        "mlp_asked": profile[1],
        "head_asked": heads,
        "densities_from": source,
    }


def real(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A model directory with its own weights, tokenizer and artifact; prompts out of the text."""
    from vllm_dejavu import artifact
    from vllm_dejavu.plan import find_model

    path = next(path for path in args.model if path.name == name)
    shape, _ = find_model(str(path))
    manifest, _ = artifact.load_manifest(path / "dejavu")
    gates = [layer["mlp"] for layer in manifest.layers if layer["mlp"].sparse]
    prompts = args.work / f"prompts-{name}-seed{args.seed}.json"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    windows = {
        context: text_prompts(path, args.text, context, max(*args.batch, CALIBRATION_ROWS), args.seed)
        for context in args.context
    }
    prompts.write_text(json.dumps(windows), encoding="utf-8")
    return {
        "geometry": name,
        "shape": dataclasses.asdict(shape),
        "synthetic": False,
        "model": str(path),
        "predictor": None,
        "prompts": str(prompts),
        "rank": max((gate.rank for gate in gates), default=0),
        "predictor_dtype": "+".join(sorted({gate.dtype for gate in gates})),
        "mlp_asked": None,
        "head_asked": None,
        "densities_from": "the artifact's gates, real text",
    }


def text_prompts(model: Path, text: Path, length: int, count: int, seed: int) -> list[list[int]]:
    """[count] windows of `length` tokens, each with BOS in front, drawn from all over a text.

    Raises:
        DataError: the text has no window of that length.
    """
    from transformers import AutoTokenizer

    from vllm_dejavu.predictor_training import data

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = data.tokenize(data.read_documents(str(text)), tokenizer)
    bos = json.loads((model / "config.json").read_text(encoding="utf-8")).get("bos_token_id", 2)
    return data.pack(documents, length, bos, max_tokens=count * length, seed=seed).tokens.tolist()


def cpu_sizes(g: Geometry, spec: dict[str, Any]) -> dict[str, int]:
    """Length, requests and KV cache that the points need, and no more.

    Points that need more positions than the model has are left out here; a side reports them as not fitting.
    """
    import torch

    slots = max(CALIBRATION_ROWS, *spec["batch"])
    needs = [
        (batch, steps_needed(batch, context, spec))
        for batch, context in itertools.product(spec["batch"], spec["context"])
    ]
    needs = [(batch, needed) for batch, needed in needs if needed <= spec["max_model_len"]]
    longest = max([needed for _, needed in needs], default=spec["max_model_len"])
    longest = max(longest, min(spec["max_model_len"], 2 * SHORT_PROMPT))  # calibration
    points = [*needs, (slots, 2 * SHORT_PROMPT), (1, longest)]
    blocks = max(batch * -(-needed // CPU_BLOCK) for batch, needed in points) + 2  # vLLM keeps one for itself
    block_bytes = (
        CPU_BLOCK * 2 * g.num_kv_heads * g.head_size * getattr(torch, spec["dtype"]).itemsize * g.num_layers
    )
    return {"max_model_len": longest, "slots": slots, "kv_cache_bytes": blocks * block_bytes}
