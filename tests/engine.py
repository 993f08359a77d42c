"""Real vLLM engines in this process, and a recorder of what they did step by step."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tolerances import RELATIVE_RMS, relative_rms
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.forward_context import get_forward_context

from vllm_dejavu.metrics import summarize

# Relative RMS error of log-probabilities against a reference, by the engine's dtype. Measured on tiny models:
# float32 1e-7; bfloat16 1.1e-3 against vLLM's own OPT in bfloat16, which is itself 0.9e-3 away from its
# float32.
TOLERANCE = {"float32": RELATIVE_RMS[torch.float32], "bfloat16": RELATIVE_RMS[torch.bfloat16]}
# Every forced token's logit, so that sampling at temperature 0 can only choose it.
FORCED_LOGIT = 1e9


@contextlib.contextmanager
def engine(
    model: Path, *, impl: str = "dejavu", dejavu: dict[str, Any] | None = None, **options: Any
) -> Iterator[LLM]:
    """An in-process engine, shut down whatever happens.

    Args:
        dejavu: `additional_config["dejavu"]`; `predictor` may be a Path. options: of `LLM`, over small
            defaults.
    """
    if dejavu is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in dejavu.items()}
        options["additional_config"] = {"dejavu": settings}
    small = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "max_logprobs": -1,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    if not options.get("enforce_eager", True):
        # The engines before leave oneDNN handlers, whose __del__ reads a tensor. Collected while this one is
        # traced, that fails within a fake tensor's dispatch and leaves the Python dispatch key excluded.
        gc.collect()
    llm = None
    with _process_as_before():
        try:
            with one_collection():
                llm = LLM(model=str(model), model_impl=impl, **{**small, **options})
            yield llm
        finally:
            with one_collection():
                if llm is not None:
                    llm.llm_engine.engine_core.shutdown()
                cleanup_dist_env_and_memory()
            _collect()


@contextlib.contextmanager
def _process_as_before() -> Iterator[None]:
    """vLLM's CPU worker puts torch.set_num_threads out of action, and tells child processes things in the
    environment; process groups each hook on to uncaught exceptions."""
    set_num_threads, threads, hook = torch.set_num_threads, torch.get_num_threads(), sys.excepthook
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            sys.excepthook = hook


@contextlib.contextmanager
def one_collection() -> Iterator[None]:
    """vLLM collects garbage eight times in an engine's life, which is most of the time a tiny engine
    takes.
    """
    with mock.patch("gc.collect", lambda *_: 0), mock.patch("gc.freeze"), mock.patch("gc.unfreeze"):
        yield


def _collect() -> None:
    """Frees the engine that ended. What is left after the first is mostly modules, for whoever comes later:
    looking through them again took a third of an engine's time. `pytest_unconfigure` thaws them."""
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()


def runner_of(llm: LLM) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def model_of(llm: LLM) -> torch.nn.Module:
    return runner_of(llm).get_model()


def metrics_of(llm: LLM, reset: bool = False) -> dict[str, Any]:
    """What `metrics.summarize` makes of the counts since the start or the last reset."""
    summary = summarize(llm.collective_rpc("dejavu_metrics"))
    if reset:
        llm.collective_rpc("dejavu_reset_metrics")
    return summary


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **changes)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """BOS and random tokens of the tiny vocabulary: `length` tokens in all."""
    g = torch.Generator().manual_seed(1000 * seed + length)
    return [2, *torch.randint(3, 256, (length - 1,), generator=g).tolist()]


def generate(llm: LLM, prompts: Sequence[list[int]], max_tokens: int = 16, **params: Any) -> list[list[int]]:
    """Greedy completions, as token ids, of prompts given as token ids."""
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts], greedy(max_tokens, **params), use_tqdm=False
    )
    return [list(o.outputs[0].token_ids) for o in outputs]


@dataclass
class Step:
    """One forward pass with metadata. T tokens, R requests, in the order of the batch.

    Attributes:
        requests: ids as the caller gave them. block_table: [R, blocks]. logits: [R, vocab], of each request's
            last row.
        gates: (layer, block) -> (mask [T, units], valid [T]), or None where the gated block ran dense.
    """

    requests: list[str]
    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: list[int]
    seq_lens: list[int]
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    gates: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=dict)
    logits: torch.Tensor | None = None

    @property
    def query_lens(self) -> list[int]:
        return [b - a for a, b in zip(self.query_start_loc, self.query_start_loc[1:], strict=False)]

    @property
    def sparse(self) -> bool:
        """Whether any gated block took the sparse path."""
        return any(g is not None for g in self.gates.values())

    @property
    def log_probs(self) -> torch.Tensor:
        return self.logits.double().log_softmax(-1)


