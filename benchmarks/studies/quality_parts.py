"""The parts of the quality study, each of which writes a CSV file."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Table, read_rows, write_rows
from quality_scorers import EngineScorer
from quality_selections import DENSE, Point
from quality_study import Study, fresh
from quality_tasks import OWN, PASSAGE, TEMPERATURE, Task, Text, distinct, mean_se, statistics

from vllm_dejavu import metrics
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.predictor_training import evaluate

# The engine's names of the modes.
SERVED = {"predictor": "sparse", "oracle": "oracle", "random": "random", "static": "static"}
# Edges of position buckets, in tokens in front of the scored one.
POSITIONS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)


def part_card(study: Study) -> None:
    """What the model is, before anything is said about sparsity."""
    table, moments = fresh(study, "quality_card"), study.selections.moments
    table.add(kind="training", name="training tokens", value=study.args.training_tokens)
    for layer in study.selections.layers:
        active = moments.layer(layer)["active"]
        table.add(
            kind="dead neurons",
            name=f"layer {layer}",
            value=int((active == 0).sum()),
            items=len(active),
            tokens=moments.num_tokens,
            active_density=float(active.mean()) / moments.num_tokens,
        )
    for task in study.tasks:
        _, values = study.dense(task)
        for name, measure in task.measures.items():
            value, se = mean_se(values[name], task.strata)
            row = {
                "kind": measure.metric,
                "name": name,
                "value": value,
                "se": se,
                "chance": measure.chance,
                "items": len(values[name]),
                "tokens": task.num_tokens,
            }
            if measure.metric == "nll":
                row |= {"kind": "perplexity", "value": math.exp(value), "se": math.exp(value) * se}
            table.add(**row)


def points(args: argparse.Namespace) -> list[Point]:
    """Dense first, then the artifact's own point, then densities, each in every mode."""
    own = [Point("predictor", blocks, OWN) for blocks in args.blocks if "predictor" in args.modes]
    return [
        DENSE,
        *own,
        *(
            Point(mode, blocks, f"{d:g}")
            for d in args.densities
            for blocks in args.blocks
            for mode in args.modes
        ),
    ]


def part_sweep(study: Study) -> None:
    """Every point on every task; points that the CSV file already has are left as they are."""
    path, uid_path = study.output / "quality_sweep.csv", study.output / "quality_blimp.csv"
    rows = read_rows(path.name, path.parent) if path.is_file() else []
    if others := {r["setting"] for r in rows} - {study.setting}:
        raise ValueError(
            f"{path} holds points of other settings ({', '.join(sorted(others))}, now {study.setting}): name"
            f" another --output, or remove it and {uid_path.name}."
        )
    table = Table(path, rows)
    done = {tuple(r[k] for k in ("mode", "blocks", "density", "task")) for r in rows}
    uids = [
        r
        for r in (read_rows(uid_path.name, path.parent) if uid_path.is_file() else [])
        if (r["mode"], r["blocks"], r["density"], "blimp") in done
    ]
    for point in points(study.args):
        scorer = None
        for task in study.tasks:
            if all((*point.keys.values(), name) in done for name in task.measures):
                continue
            start = time.perf_counter()
            dense, dense_values = study.dense(task)
            scorer = scorer or study.masked(point)
            scores = dense if point == DENSE else scorer.score(task.texts)
            densities = study.selections.densities(point, scorer.masks.read_out())
            seconds = time.perf_counter() - start
            for name, measure in task.measures.items():
                if (*point.keys.values(), name) in done:
                    continue
                values = measure.values(scores)
                if task.strata:
                    uids += blimp_rows(point, task, values, dense_values[name], study.setting)
                    write_rows(uid_path, uids)
                table.add(
                    **point.keys,
                    task=name,
                    metric=measure.metric,
                    **statistics(measure, values, dense_values[name], task.strata),
                    chance=measure.chance,
                    **densities,
                    tokens=task.num_tokens,
                    seconds=round(seconds, 2),
                    setting=study.setting,
                )
            print(
                f"sweep: {point.mode}, {point.blocks}, density {point.density}: {task.name}, {seconds:.1f} s",
                flush=True,
            )


