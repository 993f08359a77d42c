"""What the parts of the quality study share: a model, its artifact, its tasks, and the record of settings."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table, provenance
from quality_masks import Masks
from quality_scorers import MaskedScorer
from quality_selections import DENSE, Point, Selections
from quality_tasks import (
    Score,
    Task,
    blimp_task,
    lambada_task,
    piqa_task,
    read_jsonl,
    subsample,
    text_task,
)

from vllm_dejavu import artifact, locate
from vllm_dejavu.manifest import check_fingerprint, check_model
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.hf_model import HfModel


class Study:
    """A model, its artifact, its tasks; what several parts need is made when the first of them asks."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.opt = HfModel(args.model, device=args.device)
        self.loaded = artifact.load(locate.resolve(args.predictor, args.model))
        check_model(self.loaded.manifest, self.opt.spec)
        check_fingerprint(self.loaded.manifest, self.opt.spec.fingerprint, args.model)
        self.tokenizer = self.opt.tokenizer()
        # The engine wants room for one new token; the same windows are scored everywhere.
        self.seq_len = min(2048, self.opt.geometry.max_positions) - 1
        self.read: dict[str, list[list[int]]] = {}
        self.dense_values: dict[str, torch.Tensor] = {}
        self.dense_scores: dict[str, list[Score]] = {}

    def documents(self, path: str) -> list[list[int]]:
        if path not in self.read:
            self.read[path] = data.tokenize(data.read_documents(path), self.tokenizer)
        return self.read[path]

    def windows(self, path: str, tokens: int | None, seq_len: int | None = None) -> torch.Tensor:
        """Drawn from the whole text."""
        return data.pack(
            self.documents(path),
            seq_len or self.seq_len,
            self.opt.bos,
            max_tokens=tokens,
            seed=self.args.seed,
        ).tokens

    @functools.cached_property
    def tasks(self) -> list[Task]:
        args, rest = self.args, (self.tokenizer, self.opt.bos, self.seq_len)
        made = [
            text_task(name, self.windows(path, args.tokens))
            for name, path in (t.split("=", 1) for t in args.texts)
        ]
        if args.lambada:
            made.append(lambada_task(subsample(list(read_jsonl(args.lambada)), args.items, args.seed), *rest))
        if args.blimp:  # twice as many: they are short, and so many kinds
            made.append(
                blimp_task(
                    subsample(list(read_jsonl(args.blimp)), 2 * args.items, args.seed, lambda r: r["uid"]),
                    *rest,
                )
            )
        if args.piqa:
            made.append(piqa_task(subsample(list(read_jsonl(args.piqa)), args.items, args.seed), *rest))
        return made

    @functools.cached_property
    def selections(self) -> Selections:
        train, calibration = (
            self.windows(self.args.train, self.args.train_tokens),
            self.windows(self.args.calibration, self.args.calibration_tokens),
        )
        return Selections(self.opt, self.loaded, train, calibration, self.args.seed)

    @functools.cached_property
    def setting(self) -> str:
        """Names everything that decides a row besides its point."""
        args = self.args
        texts = hashlib.sha256(repr([(t.name, t.texts) for t in self.tasks]).encode()).hexdigest()
        fitted = [
            hashlib.sha256(self.windows(p, n).numpy().tobytes()).hexdigest()
            for p, n in ((args.train, args.train_tokens), (args.calibration, args.calibration_tokens))
        ]
        return hashlib.sha256(
            json.dumps([self.opt.spec.fingerprint, self.loaded.digest, texts, fitted, args.seed]).encode()
        ).hexdigest()[:12]

    def masked(self, point: Point) -> MaskedScorer:
        if point.mode == "dense":
            layers = self.opt.geometry.num_layers
            return MaskedScorer(self.opt, Masks({}, layers, {}))
        return MaskedScorer(self.opt, self.selections.masks(point))

    def dense(self, task: Task) -> tuple[list[Score], dict[str, torch.Tensor]]:
        """Dense scores of a task and its measures' values, computed once."""
        if task.name not in self.dense_scores:
            self.dense_scores[task.name] = scores = self.masked(DENSE).score(task.texts)
            self.dense_values |= {name: m.values(scores) for name, m in task.measures.items()}
        return self.dense_scores[task.name], self.dense_values

    def describe(self) -> dict[str, Any]:
        args, s = self.args, self.selections
        return {
            "model": shown(args.model),
            "fingerprint": self.opt.spec.fingerprint,
            "artifact": shown(str(locate.resolve(args.predictor, args.model))),
            "artifact_digest": self.loaded.digest,
            "seq_len": self.seq_len,
            "seed": args.seed,
            "dtype": "float32",
            "tasks": {
                t.name: {"texts": len(t.texts), "tokens": t.num_tokens, "groups": len(set(t.strata))}
                for t in self.tasks
            },
            "train": Path(args.train).name,
            "train_tokens": s.moments.num_tokens,
            "calibration": Path(args.calibration).name,
            "calibration_tokens": s.calibration_tokens,
            "fitted_predictors": [f"{layer}.{block}" for layer, block in s.fitted],
            "lookahead_of_fitted": s.lookahead,
        }


def shown(argument: str) -> str:
    """An argument as a reader of the repository may know it: paths of this machine by their last name."""
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return name + equals + value


def record(study: Study, part: str) -> None:
    """Note the command line and the settings of a part, beside its CSV file."""
    path = study.output / "quality_settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    command = " ".join(
        ["python", "benchmarks/studies/quality.py", *(shlex.quote(shown(a)) for a in sys.argv[1:])]
    )
    found[part] = {"command": command, "setting": study.setting, **study.describe(), **provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fresh(study: Study, name: str) -> Table:
    return Table(study.output / f"{name}.csv")
