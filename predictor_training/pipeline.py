"""collect -> fit -> calibrate -> artifact, in one resumable, reproducible run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vllm_dejavu
from vllm_dejavu import artifact
from vllm_dejavu.config import LOOKAHEADS
from vllm_dejavu.manifest import Manifest
from vllm_dejavu.predictor_training import collect, data, forms, labels, report, samples
from vllm_dejavu.predictor_training.calibrate import Calibrator, describe
from vllm_dejavu.predictor_training.collect import Collector, Moments, Request
from vllm_dejavu.predictor_training.forms import FittedMlp
from vllm_dejavu.predictor_training.hf_opt import OptModel
from vllm_dejavu.predictor_training.train import FitSettings, FittedHeads, LayerWeights, fit_layer

# Share of the MLP's bytes that its predictor may take where no rank is named and the hidden size is at least
# LARGE_HIDDEN.
BYTE_BUDGET = 0.03
LARGE_HIDDEN = 2048
# The paper's recipe: 500 documents of up to 2,048 tokens.
DOCUMENTS = 500
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_FORMS = ("closed_form", "paper")
LOSSES = ("bce", "energy")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the artifact.

    Attributes:
        data: files or dataset ids, or ["self"]: text sampled from the model. valid_data: separate held-out
            text, or a share `valid_share` of the documents of `data` is held out.
        max_tokens: training tokens; None takes the paper's 500 sequences of the model's context.
            valid_tokens: for calibration.
        rank: of the MLP predictors; None takes 3% of the MLP's bytes, for hidden sizes below 2048 a quarter
            of the hidden size.
        form: of the MLP predictors (`forms.FORMS` or module:attribute); gradient_tokens: at most, that forms
            which train by gradient see, drawn evenly; head_form: `closed_form`, or `paper`: trained by
            gradient on the paper's labels, the top `head_share` by norm. loss: `energy` weighs a missed
            neuron by what it would have added.
        neuron_label, energy_share, head_label: `labels.Labels`.
        max_ppl_increase: perplexity budget of the calibration.
        max_memory, max_disk: bytes, of the moments and of stored activations; less memory means more passes
            over the text, less disk fewer of the tokens.
        device: one, or "auto" to spread the model by accelerate. model_dtype: that the model computes in.
    """

    model: str
    data: tuple[str, ...]
    output: str
    valid_data: tuple[str, ...] = ()
    field: str = "text"
    valid_share: float = 0.1
    max_documents: int | None = None
    max_tokens: int | None = None
    valid_tokens: int = 32_768
    seq_len: int | None = None
    rank: int | None = None
    form: str = "finetuned"
    gradient_tokens: int = 32_768
    head_form: str = "closed_form"
    head_share: float = 0.3
    loss: str = "energy"
    neuron_label: str = "positive"
    energy_share: float = 0.99
    head_label: str = "contribution"
    mlp_lookahead: str = "self"
    head_lookahead: str = "previous"
    dtype: str = "int8"
    max_ppl_increase: float = 0.01
    max_memory: int | None = None
    max_disk: int | None = None
    batch: int = 4
    seed: int = 0
    device: str = "cpu"
    model_dtype: str = "float32"

    def __post_init__(self) -> None:
        def or_low(value: int | None, low: int) -> int:
            return low if value is None else value

        for name, value, low, high in (
            ("valid_share", self.valid_share, 0.001, 0.9),
            ("max_tokens", or_low(self.max_tokens, 1), 1, 10**12),
            ("valid_tokens", self.valid_tokens, 1, 10**10),
            ("batch", self.batch, 1, 10**6),
            ("seed", self.seed, 0, 2**31 - 1),
            ("max_ppl_increase", self.max_ppl_increase, 0, 10),
            ("rank", or_low(self.rank, 1), 1, 10**6),
            ("seq_len", or_low(self.seq_len, 2), 2, 10**6),
            ("max_documents", or_low(self.max_documents, 1), 1, 10**12),
            ("energy_share", self.energy_share, 0.01, 1),
            ("head_share", self.head_share, 0.01, 1),
            ("gradient_tokens", self.gradient_tokens, 1, 10**12),
            ("max_memory", or_low(self.max_memory, 1), 1, 10**15),
            ("max_disk", or_low(self.max_disk, 1), 1, 10**15),
        ):
            if not low <= value <= high:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} is out of range: expected {low} to {high}."
                )
        if not self.output.strip():
            raise ValueError("--output is empty: name a directory.")
        for name, value, allowed in (
            ("mlp_lookahead", self.mlp_lookahead, LOOKAHEADS["mlp"]),
            ("head_lookahead", self.head_lookahead, LOOKAHEADS["attention"]),
            ("dtype", self.dtype, sorted(artifact.DTYPES)),
            ("model_dtype", self.model_dtype, sorted(MODEL_DTYPES)),
            ("head_form", self.head_form, HEAD_FORMS),
            ("loss", self.loss, LOSSES),
            ("neuron_label", self.neuron_label, labels.NEURON_LABELS),
            ("head_label", self.head_label, labels.HEAD_LABELS),
        ):
            if value not in allowed:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value!r} is unknown: expected one of {list(allowed)}."
                )
        if forms.get(self.form).own_input and self.mlp_lookahead != "self":
            raise ValueError(
                f"--form {self.form} is for --mlp-lookahead self only, found {self.mlp_lookahead!r}."
            )

    @property
    def lookahead(self) -> dict[str, str]:
        return {"mlp": self.mlp_lookahead, "attention": self.head_lookahead}

    @property
    def needs_samples(self) -> bool:
        return forms.get(self.form).needs_samples or self.head_form == "paper"


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
    ) -> dict[int, tuple[FittedMlp, FittedHeads]]:
        """The predictors of these layers."""