def blimp_rows(
    point: Point, task: Task, values: torch.Tensor, dense: torch.Tensor, setting: str
) -> Iterator[dict[str, Any]]:
    """A row a uid; provenance is in the sweep's row of the same point and setting."""
    for uid in dict.fromkeys(task.strata):
        mine = torch.tensor([s == uid for s in task.strata])
        accuracy, se = mean_se(values[mine])
        difference, difference_se = mean_se((values - dense)[mine])
        yield {
            **point.keys,
            "uid": uid,
            "field": task.fields[uid],
            "items": int(mine.sum()),
            "value": accuracy,
            "value_se": se,
            "difference": difference,
            "difference_se": difference_se,
            "setting": setting,
        }


def part_context(study: Study) -> None:
    """In-context learning: what a second look at the same passage gains, and loss by position."""
    table, args = ContextTable(fresh(study, "quality_context")), study.args
    path = args.texts[0].split("=", 1)[1]
    length = min(PASSAGE, (study.seq_len - 1) // 2)
    passages = study.windows(path, args.passages * (length + 1), length + 1)
    twice = [Text((*row, *row[1:])) for row in passages.tolist()]
    long = [Text(tuple(row)) for row in study.windows(path, args.tokens).tolist()]
    own = [Point(mode, "both", OWN) for mode in ("predictor", "oracle", "random")]
    heads = [Point(mode, "attention", "0.5") for mode in ("predictor", "oracle", "random")]
    for point in (DENSE, *own, *heads):
        scorer = study.masked(point)
        scores = scorer.score(twice)
        densities = study.selections.densities(point, scorer.masks.read_out())
        # The first token of each occurrence follows something else than in the other, so it says nothing.
        first, second = (
            torch.stack([s.nll[a : a + length - 1] for s in scores]).mean(1) for a in (1, length + 1)
        )
        right = torch.stack([s.correct[length + 1 :].double().mean() for s in scores])
        for name, values in (
            ("first occurrence", first),
            ("second occurrence", second),
            ("second - first", second - first),
            ("second occurrence, accuracy", right),
        ):
            row = {"kind": "repeat", "name": name, "tokens": len(twice) * (2 * length + 1)}
            table.add(point, row, values, densities)
        if point in heads:
            continue
        nll = torch.stack([s.nll for s in scorer.score(long)])
        densities = study.selections.densities(point, scorer.masks.read_out())
        for low, high in zip(POSITIONS, POSITIONS[1:], strict=False):
            if low <= nll.shape[1]:
                name = f"{low}-{min(high - 1, nll.shape[1])}"
                row = {"kind": "position", "name": name, "tokens": nll.numel()}
                table.add(point, row, nll[:, low - 1 : high - 1].mean(1), densities)
        print(f"context: {point.mode}, {point.blocks}, density {point.density} done", flush=True)


class ContextTable:
    """Rows of a point beside dense, whose values come first.

    Attributes:
        dense: name of a row -> its values when dense.
    """

    def __init__(self, table: Table):
        self.table = table
        self.dense: dict[str, torch.Tensor] = {}

    def add(
        self, point: Point, row: dict[str, Any], values: torch.Tensor, densities: dict[str, float]
    ) -> None:
        """row: kind, name, and the tokens that were scored. values: an item each."""
        if point == DENSE:
            self.dense[row["name"]] = values
        value, value_se = mean_se(values)
        difference, difference_se = mean_se(values - self.dense[row["name"]])
        self.table.add(
            **point.keys,
            kind=row["kind"],
            name=row["name"],
            items=len(values),
            tokens=row["tokens"],
            value=value,
            value_se=value_se,
            difference=difference,
            difference_se=difference_se,
            **densities,
        )


@contextmanager
def engine(study: Study, dtype: str, **settings: Any) -> Iterator[Any]:
    """As `vllm-dejavu evaluate` has it."""
    config = evaluate.EvaluateConfig(model=study.args.model, data=(), dtype=dtype, seed=study.args.seed)
    with evaluate._engine(config, predictor=study.args.predictor, seed=study.args.seed, **settings) as llm:
        yield llm


def part_generation(study: Study) -> None:
    """Continuations through the decode path, dense and sparse as served: a row a prompt."""
    table, args = fresh(study, "quality_generation"), study.args
    windows = study.windows(args.texts[0].split("=", 1)[1], None)
    settings = evaluate.EvaluateConfig(
        model=args.model, data=(), prompts=args.prompts, new_tokens=args.new_tokens, seed=args.seed
    )
    prompts = evaluate._prompts(windows, settings, study.seq_len)
    # In another dtype the dense model itself goes astray: how much of a divergence is rounding.
    runs = [("dense", args.engine_dtype), ("sparse", args.engine_dtype), ("dense", "float32")]
    first: dict[str, list[list[int]]] = {}
    baseline = ""
    scorer = study.masked(DENSE)
    for mode, dtype in runs:
        with engine(study, dtype, mode=mode) as llm:
            resolved = str(llm.model_config.dtype).removeprefix("torch.")
            if (mode, resolved) == ("dense", baseline):
                continue  # the same run again
            texts = {
                "greedy": evaluate._continue(llm, prompts, args.new_tokens, f"greedy, {mode} {resolved}"),
                "sampled": _sample(llm, prompts, args.new_tokens, args.seed),
            }
            served = metrics.summarize(llm.collective_rpc("dejavu_metrics"))
        if not first:
            first, baseline = texts, resolved
        for decoding, continuations in texts.items():
            scores = scorer.score(
                [Text((*p, *c), len(p)) for p, c in zip(prompts, continuations, strict=True)]
            )
            for i, (continuation, score) in enumerate(zip(continuations, scores, strict=True)):
                table.add(
                    decoding=decoding,
                    mode=mode,
                    dtype=resolved,
                    temperature=0.0 if decoding == "greedy" else TEMPERATURE,
                    prompt=i,
                    prompt_tokens=len(prompts[i]),
                    new_tokens=len(continuation),
                    batch=evaluate.BATCH,
                    agreement=evaluate._leading(first[decoding][i], continuation),
                    **{f"distinct_{n}": distinct(continuation, n) for n in (1, 2, 3)},
                    rep_4=1 - distinct(continuation, 4),
                    nll=float(score.nll.mean()),
                    mlp_density=served["mlp_density"],
                    head_density=served["head_density"],
                    sparse_step_share=served["sparse_step_share"],
                )


def _sample(llm: Any, prompts: list[list[int]], new_tokens: int, seed: int) -> list[list[int]]:
    """Seeded continuations at TEMPERATURE, in the same batches as greedy ones; a seed a prompt, so that two
    engines draw alike.
    """
    from vllm import SamplingParams

    out = []
    for start in range(0, len(prompts), evaluate.BATCH):
        part = prompts[start : start + evaluate.BATCH]
        params = [
            SamplingParams(
                max_tokens=new_tokens,
                temperature=TEMPERATURE,
                seed=seed + start + i,
                ignore_eos=True,
                detokenize=False,
            )
            for i in range(len(part))
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in part], params, use_tqdm=False)
        out += [list(o.outputs[0].token_ids) for o in outputs]
    return out


