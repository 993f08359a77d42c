"""collect -> fit -> calibrate -> artifact, in one resumable, reproducible run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import vllm_dejavu
from vllm_dejavu import artifact
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.manifest import Manifest
from vllm_dejavu.predictor_training import collect, data, forms, labels, report, samples
from vllm_dejavu.predictor_training.calibrate import CalibrationSettings, Calibrator, Measurements
from vllm_dejavu.predictor_training.collect import Collector, Moments, Request
from vllm_dejavu.predictor_training.config import MODEL_DTYPES, TrainConfig
from vllm_dejavu.predictor_training.describe import Description, describe
from vllm_dejavu.predictor_training.gates import Gate, Key
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.report import say
from vllm_dejavu.predictor_training.run_directory import RunDirectory
from vllm_dejavu.predictor_training.train import FitSettings, FittedLayer, LayerWeights, fit_layer
from vllm_dejavu.sizes import default_rank

# The paper's recipe: 500 documents of up to 2,048 tokens.
DOCUMENTS = 500


class Workers(Protocol):
    """Who collects and fits: `Local`, or `distributed.OnRay`."""

    def collect(
        self,
        request: Request,
        tokens: torch.Tensor,
        checkpoint: Path,
        key: dict[str, Any],
        store: samples.SampleStore | None,
    ) -> Moments:
        """Moments of tokens [num_windows, seq_len]."""

    def fit(
        self, settings: FitSettings, moments: Moments, layers: range, store: samples.SampleStore | None
    ) -> dict[int, FittedLayer]:
        """The predictors of these layers."""


class Local:
    """Collects and fits in this process."""

    def __init__(self, model: HfModel, batch: int):
        self.model, self.batch = model, batch

    def collect(
        self,
        request: Request,
        tokens: torch.Tensor,
        checkpoint: Path,
        key: dict[str, Any],
        store: samples.SampleStore | None,
    ) -> Moments:
        collector = Collector(self.model, request, checkpoint, key, store)
        if store is not None:
            collector.resume()
            store.discard_from(collector.windows)
        return collector.run(tokens, self.batch)

    def fit(
        self, settings: FitSettings, moments: Moments, layers: range, store: samples.SampleStore | None
    ) -> dict[int, FittedLayer]:
        from tqdm import tqdm

        return {
            i: fit_layer(settings, moments, i, LayerWeights.of(self.model, i), store)
            for i in tqdm(layers, desc="fit", unit="layer")
        }


@dataclass(frozen=True)
class Job:
    """A run about to start: all that its steps share.

    Attributes:
        passes: ranges of layers whose moments are held together. key: everything that decides the artifact:
            what is resumed must have been made under the same.
    """

    config: TrainConfig
    model: HfModel
    place: RunDirectory
    log: report.Log
    seq_len: int
    rank: int
    passes: list[range]
    train: data.Windows
    valid: data.Windows
    key: dict[str, Any]


@dataclass(frozen=True)
class Calibrated:
    """What calibration chose, how it came to that, and what it selects."""

    gates: dict[Key, Gate]
    record: dict[str, Any]
    described: Description


def run(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    restart: bool = False,
    resume: bool = False,
    run_dir: str | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
) -> artifact.Artifact:
    """Train predictors and write the artifact to `config.output`.

    Progress is kept in the run directory (`OUTPUT.run/` unless named): the same command resumes there. Once
    the artifact is whole, metrics.jsonl and plots stay in it and the rest is removed.

    Args:
        restart: forget an interrupted run. resume: refuse to begin anew: there must be an interrupted run of
            these settings.
        ray: address of a Ray cluster, or "auto"; ray_workers: model replicas there.

    Raises:
        DataError, ArtifactError, ValueError, OSError: before any work where possible.
    """
    artifact.check_output(config.output, overwrite=overwrite)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    place = RunDirectory(Path(run_dir or f"{str(config.output).rstrip('/')}.run"))
    job = prepare(config, place, restart=restart, resume=resume)
    workers: Workers = Local(job.model, config.batch)
    if ray is not None:
        from vllm_dejavu.predictor_training.distributed import OnRay

        workers = OnRay(config, job.model, ray, ray_workers)
    fitted = collect_and_fit(job, workers)
    saved = write(job, fitted, calibrate(job, fitted), overwrite=overwrite)
    job.log.write("done", seconds=time.monotonic() - started, digest=saved.digest)
    place.close()
    return saved


def prepare(config: TrainConfig, place: RunDirectory, *, restart: bool, resume: bool) -> Job:
    """The model, the text, and whatever follows from them; takes up an interrupted run."""
    model = HfModel(config.model, config.device, MODEL_DTYPES[config.model_dtype], place.offload)
    g = model.geometry
    seq_len = min(config.seq_len or 2048, g.max_positions)
    rank = config.rank or default_rank(g.hidden_size, g.ffn_dim, artifact.DTYPES[config.dtype].itemsize)
    if rank > g.hidden_size:
        raise ValueError(f"--rank {rank} is larger than the model's hidden size {g.hidden_size}.")
    layer_bytes = collect.layer_bytes(g.hidden_size, g.ffn_dim, g.num_heads, config.lookaheads)
    passes = collect.passes(g.num_layers, layer_bytes, config.max_memory)

    key = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "device", "batch")}
    key |= {
        "fingerprint": model.spec.fingerprint,
        "seq_len": seq_len,
        "rank": rank,
        "version": vllm_dejavu.__version__,
    }
    place.open(key, restart=restart, resume=resume)
    try:
        train, valid = load_text(config, model, seq_len, place.path)
    except BaseException:
        place.discard_if_empty()
        raise
    # What was measured on other text must not be resumed: files can change under their names.
    key |= {"text": [hashlib.sha256(w.tokens.numpy().tobytes()).hexdigest() for w in (train, valid)]}
    log = report.Log(place.path / "metrics.jsonl")
    log.write("settings", **(dataclasses.asdict(config) | {"rank": rank, "passes": len(passes)}))
    log.write(
        "text",
        training_tokens=train.num_tokens,
        documents=train.documents,
        calibration_tokens=valid.num_tokens,
    )
    say(
        f"text: {train.num_tokens:,} training tokens ({train.documents} documents), {valid.num_tokens:,} for"
        f" calibration ({valid.documents})"
    )
    return Job(
        config=config,
        model=model,
        place=place,
        log=log,
        seq_len=seq_len,
        rank=rank,
        passes=passes,
        train=train,
        valid=valid,
        key=key,
    )


def collect_and_fit(job: Job, workers: Workers) -> list[FittedLayer]:
    """Every layer's predictors, pass by pass over the training text."""
    fitted: dict[int, FittedLayer] = {}
    for layers in job.passes:
        kept = job.place.load_fitted(layers, job.key)
        if kept is None:
            kept = _one_pass(job, workers, layers)
        fitted |= kept
        for i, (mlp, heads) in kept.items():
            job.log.write("fit", layer=i, explained_variance=mlp.explained, head_r2=_rounded(heads.r2))
    return [fitted[i] for i in range(len(job.model.layers))]


