"""collect -> fit -> calibrate -> artifact, in one resumable, reproducible run."""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_dejavu
from vllm_dejavu import artifact
from vllm_dejavu.config import LOOKAHEADS
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.calibrate import Calibrator, describe
from vllm_dejavu.predictor_training.collect import Collector
from vllm_dejavu.predictor_training.hf_opt import OptModel
from vllm_dejavu.predictor_training.train import fit_heads, fit_mlp

# Share of the MLP's bytes that the predictors may take where no rank is named.
BYTE_BUDGET = 0.03


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the artifact.

    Attributes:
        data: files or dataset ids, or ["self"]: text sampled from the model. valid_data: separate held-out text, or a
            share `valid_share` of the documents of `data` is held out.
        max_tokens: training tokens (the paper's recipe is about twice as many: 500 documents of 2,048). valid_tokens: for calibration.
        rank: of the MLP predictors; None takes 3% of the MLP's bytes, at least 16.
        max_ppl_increase: perplexity budget of the calibration.
    """

    model: str
    data: tuple[str, ...]
    output: str
    valid_data: tuple[str, ...] = ()
    field: str = "text"
    valid_share: float = 0.1
    max_documents: int | None = None
    max_tokens: int = 524_288
    valid_tokens: int = 32_768
    seq_len: int | None = None
    rank: int | None = None
    mlp_lookahead: str = "self"
    head_lookahead: str = "self"
    dtype: str = "float16"
    max_ppl_increase: float = 0.01
    batch: int = 8
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("valid_share", self.valid_share, 0.001, 0.9), ("max_tokens", self.max_tokens, 1, 10**12),
            ("valid_tokens", self.valid_tokens, 1, 10**10), ("batch", self.batch, 1, 10**6), ("seed", self.seed, 0, 2**31 - 1),
            ("max_ppl_increase", self.max_ppl_increase, 0, 10), ("rank", 1 if self.rank is None else self.rank, 1, 10**6), ("seq_len", 2 if self.seq_len is None else self.seq_len, 2, 10**6),
            ("max_documents", 1 if self.max_documents is None else self.max_documents, 1, 10**12),
        ):  # fmt: skip
            if not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: expected {low} to {high}.")
        if not self.output.strip():
            raise ValueError("--output is empty: name a directory.")
        for flag, block, value in (("--mlp-lookahead", "mlp", self.mlp_lookahead), ("--head-lookahead", "attention", self.head_lookahead)):
            if value not in LOOKAHEADS[block]:
                raise ValueError(f"{flag} {value!r} is unknown: expected one of {list(LOOKAHEADS[block])}.")
        if self.dtype not in artifact.DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown: expected one of {sorted(artifact.DTYPES)}.")

    @property
    def lookahead(self) -> dict[str, str]:
        return {"mlp": self.mlp_lookahead, "attention": self.head_lookahead}


def run(config: TrainConfig, *, overwrite: bool = False, restart: bool = False) -> artifact.Artifact:
    """Train predictors and write the artifact to `config.output`.

    Progress is kept in `OUTPUT.run/`: the same command resumes there, and it is removed once the artifact is whole.

    Raises:
        DataError, ArtifactError, ValueError, OSError: before any work where possible.
    """
    artifact.check_output(config.output, overwrite=overwrite)
    torch.manual_seed(config.seed)
    opt = OptModel(config.model, config.device)
    seq_len = min(config.seq_len or 2048, opt.config.max_position_embeddings)
    rank = config.rank or default_rank(opt.config.hidden_size, opt.config.ffn_dim)
    if rank > opt.config.hidden_size:
        raise ValueError(f"--rank {rank} is larger than the model's hidden size {opt.config.hidden_size}.")

    run_dir = Path(f"{str(config.output).rstrip('/')}.run")
    if restart:
        shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    key = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "device", "batch")}
    key |= {"fingerprint": opt.spec.fingerprint, "seq_len": seq_len, "rank": rank, "version": vllm_dejavu.__version__}

    try:
        train, valid = load_text(config, opt, seq_len, run_dir, key)
    except BaseException:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # only if nothing is in it yet
        raise
    # What was measured on other text must not be resumed: files can change under their names.
    key |= {"text": [hashlib.sha256(w.tokens.numpy().tobytes()).hexdigest() for w in (train, valid)]}
    say(f"text: {train.num_tokens:,} training tokens ({train.documents} documents), {valid.num_tokens:,} for calibration ({valid.documents})")
    moments = Collector(opt, config.lookahead, run_dir / "moments.safetensors", key).run(train.tokens, config.batch)
    mlp = [fit_mlp(moments, i, layer.fc1.weight.detach(), None if layer.fc1.bias is None else layer.fc1.bias.detach(), rank) for i, layer in enumerate(opt.layers)]
    heads = [fit_heads(moments, i) for i in range(len(opt.layers))]
    gates, record = Calibrator(
        opt, mlp, heads, config.lookahead, valid.tokens, budget=config.max_ppl_increase, dtype=config.dtype,
        batch=config.batch, state=run_dir / "calibration.json", key=key,
    ).run()  # fmt: skip
    specs = describe(opt, gates, valid.tokens, config.dtype, config.batch, config.seed)
    manifest = artifact.Manifest(
        model=opt.spec,
        layers=tuple({b: specs[i, b] for b in ("mlp", "attention")} for i in range(len(opt.layers))),
        training={
            "data": [Path(d).name for d in config.data], "tokens": train.num_tokens, "documents": train.documents,
            "seq_len": seq_len, "seed": config.seed, "rank": rank, "recipe": "closed-form reduced-rank regression",
            "explained_variance": [round(f.explained, 4) for f in mlp],
            "head_r2": [[round(float(r), 4) for r in f.r2] for f in heads],
        },
        calibration={
            "data": [Path(d).name for d in config.valid_data] or "held-out documents of the training data",
            "tokens": valid.num_tokens, "documents": valid.documents, **record,
        },
        versions=versions(),
    )  # fmt: skip
    if not gates:
        say("warning: no gate fits the budget; the artifact keeps every block dense. Allow more with --max-ppl-increase or --rank.")
    tensors = {f"layers.{i}.{b}.{n}": t for (i, b), gate in gates.items() for n, t in gate.tensors.items()}
    saved = artifact.save(config.output, manifest, tensors, overwrite=overwrite)
    shutil.rmtree(run_dir, ignore_errors=True)
    return saved


def load_text(config: TrainConfig, opt: OptModel, seq_len: int, run_dir: Path, key: dict[str, Any]) -> tuple[data.Windows, data.Windows]:
    """Training and calibration windows."""
    if config.data == ("self",):
        documents = sampled_documents(config, opt, seq_len, run_dir, key)
    else:
        tokenizer = opt.tokenizer()
        texts = [t for source in config.data for t in data.read_documents(source, config.field, config.max_documents)]
        documents = data.tokenize(texts, tokenizer)
    if config.valid_data:
        texts = [t for source in config.valid_data for t in data.read_documents(source, config.field, config.max_documents)]
        train, valid = documents, data.tokenize(texts, opt.tokenizer())
    else:
        train, valid = data.split_documents(documents, config.valid_share, config.seed)
    return (
        data.pack(train, seq_len, opt.bos, max_tokens=config.max_tokens, seed=config.seed),
        data.pack(valid, seq_len, opt.bos, max_tokens=config.valid_tokens, seed=config.seed),
    )


def sampled_documents(config: TrainConfig, opt: OptModel, seq_len: int, run_dir: Path, key: dict[str, Any]) -> list[list[int]]:
    """Text of the model's own, kept in the run directory."""
    from tqdm import tqdm

    path = run_dir / "sampled.json"
    text_key = json.dumps(key, sort_keys=True)
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["key"] == text_key:
            return saved["documents"]
    wanted = config.max_tokens + (0 if config.valid_data else config.valid_tokens)
    with tqdm(total=wanted, unit="tok", unit_scale=True, desc="sample text") as bar:
        documents = data.sample_from_model(opt.model, wanted, seq_len, opt.bos, config.seed, bar)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"key": text_key, "documents": documents}), encoding="utf-8")
    partial.replace(path)
    return documents


def default_rank(hidden: int, ffn: int) -> int:
    """Rank whose predictor takes BYTE_BUDGET of the MLP's bytes; at least 16 (small models name their own), a multiple of 16 (wide loads)."""
    rank = BYTE_BUDGET * 2 * hidden * ffn / (hidden + ffn)
    return max(16, int(rank) // 16 * 16)


def versions() -> dict[str, str]:
    return {
        "vllm-dejavu": vllm_dejavu.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "safetensors": importlib.metadata.version("safetensors"), "python": ".".join(map(str, sys.version_info[:3])),
    }  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
