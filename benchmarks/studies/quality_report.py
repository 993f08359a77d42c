"""quality.md out of the CSV files of quality.py."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import number, read_rows
from quality_plots import plot
from quality_tasks import BLOCK_SETS, MODES, NAMES, OWN, PASSAGE, TEMPERATURE, mean_se

from vllm_dejavu.markdown import table


def plus_minus(row: dict[str, str], key: str, scale: float = 1.0, digits: int = 2, sign: bool = True) -> str:
    value, se = number(row, key), number(row, f"{key}_se")
    if value is None or math.isnan(value):
        return "-"
    if abs(scale * value) >= 1e4:
        return f"{scale * value:{'+' if sign else ''}.1e}"
    spread = "" if se is None or math.isnan(se) else f" ± {scale * se:.{digits}f}"
    return f"{scale * value:{'+' if sign else ''}.{digits}f}{spread}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """With the empty line that ends it."""
    return [*table(header, lines), ""]


def density_order(density: str) -> float:
    return 2.0 if density == OWN else float(density)


def report_card(rows: list[dict[str, str]]) -> list[str]:
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    out = ["## The model", ""]
    out += [f"Trained on: {by_kind['training'][0]['value']} tokens.", ""]
    dead = by_kind["dead neurons"]
    out += [
        (
            f"Neurons that never fired on {int(dead[0]['tokens']):,} tokens of the training text, and the"
            " mean share that did:"
        ),
        "",
    ]
    out += markdown(
        ["layer", "dead", "of", "share dead", "mean density"],
        [
            [
                r["name"].removeprefix("layer "),
                r["value"],
                r["items"],
                f"{int(r['value']) / int(r['items']):.3f}",
                f"{float(r['active_density']):.4f}",
            ]
            for r in dead
        ],
    )
    out += markdown(
        ["dense", "value", "chance", "items", "tokens"],
        [
            [
                f"{r['name']}, {r['kind']}",
                (
                    f"{float(r['value']):.2f} ± {float(r['se']):.2f}"
                    if r["kind"] == "perplexity"
                    else f"{float(r['value']):.3f} ± {float(r['se']):.3f}"
                ),
                r["chance"] or "-",
                r["items"],
                f"{int(r['tokens']):,}",
            ]
            for kind in ("perplexity", "accuracy")
            for r in by_kind[kind]
        ],
    )
    near = [
        r["name"]
        for r in by_kind["accuracy"]
        if float(r["value"]) - float(r["chance"] or 0) <= 2 * float(r["se"])
    ]
    if near:
        out += [
            (
                "Within two standard errors of chance (or of 0, where there is none) already when dense, so"
                f" that nothing can be seen to be lost there: {', '.join(near)}."
            ),
            "",
        ]
    return out


def report_sweep(rows: list[dict[str, str]], uids: list[dict[str, str]]) -> list[str]:
    tasks = list(dict.fromkeys((r["task"], r["metric"]) for r in rows))
    groups: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        groups[row["blocks"], row["density"], row["mode"]][row["task"]] = row
    apart: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for r in uids:
        difference, se = number(r, "difference"), number(r, "difference_se")
        apart[r["blocks"], r["density"], r["mode"]].append(
            0.0 if not se or not difference else difference / se
        )
    out = [
        "## Quality against sparsity",
        "",
        (
            "Selection is even over layers at each density; `artifact` is the artifact's own calibrated point"
            " (layer by layer, dense where it says so). Perplexities: rise in %; accuracies: difference in"
            " points; all paired with dense, ± one standard error over windows or items. Densities and"
            " sparsity as counted on the first text; `total sparsity`: share of the decoder layers' weight"
            " bytes not read for a token at batch 1, predictors' own bytes included, K and V projections"
            " always read, fc2 read only for selected neurons that came out positive. `uids`: BLiMP's"
            " phenomena that are worse / better than dense by more than two of their standard errors; by"
            " chance alone about 1 in 40 each."
        ),
        "",
    ]
    for blocks in BLOCK_SETS:
        lines = []
        for key in sorted(
            (k for k in groups if k[0] == blocks and k[2] != "dense"),
            key=lambda k: (-density_order(k[1]), MODES.index(k[2])),
        ):
            found = groups[key]
            first = next(iter(found.values()))
            cells = [
                key[1],
                key[2],
                f"{float(first['total_sparsity']):.3f}",
                f"{float(first['mlp_density']):.3f}",
                f"{float(first['head_density']):.3f}",
            ]
            for task, metric in tasks:
                row = found.get(task, {})
                cells.append(
                    plus_minus(row, "ppl_increase", 100)
                    if metric == "nll"
                    else plus_minus(row, "difference", 100, 1)
                )
            z = apart.get(key)
            cells.append(f"{sum(v < -2 for v in z)} / {sum(v > 2 for v in z)}" if z else "-")
            lines.append(cells)
        if lines:
            out += [f"### {NAMES[blocks]}", ""]
            out += markdown(
                [
                    "density",
                    "mode",
                    "total sparsity",
                    "MLP density",
                    "head density",
                    *(f"{t}, {'ppl %' if m == 'nll' else 'points'}" for t, m in tasks),
                    "uids",
                ],
                lines,
            )
    return out + report_reach(groups) + report_fields(uids)


def report_reach(groups: dict[tuple[str, str, str], dict[str, dict[str, str]]]) -> list[str]:
    """How far each mode goes: the sparsest measured point that still keeps a bound."""
    bounds = {
        f"perplexity of every text + {100 * b:g}%": functools.partial(_rises_less, bound=b)
        for b in (0.01, 0.05, 0.2)
    }
    bounds["no accuracy down by two errors"] = lambda rows: all(
        float(r["difference"]) >= -2 * float(r["difference_se"]) for r in rows if r["metric"] == "accuracy"
    )
    lines = []
    for blocks in BLOCK_SETS:
        for mode in MODES:
            cells = []
            for keeps in bounds.values():
                kept = [
                    (float(next(iter(g.values()))["total_sparsity"]), k[1])
                    for k, g in groups.items()
                    if (k[0], k[2]) == (blocks, mode) and keeps(list(g.values()))
                ]
                cells.append("{:.3f} (density {})".format(*max(kept)) if kept else "none")
            if any(k[0] == blocks and k[2] == mode for k in groups):
                lines.append([NAMES[blocks], mode, *cells])
    return [
        "### Total sparsity within a bound",
        "",
        "The sparsest of the measured points that keeps it:",
        "",
        *markdown(["blocks", "mode", *bounds], lines),
    ]


def _rises_less(rows: list[dict[str, str]], bound: float) -> bool:
    return all(
        float(r["ppl_increase"]) <= bound for r in rows if r["metric"] == "nll" and r["task"] != "lambada_nll"
    )


def report_fields(uids: list[dict[str, str]]) -> list[str]:
    """BLiMP by field at the predictor's points with both blocks: stratified means, and the range over
    uids.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for r in uids:
        if (r["mode"], r["blocks"]) in (("dense", "both"), ("predictor", "both")):
            groups[r["density"], r["field"]].append(r)
    if not groups:
        return []
    names = sorted({f for _, f in groups})
    lines = []
    for density in sorted({d for d, _ in groups}, key=lambda d: (d != "1", -density_order(d))):
        cells = ["dense, accuracy" if density == "1" else density]
        for name in names:
            rows = groups[density, name]
            key = "value" if density == "1" else "difference"
            counts, values, errors = ([float(r[k]) for r in rows] for k in ("items", key, f"{key}_se"))
            mean = sum(n * v for n, v in zip(counts, values, strict=True)) / sum(counts)
            se = math.sqrt(sum((n * e) ** 2 for n, e in zip(counts, errors, strict=True))) / sum(counts)
            spread = "" if math.isnan(se) else f" ± {100 * se:.1f}"
            cells.append(
                f"{100 * mean:{'' if density == '1' else '+'}.1f}{spread} ({100 * min(values):.0f} to"
                f" {100 * max(values):.0f})"
            )
        lines.append(cells)
    count = Counter(f for d, f in groups for _ in groups[d, f] if d == "1")
    return [
        "### BLiMP by field",
        "",
        (
            "Predictor, MLP and heads: difference to dense in points ± one standard error, in brackets the"
            " range over uids; `quality_blimp.csv` has every uid."
        ),
        "",
        *markdown(["density", *(f"{n} ({count[n]} uids)" for n in names)], lines),
    ]