class Local:
    """Collects and fits in this process."""

    def __init__(self, opt: OptModel, batch: int):
        self.opt, self.batch = opt, batch

    def collect(
        self,
        request: Request,
        tokens: torch.Tensor,
        checkpoint: Path,
        key: dict[str, Any],
        store: samples.SampleStore | None,
    ) -> Moments:
        collector = Collector(self.opt, request, checkpoint, key, store)
        if store is not None:
            collector.resume()
            store.discard_from(collector.windows)
        return collector.run(tokens, self.batch)

    def fit(
        self, settings: FitSettings, moments: Moments, layers: range, store: samples.SampleStore | None
    ) -> dict[int, tuple[FittedMlp, FittedHeads]]:
        from tqdm import tqdm

        return {
            i: fit_layer(settings, moments, i, LayerWeights.of(self.opt, i), store)
            for i in tqdm(layers, desc="fit", unit="layer")
        }


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
    opt = OptModel(config.model, config.device, MODEL_DTYPES[config.model_dtype], place.path / "offload")
    seq_len = min(config.seq_len or 2048, opt.config.max_position_embeddings)
    rank = config.rank or default_rank(
        opt.config.hidden_size, opt.config.ffn_dim, artifact.DTYPES[config.dtype].itemsize
    )
    if rank > opt.config.hidden_size:
        raise ValueError(f"--rank {rank} is larger than the model's hidden size {opt.config.hidden_size}.")
    heads, ffn, hidden = opt.config.num_attention_heads, opt.config.ffn_dim, opt.config.hidden_size
    lookaheads = {block: (lookahead,) for block, lookahead in config.lookahead.items()}
    groups = collect.passes(
        len(opt.layers), collect.layer_bytes(hidden, ffn, heads, lookaheads), config.max_memory
    )

    key = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output", "device", "batch")}
    key |= {
        "fingerprint": opt.spec.fingerprint,
        "seq_len": seq_len,
        "rank": rank,
        "version": vllm_dejavu.__version__,
    }
    place.open(key, restart=restart, resume=resume)
    try:
        train, valid = load_text(config, opt, seq_len, place.path)
    except BaseException:
        place.discard_if_empty()
        raise
    # What was measured on other text must not be resumed: files can change under their names.
    key |= {"text": [hashlib.sha256(w.tokens.numpy().tobytes()).hexdigest() for w in (train, valid)]}
    log = report.Log(place.path / "metrics.jsonl")
    log.write("settings", **(dataclasses.asdict(config) | {"rank": rank, "passes": len(groups)}))
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

    workers: Workers = Local(opt, config.batch)
    if ray is not None:
        from vllm_dejavu.predictor_training.distributed import OnRay

        workers = OnRay(config, opt, ray, ray_workers)
    form = forms.get(config.form)
    settings = FitSettings(
        rank=rank,
        lookahead=config.lookahead,
        form=config.form,
        head_form=config.head_form,
        head_share=config.head_share,
        seed=config.seed,
        device="cpu" if config.device == "auto" else config.device,
        energy_loss=config.loss == "energy",
    )
    wanted = labels.Labels(config.neuron_label, config.energy_share, config.head_label)
    with_energy = form.needs_samples and config.loss == "energy"
    with_heads = config.head_form == "paper"
    row_bytes = samples.row_bytes(hidden, ffn, heads, with_energy, with_heads)
    fitted: dict[int, tuple[FittedMlp, FittedHeads]] = {}
    for layers in groups:
        kept = place.load_fitted(layers, key)
        if kept is None:
            begun = time.monotonic()
            store, stride = None, 1
            if config.needs_samples:
                store = samples.SampleStore(place.path / "samples", ffn, with_energy, with_heads)
                stride = samples.stride_within(config.max_disk, train.num_tokens, len(layers), row_bytes)
                stride = max(stride, -(-train.num_tokens // config.gradient_tokens))
            request = Request(lookaheads, layers, wanted, stride)
            moments = workers.collect(request, train.tokens, place.moments, key, store)
            log.write(
                "collect",
                layers=[layers.start, layers.stop],
                tokens=moments.num_tokens,
                seconds=time.monotonic() - begun,
                sample_bytes=0 if store is None else store.num_bytes(),
            )
            kept = workers.fit(settings, moments, layers, store)
            place.save_fitted(layers, key, kept)
            if store is not None:
                store.clear()
        fitted |= kept
        for i, (mlp_fit, head_fit) in kept.items():
            log.write("fit", layer=i, explained_variance=mlp_fit.explained, head_r2=_rounded(head_fit.r2))
    mlp, head_fits = (
        [fitted[i][0] for i in range(len(opt.layers))],
        [fitted[i][1] for i in range(len(opt.layers))],
    )

    gates, record = Calibrator(
        opt,
        mlp,
        head_fits,
        config.lookahead,
        valid.tokens,
        budget=config.max_ppl_increase,
        dtype=config.dtype,
        batch=config.batch,
        state=place.path / "calibration.json",
        key=key,
        log=lambda r: log.write("calibrate", **r),
    ).run()
    specs, described = describe(opt, gates, valid.tokens, config.dtype, config.batch, config.seed)
    for (layer, block), spec in specs.items():
        log.write("gate", layer=layer, block=block, **dataclasses.asdict(spec))
    manifest = Manifest(
        model=opt.spec,
        layers=tuple({b: specs[i, b] for b in ("mlp", "attention")} for i in range(len(opt.layers))),
        training={
            "data": [Path(d).name for d in config.data],
            "tokens": train.num_tokens,
            "documents": train.documents,
            "seq_len": seq_len,
            "seed": config.seed,
            "rank": rank,
            "form": config.form,
            "head_form": config.head_form,
            "loss": config.loss,
            "neuron_label": config.neuron_label,
            "head_label": config.head_label,
            "explained_variance": [None if f.explained is None else round(f.explained, 4) for f in mlp],
            "head_r2": [_rounded(f.r2) for f in head_fits],
        },
        calibration={
            "data": [Path(d).name for d in config.valid_data] or "held-out documents of the training data",
            "tokens": valid.num_tokens,
            "documents": valid.documents,
            **record,
        },
        versions=versions(),
    )
    if not gates:
        say(
            "warning: no gate fits the budget; the artifact keeps every block dense. Allow more with"
            " --max-ppl-increase or --rank."
        )
    tensors = {f"layers.{i}.{b}.{n}": t for (i, b), gate in gates.items() for n, t in gate.tensors.items()}
    saved = artifact.save(config.output, manifest, tensors, overwrite=overwrite)
    report.write_card(Path(config.output) / "README.md", saved, config)
    report.plot(place.path / "plots", saved.manifest, described.histograms)
    log.write("done", seconds=time.monotonic() - started, digest=saved.digest)
    place.close()
    return saved


def _rounded(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in values.tolist()]


class RunDirectory:
    """What a run keeps while it is under way: state to resume from, metrics, plots."""

    KEPT = ("metrics.jsonl", "plots")

    def __init__(self, path: Path):
        self.path, self.moments, self._settings = path, path / "moments.safetensors", path / "settings.json"

    def open(self, key: dict[str, Any], *, restart: bool, resume: bool) -> None:
        """Make the directory, or take up an interrupted run in it.

        Raises:
            ValueError: with `resume`, nothing was interrupted here, or under other settings.
        """
        found = json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.is_file() else None
        current = json.loads(json.dumps(key))
        if resume and found is None:
            raise ValueError(
                f"--resume: {self.path} holds no interrupted run. Leave the flag out to begin one."
            )
        if resume and found != current:
            differing = sorted(k for k in {*found, *current} if found.get(k) != current.get(k))
            raise ValueError(
                f"--resume: the interrupted run in {self.path} has other settings ({', '.join(differing)})."
                " Repeat its command, or pass --restart."
            )
        if restart or found != current:
            self._clear()
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._settings.write_text(json.dumps(key), encoding="utf-8")

    def discard_if_empty(self) -> None:
        """Leave nothing behind when no work was done yet."""
        if not any(p.name not in ("settings.json", "offload", *self.KEPT) for p in self.path.iterdir()):
            self.close()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def close(self) -> None:
        """Remove what only serves resuming."""
        self._clear()
        shutil.rmtree(self.path / "offload", ignore_errors=True)

    def _clear(self) -> None:
        # By name: the directory may be the user's own, with other things in it. Not `offload`, which the
        # model may be using.
        for pattern in ("moments.*", "fitted-*", "calibration.*", "sampled.*", "settings.json"):
            for path in self.path.glob(pattern):
                path.unlink()
        samples.SampleStore(self.path / "samples", 0, False, False).clear()

    def _fitted(self, layers: range) -> Path:
        return self.path / f"fitted-{layers.start}-{layers.stop}.safetensors"

    def save_fitted(
        self, layers: range, key: dict[str, Any], fitted: dict[int, tuple[FittedMlp, FittedHeads]]
    ) -> None:
        """The predictors of a pass; its moments are no longer needed."""
        tensors, explained = {}, {}
        for i, (mlp, heads) in fitted.items():
            tensors |= {f"{i}.mlp.{k}": getattr(mlp, k) for k in ("down", "up", "bias", "activation_rate")}
            tensors |= {f"{i}.heads.{k}": getattr(heads, k) for k in ("weight", "bias", "r2")}
            explained[i] = mlp.explained
        metadata = {"key": json.dumps(key, sort_keys=True), "explained": json.dumps(explained)}
        partial = self._fitted(layers).with_suffix(".partial")
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata=metadata)
        partial.replace(self._fitted(layers))
        self.moments.unlink(missing_ok=True)

    def load_fitted(
        self, layers: range, key: dict[str, Any]
    ) -> dict[int, tuple[FittedMlp, FittedHeads]] | None:
        path = self._fitted(layers)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        if metadata["key"] != json.dumps(key, sort_keys=True):
            return None
        tensors, explained = load_file(path), json.loads(metadata["explained"])

        def part(i: int, name: str) -> dict[str, torch.Tensor]:
            prefix = f"{i}.{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return {
            i: (FittedMlp(**part(i, "mlp"), explained=explained[str(i)]), FittedHeads(**part(i, "heads")))
            for i in layers
        }


