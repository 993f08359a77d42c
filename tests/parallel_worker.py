"""One engine of several worker processes: what it selected, computed and counted, put together from all of
its ranks.

A script, so that vLLM can spawn its workers from a process of its own; `observe` runs as well where it is
imported.

    python parallel_worker.py JOB.json RESULT.json

JOB.json holds the arguments of `observe`. Tensors of the result lie beside it, in RESULT.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine import Recorder, Step, engine, metrics_of, run_requests
from local_ray import local_ray
from safetensors.torch import load_file, save_file


def observe(
    model: str,
    dejavu: dict[str, Any],
    prompts: dict[str, list[int]],
    texts: dict[str, list[int]],
    max_tokens: int,
    options: dict[str, Any],
    ray_workers: int = 0,
) -> dict[str, Any]:
    """Run all prompts at once, twice: made to write `texts`, and on their own.

    Args:
        texts: request -> whole token sequence that it is made to write, prompt included. options: of `LLM`.
        ray_workers: start a local Ray cluster that can hold so many workers.

    Returns:
        steps: what was forced, as `engine.Recorder` saw it, of the whole model. tokens: by request, and
            metrics: of what was not. shards: per rank the units, names and tensors of each gate.
    """
    with _ray_cluster(ray_workers), engine(Path(model), dejavu=dejavu, **options) as llm:
        llm.collective_rpc(_start, args=(texts,))
        run_requests(llm, {0: prompts}, max_tokens)
        steps = _merged(llm.collective_rpc(_stop))
        llm.collective_rpc("dejavu_reset_metrics")
        tokens = run_requests(llm, {0: prompts}, max_tokens)
        return {
            "steps": steps,
            "tokens": tokens,
            "metrics": metrics_of(llm),
            "shards": llm.collective_rpc(_shards),
        }


def _ray_cluster(workers: int) -> contextlib.AbstractContextManager:
    """A cluster of this process's own; none for 0 workers."""
    return (
        local_ray(num_cpus=workers, num_gpus=workers, object_store_memory=100 * 2**20)
        if workers
        else contextlib.nullcontext()
    )


# Sent to the workers and called there, with the worker.


def _start(worker: Any, texts: dict[str, list[int]]) -> None:
    # As much of an in-process engine as a recorder looks at.
    driver = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(worker=worker)))
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            vllm_config=worker.vllm_config, engine_core=SimpleNamespace(engine_core=driver)
        )
    )
    worker.recorder = Recorder(llm, texts).__enter__()


def _stop(worker: Any) -> list[Step]:
    worker.recorder.__exit__()
    return worker.recorder.steps


def _shards(worker: Any) -> list[dict[str, Any]]:
    return [
        {
            "layer": gate.layer,
            "block": gate.block,
            "tensors": {
                **dict(gate.predictor.named_buffers()),
                "static": gate.static,
                "unit_ids": gate.unit_ids,
            },
        }
        for gate in worker.model_runner.get_model().gates
    ]


def _merged(ranks: list[list[Step]]) -> list[Step]:
    """Units of tensor-parallel ranks side by side, layers of pipeline stages one after the other, logits of
    the last stage.
    """
    steps = []
    for parts in zip(*ranks, strict=True):
        found: dict[tuple[int, str], list] = {}
        for part in parts:
            assert part.requests == parts[0].requests and torch.equal(part.positions, parts[0].positions), (
                "ranks differ in what they run"
            )
            assert torch.equal(part.input_ids, parts[0].input_ids), "ranks differ in their input"
            for key, gate in part.gates.items():
                found.setdefault(key, []).append(gate)
        gates = {
            k: None if all(g is None for g in gs) else (torch.cat([mask for mask, _ in gs], 1), gs[0][1])
            for k, gs in found.items()
        }
        steps.append(replace(parts[0], gates=gates, logits=parts[-1].logits))
    return steps


# The result as files: JSON cannot hold tensors, and tests unpickle nothing.


def save(result: dict[str, Any], path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.clone().contiguous()
            return {"tensor": name}
        if isinstance(value, Step):
            value = {f.name: getattr(value, f.name) for f in fields(value)}
            value["gates"] = [[*key, gate] for key, gate in value["gates"].items()]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps(plain(result))
    save_file(tensors, path.with_suffix(".safetensors"))
    path.write_text(text)


def load(path: Path) -> dict[str, Any]:
    tensors = load_file(path.with_suffix(".safetensors"))
    result = json.loads(
        path.read_text(), object_hook=lambda d: tensors[d["tensor"]] if d.keys() == {"tensor"} else d
    )
    for step in result["steps"]:
        step["gates"] = {(layer, block): gate and tuple(gate) for layer, block, gate in step["gates"]}
    return {**result, "steps": [Step(**step) for step in result["steps"]]}


if __name__ == "__main__":
    job, out = map(Path, sys.argv[1:])
    save(observe(**json.loads(job.read_text())), out)