class Recorder:
    """Context manager that writes down every step of an engine: what ran, where, and what each gate selected.

    Works on vLLM's own OPT too (then `gates` stays empty).

    Args:
        force: request id -> whole token sequence: at position p the sampler is made to choose token p + 1 of
            it. The recorded logits are those before.
    """

    def __init__(self, llm: LLM, force: dict[str, list[int]] | None = None):
        self.llm, self.force = llm, force or {}
        self.steps: list[Step] = []

    def __enter__(self) -> Recorder:
        self.runner, self.model = runner_of(self.llm), model_of(self.llm)
        self.hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.compute_logits = self.model.compute_logits
        self.model.compute_logits = self._logits
        if hasattr(self.model, "set_recorder"):
            self.model.set_recorder(self._gate)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
        del self.model.compute_logits  # the class's own shows again
        if hasattr(self.model, "set_recorder"):
            self.model.set_recorder(None)

    def _before_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return
        metadata = next(iter(metadata.values()))
        total, requests = metadata.num_actual_tokens, self.runner.input_batch.num_reqs
        self.steps.append(
            Step(
                # vLLM appends "-" and 8 random characters to the caller's id
                requests=[r.rsplit("-", 1)[0] for r in self.runner.input_batch.req_ids[:requests]],
                input_ids=kwargs["input_ids"][:total].clone(),
                positions=kwargs["positions"][:total].clone(),
                query_start_loc=metadata.query_start_loc[: requests + 1].tolist(),
                seq_lens=metadata.seq_lens[:requests].tolist(),
                block_table=metadata.block_table[:requests].clone(),
                slot_mapping=metadata.slot_mapping[:total].clone(),
                block_size=self.llm.llm_engine.vllm_config.cache_config.block_size,
            )
        )

    def _gate(self, layer: int, block: str, mask: torch.Tensor | None, valid: torch.Tensor | None) -> None:
        gates = self.steps[-1].gates
        assert (layer, block) not in gates, f"layer {layer} {block} reported twice in a step"
        gates[layer, block] = None if mask is None else (mask.clone(), valid.clone())

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.compute_logits(hidden_states)
        if not self.steps or self.steps[-1].logits is not None:
            return logits  # a second call in a step: prompt log-probabilities; or before any step: warm-up
        step = self.steps[-1]
        step.logits = logits.float().clone()
        for row, (request, length) in enumerate(zip(step.requests, step.seq_lens, strict=True)):
            text = self.force.get(request, [])
            if length < len(text):
                logits[row, text[length]] = FORCED_LOGIT
        return logits


def run_requests(
    llm: LLM, arrivals: dict[int, dict[str, list[int]]], max_tokens: int
) -> dict[str, list[int]]:
    """Drive an engine by hand: {number of the step: {request id: prompt}} arrive just before that step.

    Returns:
        request id -> generated tokens.
    """
    core, arrivals, done, number = llm.llm_engine, dict(arrivals), {}, 0
    while arrivals or core.has_unfinished_requests():
        for request, prompt in arrivals.pop(number, {}).items():
            core.add_request(request, {"prompt_token_ids": prompt}, greedy(max_tokens))
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        number += 1
        assert number < 1000, "the engine does not finish"
    return done


def next_token_log_probs(steps: list[Step]) -> dict[tuple[str, int], torch.Tensor]:
    """(request, position) -> log-probabilities [vocab] of the token after it, as first computed."""
    out: dict[tuple[str, int], torch.Tensor] = {}
    for step in steps:
        for row, (request, length) in enumerate(zip(step.requests, step.seq_lens, strict=True)):
            out.setdefault((request, length - 1), step.log_probs[row])
    return out


def distance(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> float:
    """Of two `next_token_log_probs`, which must be of the same positions: relative RMS."""
    assert found.keys() == expected.keys(), "the two engines computed other positions"
    return relative_rms(*(torch.stack([side[k] for k in sorted(found)]) for side in (found, expected)))