def part_engine(study: Study) -> None:
    """The tasks through the shipped path at the artifact's own point, beside the same selection by masks."""
    table, dtype = fresh(study, "quality_engine"), study.args.score_dtype
    dense: dict[str, torch.Tensor] = {}
    for mode in ("dense", *SERVED):
        point = DENSE if mode == "dense" else Point(mode, "both", OWN)
        settings = {} if mode == "dense" else {"apply_to": "all", "measure": True, "blocks": list(BLOCKS)}
        masked = study.masked(point)
        with engine(study, dtype, mode=SERVED.get(mode, mode), **settings) as llm:
            for task in study.tasks:
                llm.collective_rpc("dejavu_reset_metrics")
                scores = EngineScorer(llm).score(task.texts)
                served = (
                    study.selections.densities(
                        point, metrics.summarize(llm.collective_rpc("dejavu_metrics"))["layers"]
                    )
                    if mode != "dense"
                    else None
                )
                beside = study.dense(task)[0] if mode == "dense" else masked.score(task.texts)
                simulated = study.selections.densities(point, masked.masks.read_out())
                served = served or simulated
                apart = (torch.cat([s.nll for s in scores]) - torch.cat([s.nll for s in beside])).abs()
                for name, measure in task.measures.items():
                    values, others = measure.values(scores), measure.values(beside)
                    dense.setdefault(name, values)
                    against, against_se = mean_se(values - others, task.strata)
                    table.add(
                        mode=mode,
                        task=name,
                        metric=measure.metric,
                        dtype=dtype,
                        **statistics(measure, values, dense[name], task.strata),
                        masked_value=float(others.mean()),
                        engine_minus_masked=against,
                        engine_minus_masked_se=against_se,
                        items_that_differ=(
                            int((values != others).sum()) if measure.metric == "accuracy" else None
                        ),
                        token_nll_apart_mean=float(apart.mean()),
                        token_nll_apart_max=float(apart.max()),
                        **served,
                        **{f"masked_{k}": v for k, v in simulated.items()},
                        tokens=task.num_tokens,
                    )
                print(f"engine: {mode}, {task.name} done", flush=True)
