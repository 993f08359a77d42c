"""Quality and realised density of the serving model class, in the vLLM engine, against dense.

Three engines, one after the other: dense (scores the text, writes greedy continuations); the mode under test
with `apply_to: all` (scores the same text, every token through the sparse path, counting density and recall);
the mode under test as it serves (continuations through the decode path). With weights of 8 or 4 bits all
three have the rounded weights, and a fourth engine, dense with the weights as they
are, goes before them.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dejavu import artifact, locate, metrics, quantization
from vllm_dejavu.config import BLOCKS, EVALUATED_MODES, WEIGHT_BITS
from vllm_dejavu.families import Geometry, family_of, geometry_of
from vllm_dejavu.kernels.packing import WEIGHT_GROUP
from vllm_dejavu.manifest import ModelSpec, check_model
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.pipeline import versions
from vllm_dejavu.predictor_training.report import say
from vllm_dejavu.sizes import key_value_bytes, mlp_bytes, predictor_bytes, query_bytes

PROMPT_TOKENS = 32
BATCH = 16


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        mode: of DejaVuConfig; "dense" gives the baseline against itself.
        max_tokens: tokens of text scored; also limits the number of prompts. None: all of the text.
        prompts, new_tokens: greedy continuations compared with dense.
        dtype: the engine's; "auto" is the checkpoint's.
        weight_bits: of all but the first engine: 8 or 4, which they keep and read
            (`quantization`). LM heads follow as they do when serving.
    """

    model: str
    data: tuple[str, ...]
    predictor: str | None = None
    mode: str = "sparse"
    blocks: tuple[str, ...] = BLOCKS
    field: str = "text"
    max_tokens: int | None = None
    prompts: int = 200
    new_tokens: int = 64
    dtype: str = "auto"
    seed: int = 0
    weight_bits: int = 16

    def __post_init__(self) -> None:
        if self.mode not in EVALUATED_MODES:
            raise ValueError(f"--mode {self.mode!r} is unknown: expected one of {list(EVALUATED_MODES)}.")
        if self.weight_bits not in WEIGHT_BITS:
            raise ValueError(
                f"--weight-bits {self.weight_bits!r} is unknown: expected one of {list(WEIGHT_BITS)}."
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"--max-tokens {self.max_tokens} is too small: expected at least 2.")
        for name, value in (("--prompts", self.prompts), ("--new-tokens", self.new_tokens)):
            if value < 1:
                raise ValueError(f"{name} {value} is too small: expected at least 1.")