def load_text(
    config: TrainConfig, opt: OptModel, seq_len: int, run_dir: Path
) -> tuple[data.Windows, data.Windows]:
    """Training and calibration windows."""
    max_tokens = DOCUMENTS * seq_len if config.max_tokens is None else config.max_tokens
    if config.data == ("self",):
        documents = sampled_documents(
            opt, max_tokens + (0 if config.valid_data else config.valid_tokens), seq_len, config.seed, run_dir
        )
    else:
        tokenizer = opt.tokenizer()
        texts = [
            t
            for source in config.data
            for t in data.read_documents(source, config.field, config.max_documents)
        ]
        documents = data.tokenize(texts, tokenizer)
    if config.valid_data:
        texts = [
            t
            for source in config.valid_data
            for t in data.read_documents(source, config.field, config.max_documents)
        ]
        train, valid = documents, data.tokenize(texts, opt.tokenizer())
    else:
        train, valid = data.split_documents(documents, config.valid_share, config.seed)
    return (
        data.pack(train, seq_len, opt.bos, max_tokens=max_tokens, seed=config.seed),
        data.pack(valid, seq_len, opt.bos, max_tokens=config.valid_tokens, seed=config.seed),
    )


def sampled_documents(
    opt: OptModel, num_tokens: int, seq_len: int, seed: int, run_dir: Path
) -> list[list[int]]:
    """Text of the model's own, kept in the run directory."""
    from tqdm import tqdm

    path = run_dir / "sampled.json"  # `RunDirectory.open` removes it when the settings change
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="sample text") as bar:
        documents = data.sample_from_model(opt.model, num_tokens, seq_len, opt.bos, seed, bar)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(documents), encoding="utf-8")
    partial.replace(path)
    return documents


def default_rank(hidden: int, ffn: int, itemsize: int) -> int:
    """Rank of an MLP predictor whose weights take `itemsize` bytes each: BYTE_BUDGET of an MLP in 16 bits, a
    multiple of 16 (wide loads).

    Below LARGE_HIDDEN so small a rank would miss too much: a quarter of the hidden size, whatever it costs.
    """
    rank = (
        hidden // 4
        if hidden < LARGE_HIDDEN
        else BYTE_BUDGET * 2 * hidden * ffn * 2 / ((hidden + ffn) * itemsize)
    )
    return min(max(16, int(rank) // 16 * 16), hidden)


def versions() -> dict[str, str]:
    return {
        "vllm-dejavu": vllm_dejavu.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