def report_context(rows: list[dict[str, str]]) -> list[str]:
    out = [
        "## Context",
        "",
        "Nats a token ± one standard error over passages or windows; differences are paired with dense.",
        "",
    ]
    for kind, title in (
        ("repeat", f"A passage of {PASSAGE} tokens (or half a window, if that is shorter) twice in a window"),
        ("position", "Loss by the number of tokens in front, both blocks at the artifact's point"),
    ):
        lines = [
            [
                r["name"],
                r["mode"],
                NAMES[r["blocks"]] if r["mode"] != "dense" else "-",
                r["density"],
                plus_minus(r, "value", digits=3, sign=False),
                "-" if r["mode"] == "dense" else plus_minus(r, "difference", digits=4),
                r["items"],
            ]
            for r in sorted(
                (r for r in rows if r["kind"] == kind),
                key=lambda r: [x["name"] for x in rows].index(r["name"]),
            )
        ]
        out += [
            f"### {title}",
            "",
            *markdown(["", "mode", "blocks", "density", "value", "difference to dense", "items"], lines),
        ]
    return out


def report_generation(rows: list[dict[str, str]]) -> list[str]:
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for r in rows:
        groups[r["decoding"], r["mode"], r["dtype"]].append(r)
    baseline = rows[0]["dtype"]
    length = int(rows[0]["new_tokens"])
    edges = [0, *(e for e in (1, 4, 16, 64) if e < length), length]
    header = [
        "decoding",
        "engine",
        "leading tokens as dense",
        *(f"diverges at {a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)),
        "never",
        "perplexity under dense",
        "difference, nats",
        *(f"distinct-{n}" for n in (1, 2, 3)),
        "rep-4",
        "difference",
    ]
    lines = []
    for (decoding, mode, dtype), found in groups.items():
        base = groups[decoding, "dense", baseline]
        column = {
            k: torch.tensor([float(r[k]) for r in found], dtype=torch.float64)
            for k in ("agreement", "nll", "rep_4", "distinct_1", "distinct_2", "distinct_3")
        }
        paired = {
            k: column[k] - torch.tensor([float(r[k]) for r in base], dtype=torch.float64)
            for k in ("nll", "rep_4")
        }
        means = {k: mean_se(v) for k, v in column.items()}
        same = mode == "dense" and dtype == baseline
        nll, se = means["nll"]
        agreement = column["agreement"]
        lines.append(
            [
                decoding,
                f"{mode}, {dtype}",
                (
                    "-"
                    if same
                    else (
                        f"{means['agreement'][0]:.1f} ± {means['agreement'][1]:.1f} (median"
                        f" {agreement.median():.0f})"
                    )
                ),
                *(
                    "-" if same else f"{float(((agreement >= a) & (agreement < b)).double().mean()):.2f}"
                    for a, b in zip(edges, edges[1:], strict=False)
                ),
                "-" if same else f"{float((agreement >= length).double().mean()):.2f}",
                f"{math.exp(nll):.2f} ± {math.exp(nll) * se:.2f}",
                "-" if same else "{:+.3f} ± {:.3f}".format(*mean_se(paired["nll"])),
                *("{:.3f} ± {:.3f}".format(*means[f"distinct_{n}"]) for n in (1, 2, 3)),
                "{:.3f} ± {:.3f}".format(*means["rep_4"]),
                "-" if same else "{:+.3f} ± {:.3f}".format(*mean_se(paired["rep_4"])),
            ]
        )
    r = next((r for r in rows if r["mode"] == "sparse"), rows[0])
    return [
        "## Generation",
        "",
        (
            f"{len(groups[rows[0]['decoding'], rows[0]['mode'], rows[0]['dtype']])} prompts of"
            f" {r['prompt_tokens']} tokens of held-out text, {length} new tokens, batches of {r['batch']},"
            " through vLLM's decode path with the settings it serves with; in the sparse engine"
            f" {100 * float(r['sparse_step_share']):.0f}% of the steps were sparse (prompts are not), MLP"
            f" density {float(r['mlp_density']):.3f}, head density {float(r['head_density']):.3f} (a block"
            " that runs dense at this batch size, because it is above its crossover, counts 1). Sampled:"
            f" temperature {TEMPERATURE}, one seed a prompt in both engines, so that they part only where"
            " their distributions differ. Dense in float32 shows what rounding alone does. ± one standard"
            " error over prompts; differences are paired. Repetition is counted within a continuation:"
            " distinct-n is the share of n-grams that differ, rep-4 is 1 - distinct-4."
        ),
        "",
        *markdown(header, lines),
    ]


def report_engine(rows: list[dict[str, str]]) -> list[str]:
    lines = [
        [
            r["mode"],
            r["task"],
            (
                plus_minus(r, "ppl_increase", 100) + "%"
                if r["metric"] == "nll"
                else plus_minus(r, "difference", 100, 1) + " points"
            ),
            f"{float(r['mlp_density']):.4f}",
            f"{float(r['masked_mlp_density']):.4f}",
            f"{float(r['head_density']):.4f}",
            f"{float(r['masked_head_density']):.4f}",
            plus_minus(r, "engine_minus_masked", digits=5),
            r["items_that_differ"] or "-",
            f"{float(r['token_nll_apart_mean']):.1e}",
            f"{float(r['token_nll_apart_max']):.1e}",
        ]
        for r in rows
    ]
    return [
        "## Through the engine",
        "",
        (
            "The same tasks at the artifact's own point through vLLM and the shipped kernels"
            f" ({rows[0]['dtype']}, every token through the sparse path), beside the same selection by masks"
            " in transformers. `difference`: engine minus masks, in nats or accuracy; `items`: answers that"
            " differ; `apart`: a token's nll, absolute."
        ),
        "",
        *markdown(
            [
                "mode",
                "task",
                "against dense, engine",
                "MLP density",
                "masks'",
                "head density",
                "masks'",
                "difference",
                "items",
                "apart, mean",
                "apart, max",
            ],
            lines,
        ),
    ]


def report_settings(found: dict[str, dict[str, Any]]) -> list[str]:
    out = ["## How it was made", ""]
    for command in dict.fromkeys(x["command"] for x in found.values()):
        parts = [p for p, x in found.items() if x["command"] == command]
        out += [f"{', '.join(parts)}:", "", f"    {command}", ""]
    x = next(iter(found.values()))
    tasks = "; ".join(
        f"{n}: {t['texts']:,} texts, {t['tokens']:,} tokens"
        + (f", {t['groups']} uids" if t["groups"] else "")
        for n, t in x["tasks"].items()
    )
    out += [
        (
            f"Model {x['model']}, artifact {x['artifact']} (digest {x['artifact_digest'][:12]}). {tasks}."
            f" Windows of {x['seq_len']} tokens are drawn from the whole text. Predictors of the artifact"
            f" with shifted biases; those it lacks ({', '.join(x['fitted_predictors']) or 'none'}) are closed"
            f" forms fitted on {x['train_tokens']:,} tokens of {x['train']}, lookahead"
            f" {x['lookahead_of_fitted']['mlp']} (MLP), {x['lookahead_of_fitted']['attention']} (heads; layer"
            " 0: self). Thresholds of every density are set on the dense activations of"
            f" {x['calibration_tokens']:,} tokens of {x['calibration']}. Oracle: neurons by the size of their"
            " activation times the norm of their fc2 column, never one that ReLU stops; heads by the norm of"
            " their contribution. Random: round(density x units) units, new for every token. Static: neurons"
            " most often active, heads of the largest mean contribution on the calibration text. Integers"
            " store each unit's score on a scale of its own: before one threshold is set for a layer, scores"
            " are put back on one scale with the moments of the training text. BLiMP's errors are those of a"
            " draw within each uid."
        ),
        "",
        "Device: {device}; torch {torch}, transformers {transformers}, vLLM {vllm}, commit {commit}; seed"
        " {seed}. Everything but `generation` and `engine` is float32 in transformers.".format(**x),
        "",
    ]
    return out


def part_report(output: Path) -> None:
    """quality.md and PNG of what is there."""
    tables = {
        name: read_rows(f"quality_{name}.csv", output)
        for name in ("card", "sweep", "blimp", "context", "generation", "engine")
    }
    path = output / "quality_settings.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = ["# What sparsity costs in quality", ""]
    lines += report_card(tables["card"]) if tables["card"] else []
    if settings and (hidden := settings[next(iter(settings))]["model"]):
        lines += [
            (
                f"Numbers are those of {hidden} alone. A small model has few heads to spare and knows little;"
                " what a large one loses has to be measured on it."
            ),
            "",
        ]
    pictures = plot(output, tables)
    lines += [line for p in pictures for line in (f"![{p.stem}]({p.name})", "")]
    lines += report_sweep(tables["sweep"], tables["blimp"]) if tables["sweep"] else []
    for name, write in (
        ("context", report_context),
        ("generation", report_generation),
        ("engine", report_engine),
    ):
        lines += write(tables[name]) if tables[name] else []
    lines += report_settings(settings) if settings else []
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.md").write_text("\n".join(lines), encoding="utf-8")
    print(output / "quality.md")