def run(config: EvaluateConfig, json_path: str | None = None) -> dict[str, Any]:
    """Evaluate and, with `json_path`, write the result there.

    Returns:
        The keys documented in docs/evaluate.md; densities are counted in the run, a block kept dense counts
        1.
    """
    if json_path is not None:
        parent = Path(json_path).absolute().parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise PermissionError(
                f"--json {json_path} cannot be written: {parent} is not a writable directory."
            )
        if Path(json_path).is_dir():
            raise IsADirectoryError(f"--json {json_path} is a directory: name a file.")
    # Before the dense pass, not after it: a bad artifact must not cost the time that pass takes.
    needs_artifact = config.mode != "dense" or config.predictor is not None
    loaded = artifact.load(locate.resolve(config.predictor, config.model)) if needs_artifact else None
    from transformers import AutoConfig, AutoTokenizer

    hf_config = AutoConfig.from_pretrained(config.model)
    geometry = geometry_of(hf_config)
    quantization.check_model(geometry, config.weight_bits)
    seq_len = min(2048, geometry.max_positions) - 1  # the engine wants room for one new token
    texts = [t for source in config.data for t in data.read_documents(source, config.field)]
    if loaded is not None:
        check_model(loaded.manifest, ModelSpec.from_hf_config(hf_config, config.model))
    tokens = data.tokenize(texts, AutoTokenizer.from_pretrained(config.model))
    # With --max-tokens the windows are drawn from the whole text: the first ones may all be of one document.
    windows = data.pack(
        tokens, seq_len, hf_config.bos_token_id, max_tokens=config.max_tokens, seed=config.seed
    )
    prompts = _prompts(windows.tokens, config, seq_len)
    say(
        f"text: {windows.num_tokens:,} tokens in {len(windows.tokens)} windows; {len(prompts)} prompts x"
        f" {config.new_tokens} new tokens"
    )

    unquantized_nll = None
    if config.weight_bits < 16:
        with _engine(config, mode="dense") as unquantized:
            unquantized_nll, _ = score(unquantized, windows.tokens, "dense text, 16-bit weights")
    with _engine(config, mode="dense", weight_bits=config.weight_bits) as dense:
        dense_nll, dense_top = score(dense, windows.tokens, "dense text")
        dense_texts = _continue(dense, prompts, config.new_tokens, "dense continuations")
    if unquantized_nll is None:
        unquantized_nll = dense_nll
    # Recall of oracle, random and static selections is measured against the same truth.
    settings = {
        "mode": config.mode,
        "blocks": list(config.blocks),
        "seed": config.seed,
        "predictor": config.predictor,
        "weight_bits": config.weight_bits,
    }
    with _engine(config, **settings, apply_to="all", measure=True) as scoring:
        sparse_nll, sparse_top = score(scoring, windows.tokens, f"{config.mode} text")
        counted = metrics.summarize(scoring.collective_rpc("dejavu_metrics"))
    with _engine(config, **settings, row_exact=True) as decoding:
        sparse_texts = _continue(decoding, prompts, config.new_tokens, f"{config.mode} continuations")
        served = metrics.summarize(decoding.collective_rpc("dejavu_metrics"))

    agreement = [_leading(a, b) for a, b in zip(dense_texts, sparse_texts, strict=True)]
    layers = counted["layers"]
    result = {
        "model": config.model,
        "mode": config.mode,
        "predictor": None if config.predictor is None else Path(config.predictor).name,
        "blocks": list(config.blocks),
        "data": [Path(d).name for d in config.data],
        "num_tokens": windows.num_tokens,
        "dtype": config.dtype,
        "dense_ppl": math.exp(float(dense_nll.mean())),
        "sparse_ppl": math.exp(float(sparse_nll.mean())),
        **increase("ppl_increase", sparse_nll, dense_nll),
        "weight_bits": counted["weight_bits"],
        "unquantized_dense_ppl": math.exp(float(unquantized_nll.mean())),
        **increase("quantization_ppl_increase", dense_nll, unquantized_nll),
        **increase("total_ppl_increase", sparse_nll, unquantized_nll),
        "mlp_density": counted["mlp_density"],
        "head_density": counted["head_density"],
        "mlp_density_per_layer": [x["mlp"]["density"] for x in layers],
        "head_density_per_layer": [x["attention"]["density"] for x in layers],
        "oracle_mlp_density": _oracle_density(layers, loaded),
        "mlp_recall": _recall(layers, "mlp"),
        "head_recall": _recall(layers, "attention"),
        "bytes_density": _bytes_density(
            layers, geometry, loaded if config.mode == "sparse" else None, counted["weight_bits"]
        ),
        "sparse_step_share": served["sparse_step_share"],
        "steps": served["steps"],
        "agreement_mean_tokens": sum(agreement) / len(agreement),
        "agreement_prompts": len(prompts),
        "agreement_new_tokens": config.new_tokens,
        "teacher_forced_top1_agreement": float((dense_top == sparse_top).float().mean()),
        "artifact": served["artifact"],
        "settings": {k: v for k, v in asdict(config).items() if k not in ("model", "data", "predictor")},
        "versions": versions() | {"vllm": _vllm_version()},
    }
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


@contextmanager
def _engine(config: EvaluateConfig, **settings: Any) -> Iterator[Any]:
    """An in-process engine of the serving model class; eager, without prefix caching, so that every token is
    computed.
    """
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(config.model)
    geometry, expected = geometry_of(hf_config), family_of(hf_config.architectures).serving_architecture
    # The worker must live in this process's engine core for a clean shutdown between the three engines.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {k: v for k, v in settings.items() if v is not None}
    llm = LLM(
        model=config.model,
        model_impl="dejavu",
        dtype=config.dtype,
        additional_config={"dejavu": settings},
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=BATCH,
        skip_tokenizer_init=True,
        seed=config.seed,
        disable_log_stats=True,
        **({"kv_cache_memory_bytes": cache_bytes(geometry)} if not torch.cuda.is_available() else {}),
    )
    try:
        if llm.model_config.architecture != expected:
            raise RuntimeError(
                f"The engine resolved {llm.model_config.architecture}, not {expected}. Run:"
                " vllm-dejavu doctor"
            )
        llm.collective_rpc("dejavu_reset_metrics")  # some runners warm up with real steps
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def cache_bytes(geometry: Geometry) -> int:
    """KV cache of BATCH full sequences in 4 bytes, on machines where vLLM would take a fixed large share."""
    token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_size * 4
    return max(64 << 20, (BATCH + 2) * min(2048, geometry.max_positions) * token)