def _one_pass(job: Job, workers: Workers, layers: range) -> dict[int, FittedLayer]:
    config, place, begun = job.config, job.place, time.monotonic()
    store, stride = _sample_store(job, len(layers)) if config.needs_samples else (None, 1)
    activation = job.model.geometry.activation
    wanted = labels.Labels(config.neuron_label, config.energy_share, config.head_label, activation)
    request = Request(config.lookaheads, layers, wanted, stride)
    moments = workers.collect(request, job.train.tokens, place.moments, job.key, store)
    job.log.write(
        "collect",
        layers=[layers.start, layers.stop],
        tokens=moments.num_tokens,
        seconds=time.monotonic() - begun,
        sample_bytes=0 if store is None else store.num_bytes(),
    )
    settings = FitSettings(
        rank=job.rank,
        lookahead=config.lookahead,
        form=config.form,
        head_form=config.head_form,
        head_share=config.head_share,
        seed=config.seed,
        device="cpu" if config.device == "auto" else config.device,
        energy_loss=config.loss == "energy",
    )
    fitted = workers.fit(settings, moments, layers, store)
    place.save_fitted(layers, job.key, fitted)
    if store is not None:
        store.clear()
    return fitted


def _sample_store(job: Job, num_layers: int) -> tuple[samples.SampleStore, int]:
    """Where a pass over so many layers stores activations, and of every how many-th token."""
    config, g, num_tokens = job.config, job.model.geometry, job.train.num_tokens
    with_energy = forms.get(config.form).needs_samples and config.loss == "energy"
    with_heads = config.head_form == "paper"
    row_bytes = samples.row_bytes(g.hidden_size, g.ffn_dim, g.num_heads, with_energy, with_heads)
    stride = max(
        samples.stride_within(config.max_disk, num_tokens, num_layers, row_bytes),
        -(-num_tokens // config.gradient_tokens),
    )
    return samples.SampleStore(job.place.samples, g.ffn_dim, with_energy, with_heads), stride


def calibrate(job: Job, fitted: list[FittedLayer]) -> Calibrated:
    """Operating points within the perplexity budget, and what they select."""
    config, tokens = job.config, job.valid.tokens
    gates, record = Calibrator(
        job.model,
        fitted,
        tokens,
        CalibrationSettings(config.lookahead, config.max_ppl_increase, config.dtype, config.batch),
        Measurements(job.place.calibration, job.key, lambda r: job.log.write("calibrate", **r)),
    ).run()
    described = describe(job.model, gates, tokens, config.batch, config.seed)
    for (layer, block), spec in described.specs.items():
        job.log.write("gate", layer=layer, block=block, **dataclasses.asdict(spec))
    return Calibrated(gates, record, described)


def write(
    job: Job, fitted: list[FittedLayer], calibrated: Calibrated, *, overwrite: bool
) -> artifact.Artifact:
    """The artifact, its card, and the plots."""
    config, specs = job.config, calibrated.described.specs
    manifest = Manifest(
        model=job.model.spec,
        layers=tuple({b: specs[i, b] for b in BLOCKS} for i in range(len(job.model.layers))),
        training={
            "data": [Path(d).name for d in config.data],
            "tokens": job.train.num_tokens,
            "documents": job.train.documents,
            "seq_len": job.seq_len,
            "seed": config.seed,
            "rank": job.rank,
            "form": config.form,
            "head_form": config.head_form,
            "loss": config.loss,
            "neuron_label": config.neuron_label,
            "head_label": config.head_label,
            "explained_variance": [
                None if f.mlp.explained is None else round(f.mlp.explained, 4) for f in fitted
            ],
            "head_r2": [_rounded(f.heads.r2) for f in fitted],
        },
        calibration={
            "data": [Path(d).name for d in config.valid_data] or "held-out documents of the training data",
            "tokens": job.valid.num_tokens,
            "documents": job.valid.documents,
            **calibrated.record,
        },
        versions=versions(),
    )
    if not calibrated.gates:
        say(
            "warning: no gate fits the budget; the artifact keeps every block dense. Allow more with"
            " --max-ppl-increase or --rank."
        )
    tensors = {
        f"layers.{i}.{b}.{n}": t for (i, b), gate in calibrated.gates.items() for n, t in gate.tensors.items()
    }
    saved = artifact.save(config.output, manifest, tensors, overwrite=overwrite)
    report.write_card(Path(config.output) / "README.md", saved, config)
    report.plot(job.place.path / "plots", saved.manifest, calibrated.described.run.histograms)
    return saved


def _rounded(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in values.tolist()]


def load_text(
    config: TrainConfig, model: HfModel, seq_len: int, run_dir: Path
) -> tuple[data.Windows, data.Windows]:
    """Training and calibration windows."""

    def read(sources: tuple[str, ...]) -> list[list[int]]:
        texts = [t for s in sources for t in data.read_documents(s, config.field, config.max_documents)]
        return data.tokenize(texts, model.tokenizer())

    max_tokens = DOCUMENTS * seq_len if config.max_tokens is None else config.max_tokens
    if config.data == ("self",):
        wanted = max_tokens + (0 if config.valid_data else config.valid_tokens)
        documents = sampled_documents(model, wanted, seq_len, config.seed, run_dir)
    else:
        documents = read(config.data)
    if config.valid_data:
        train, valid = documents, read(config.valid_data)
    else:
        train, valid = data.split_documents(documents, config.valid_share, config.seed)
    return (
        data.pack(train, seq_len, model.bos, max_tokens=max_tokens, seed=config.seed),
        data.pack(valid, seq_len, model.bos, max_tokens=config.valid_tokens, seed=config.seed),
    )


def sampled_documents(
    model: HfModel, num_tokens: int, seq_len: int, seed: int, run_dir: Path
) -> list[list[int]]:
    """Text of the model's own, kept in the run directory."""
    from tqdm import tqdm

    path = run_dir / "sampled.json"  # `RunDirectory.open` removes it when the settings change
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="sample text") as bar:
        documents = data.sample_from_model(model.model, num_tokens, seq_len, model.bos, seed, bar)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(documents), encoding="utf-8")
    partial.replace(path)
    return documents


def versions() -> dict[str, str]:
    return {
        "vllm-dejavu": vllm_dejavu.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
        "python": ".".join(map(str, sys.version_info[:3])),
    }