def score(llm: Any, tokens: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced scores: (nll [windows, seq_len - 1], most likely token [windows, seq_len - 1])."""
    from tqdm import tqdm
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, detokenize=False)
    nll, top = (
        torch.zeros(len(tokens), tokens.shape[1] - 1),
        torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.long),
    )
    with tqdm(total=tokens.numel(), unit="tok", unit_scale=True, desc=what) as bar:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH].tolist()
            outputs = llm.generate([{"prompt_token_ids": row} for row in part], params, use_tqdm=False)
            for i, output in enumerate(outputs, start):
                for j, entry in enumerate(output.prompt_logprobs[1:]):
                    nll[i, j] = -entry[int(tokens[i, j + 1])].logprob
                    top[i, j] = next(token for token, value in entry.items() if value.rank == 1)
            bar.update(len(part) * tokens.shape[1])
    return nll, top


def _continue(llm: Any, prompts: list[list[int]], new_tokens: int, what: str) -> list[list[int]]:
    """Greedy continuations."""
    from tqdm import tqdm
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
    out: list[list[int]] = []
    with tqdm(total=len(prompts), unit="prompt", desc=what) as bar:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            for output in llm.generate([{"prompt_token_ids": p} for p in part], params, use_tqdm=False):
                out.append(list(output.outputs[0].token_ids))
            bar.update(len(part))
    return out


def _prompts(tokens: torch.Tensor, config: EvaluateConfig, seq_len: int) -> list[list[int]]:
    """Beginnings of evenly spaced places in the text: BOS and PROMPT_TOKENS - 1 tokens."""
    count = (
        config.prompts if config.max_tokens is None else max(1, min(config.prompts, config.max_tokens // 256))
    )
    length = max(2, min(PROMPT_TOKENS, seq_len - config.new_tokens))
    body = tokens[:, 1:].reshape(-1)
    starts = torch.linspace(0, max(0, len(body) - length), count).long().tolist()
    return [[int(tokens[0, 0]), *body[s : s + length - 1].tolist()] for s in starts]


def increase(name: str, nll: torch.Tensor, baseline: torch.Tensor) -> dict[str, float | None]:
    """Relative rise of perplexity, and its standard error from the spread over windows, the unit that is
    sampled.
    """
    delta = (nll - baseline).mean(1)
    # Of exp(mean) - 1 by the delta method.
    error = float(delta.std() / math.sqrt(len(delta)) * delta.mean().exp()) if len(delta) > 1 else None
    return {name: math.expm1(float(delta.mean())), f"{name}_stderr": error}


def _leading(a: list[int], b: list[int]) -> int:
    """Number of leading tokens that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _recall(layers: list[dict[str, Any]], block: str) -> float | None:
    """Share of the truly active units that were selected, over all gated layers."""
    gated = [x[block] for x in layers if x[block]["gated"]]
    active = sum(x["active"] for x in gated)
    return sum(x["hit"] for x in gated) / active if active else None


def _oracle_density(layers: list[dict[str, Any]], loaded: artifact.Artifact | None) -> float | None:
    """Mean over layers of the truly active share: counted where gated, from the manifest where a layer is
    kept dense.
    """
    values = []
    for i, x in enumerate(layers):
        if x["mlp"]["gated"]:
            values.append(x["mlp"]["active_density"])
        else:
            values.append(None if loaded is None else loaded.manifest.layers[i]["mlp"].oracle_density)
    return None if None in values else sum(values) / len(values)


def _bytes_density(
    layers: list[dict[str, Any]], geometry: Geometry, loaded: artifact.Artifact | None, weight_bits: int = 16
) -> float:
    """Weight bytes of the decoder layers read for one token at batch 1, predictors included, over those of
    dense.

    Embeddings, LM head and KV cache are left out. K and V are always read; fc2 rows only of neurons that came
    out positive.
    """
    share = {16: 1.0, 8: 0.5, 4: 0.25 + 1 / WEIGHT_GROUP}[weight_bits]  # a scale of 2 bytes for so many
    mlp_whole, heads_whole, always = (
        share * size(geometry) for size in (mlp_bytes, query_bytes, key_value_bytes)
    )
    read = dense = 0.0
    for i, x in enumerate(layers):
        mlp = x["mlp"]
        rows, survivors = mlp["density"], mlp["density"]
        if mlp["gated"]:
            survivors = mlp["hit"] / (mlp["rows"] * mlp["units"])
        read += always + heads_whole * x["attention"]["density"] + mlp_whole / 2 * (rows + survivors)
        dense += always + heads_whole + mlp_whole
        if loaded is not None:
            for block in BLOCKS:
                if x[block]["gated"]:
                    read += predictor_bytes(loaded.gate(i, block)[1])
    return read / dense


def _vllm_version() -> str:
    import vllm

    return vllm.__version__
