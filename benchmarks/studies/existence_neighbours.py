"""The existence study's part `neighbours`: neurons as a database for inner-product search, beside the trained
predictor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import median, percentile
from existence_oracle import choose
from existence_search import HNSW_SEARCH, density_at_recall, mask_of, one_scale, searches, with_bias, with_one
from existence_statistics import ratio_error
from existence_study import Study, Walk, markdown, mean_of, trained_predictor

from vllm_dejavu.kernels import cpu
from vllm_dejavu.predictor import Predictor
from vllm_dejavu.timing import Timer

NEIGHBOUR_TOKENS_A_WINDOW = 32


@dataclass
class Base:
    """A database of neurons and the queries put to it.

    Attributes:
        x: [T, hidden], grouped by windows of `group` tokens; z: [T, ffn], true pre-activations.
        gate: tensors of its predictor, or None. fit_on: (x, z) of other text, for the predictor's scale;
            None: its scores mean nothing.
    """

    label: str
    fc1: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    z: torch.Tensor
    group: int
    gate: dict[str, torch.Tensor] | None
    fit_on: tuple[torch.Tensor, torch.Tensor] | None
    synthetic: bool = False


def synthetic_base(geometry: str, tokens: int, seed: int) -> Base:
    """Random neurons of another size, about one in 15 active; a random int8 predictor of 3% of the MLP's
    bytes.
    """
    hidden, ffn = (int(n) for n in geometry.lower().split("x"))
    g = torch.Generator().manual_seed(seed)
    fc1, bias, x = (
        torch.randn(ffn, hidden, generator=g) * hidden**-0.5,
        torch.full((ffn,), -1.5),
        torch.randn(tokens, hidden, generator=g),
    )
    rank = max(16, int(0.03 * 2 * hidden * ffn * 2 / (hidden + ffn)) // 16 * 16)
    gate = {
        "down": torch.randint(-127, 128, (rank, hidden), generator=g, dtype=torch.int8),
        "up": torch.randint(-127, 128, (ffn, rank), generator=g, dtype=torch.int8),
        "bias": torch.zeros(ffn),
        "activation_rate": torch.zeros(ffn),
    }
    return Base(
        f"SYNTHETIC {hidden}x{ffn}", fc1, bias, x, x @ fc1.T + bias, tokens, gate, None, synthetic=True
    )


def neighbour_rows(study: Study, faiss: Any, base: Base, layer: Any) -> list[dict[str, Any]]:
    """Recall and time of every search and of the predictor over one database."""
    ffn, active = len(base.fc1), base.z > 0
    natural = float(active.float().mean())
    k = max(1, round(natural * ffn))
    queries = with_one(base.x)
    found = searches(faiss, with_bias(base.fc1, base.bias), k)
    truth = active.double().unflatten(0, (-1, base.group)).sum((1, 2))

    def recall(mask: torch.Tensor) -> dict[str, float]:
        value, error = ratio_error((mask & active).double().unflatten(0, (-1, base.group)).sum((1, 2)), truth)
        return {"recall": value, "recall_se": error}

    common = {
        "model": study.name if not base.synthetic else "none",
        "layer": layer,
        "database": base.label,
        "synthetic": base.synthetic,
        "vectors": ffn,
        "width": base.fc1.shape[1] + 1,
        "k": k,
        "natural_density": natural,
    }
    rows, runs, exact = [], {}, None
    single = [queries[i : i + 1] for i in range(min(study.args.neighbours_tokens, len(queries)))]
    inputs = [base.x[i : i + 1].contiguous() for i in range(len(single))]
    scores = None
    if base.gate is not None and base.fit_on is not None:
        predictor = Predictor(base.gate)
        scores = one_scale(predictor.scores(base.x), predictor.scores(base.fit_on[0]), base.fit_on[1])
    for search in found:
        mask = mask_of(search.ids(queries, k), ffn)
        exact = mask if exact is None else exact
        row = {
            **common,
            "method": search.method,
            "setting": search.setting,
            "density": float(mask.float().mean()),
            **recall(mask),
            "of_exact": float((mask & exact).sum() / exact.sum()),
            "build_s": search.build_s,
        }
        if scores is not None:
            row["predictor_density_at_equal_recall"] = density_at_recall(scores, active, row["recall"])
        rows.append(row)
        runs[f"{search.method}/{search.setting}"] = lambda i, s=search: s.ids(single[i], k)
    plain = torch.nn.functional.linear
    rows.append(
        {
            **common,
            "method": "fc1 itself",
            "setting": "PyTorch, fp32",
            "density": natural,
            "recall": 1.0,
            "of_exact": 1.0,
            "predictor_density_at_equal_recall": math.nan,
        }
    )
    runs["fc1 itself/PyTorch, fp32"] = lambda i: (plain(inputs[i], base.fc1, base.bias) > 0).nonzero()
    if base.gate is not None:
        gate = Predictor(base.gate)
        lens = torch.ones(1, dtype=torch.int32)
        sides = {"PyTorch": lambda i: (gate.scores(inputs[i]) > 0).nonzero()}
        if cpu.available():
            sides["native"] = lambda i: cpu.select_neurons(inputs[i], gate.down, gate.up, gate.bias, lens)
        for side, run in sides.items():
            row = {
                **common,
                "method": "predictor",
                "setting": (
                    f"{side}, rank {len(base.gate['down'])},"
                    f" {str(base.gate['down'].dtype).removeprefix('torch.')}"
                ),
            }
            if scores is not None:
                mask = choose(scores - scores.min() + 1.0, k)
                row |= {
                    "density": k / ffn,
                    **recall(mask),
                    "of_exact": float((mask & exact).sum() / exact.sum()),
                }
                served = gate.scores(base.x) > 0
                row |= {
                    "served_density": float(served.float().mean()),
                    "served_recall": recall(served)["recall"],
                }
            rows.append(row)
            runs[f"{row['method']}/{row['setting']}"] = run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = Timer(torch.device("cpu"), study.args.neighbours_rounds)(runs, len(single))
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        us = times[f"{row['method']}/{row['setting']}"]
        row |= {
            "us": median(us),
            "us_p20": percentile(us, 0.2),
            "us_p80": percentile(us, 0.8),
            "timed_tokens": len(single),
            "rounds": len(us),
        }
    return rows


def neighbour_bases(study: Study) -> Iterator[tuple[int, Base]]:
    """Of some layers: fc1, queries spread over the scored windows, the artifact's predictor."""
    opt, wanted = study.opt, study.some_layers()
    loaded = trained_predictor(study, "neighbours")
    group = min(NEIGHBOUR_TOKENS_A_WINDOW, study.seq_len - 1)
    places = torch.linspace(1, study.seq_len - 1, group).long()
    walks = (
        Walk(opt, study.scored, study.args.batch),
        Walk(opt, study.train[: max(1, 4096 // study.seq_len)], study.args.batch),
    )
    for layer in range(max(wanted) + 1):
        states = []
        for walk in walks:
            parts: list[list[torch.Tensor]] = [[], []]
            for seen in walk.layer():
                for part, value in zip(parts, (seen.inputs["mlp_input"], seen.z), strict=True):
                    rows = value.view(-1, study.seq_len, value.shape[-1])
                    part.append(
                        (rows[:, places.to(value.device)] if walk is walks[0] else rows[:, 1:])
                        .flatten(0, 1)
                        .float()
                        .cpu()
                    )
            states.append([torch.cat(p) for p in parts])
        if layer not in wanted:
            continue
        weight, bias = opt.weight(layer, "fc1").float().cpu(), opt.weight(layer, "fc1", "bias")
        gate = None
        if loaded is not None:
            spec, tensors = loaded.gate(layer, "mlp")
            # Scores of the other lookaheads belong to other inputs.
            gate = tensors if spec.sparse and spec.lookahead == "self" else None
        yield (
            layer,
            Base(
                f"fc1 of layer {layer}",
                weight,
                torch.zeros(len(weight)) if bias is None else bias.float().cpu(),
                *states[0],
                group,
                gate,
                tuple(states[1]),
            ),
        )


def part_neighbours(study: Study) -> None:
    try:
        import faiss
    except ImportError:
        print(
            "neighbours: SKIPPED, faiss is not installed; pip install faiss-cpu and run: --parts neighbours",
            flush=True,
        )
        return
    faiss.omp_set_num_threads(1)
    table, rows = study.table("neighbours"), []
    for layer, base in neighbour_bases(study):
        rows += neighbour_rows(study, faiss, base, layer)
        print(f"neighbours: layer {layer} done", flush=True)
    for geometry in study.args.neighbours_geometry:
        made = neighbour_rows(
            study, faiss, synthetic_base(geometry, 4 * study.args.neighbours_tokens, study.args.seed), ""
        )
        rows += made
        print(f"neighbours: {made[0]['database']} done", flush=True)
    for row in rows:
        table.add(**row, threads=1, faiss=faiss.__version__)
    image = plot_neighbours(study, rows)
    real = [r for r in rows if not r["synthetic"]]
    shown = real_means(real) + [r for r in rows if r["synthetic"]]
    layers = len({r["layer"] for r in real})
    study.write(
        "neighbours",
        "Neurons as nearest neighbours",
        "Database: rows of fc1 with the bias appended; query: the MLP's input with 1 appended; k: the"
        " layer's natural density. One thread, one token at a time, microseconds with the call from Python,"
        f" median of {study.args.neighbours_rounds} rounds in which all took turns (20% and 80% in the CSV)."
        " `of exact`: neurons shared with the exact search. `predictor's density`: what the trained"
        " predictor keeps to reach the same recall with one threshold. Its own row is at k a token; its"
        " scores are put on one scale by a regression a neuron on training text. Real rows are means over"
        f" {layers} layers. SYNTHETIC rows: random vectors and a random predictor, for time only; random"
        " vectors have no neighbourhoods, so their recall says nothing about a trained model.",
        markdown(
            shown,
            {
                "database": "database",
                "method": "method",
                "setting": "setting",
                "recall": "recall",
                "of exact": "of_exact",
                "predictor's density": "predictor_density_at_equal_recall",
                "us": "us",
                "build, s": "build_s",
            },
        ),
        *neighbour_reading(real_means(real), [r for r in rows if r["synthetic"]]),
        image,
    )


def real_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over layers, by method and place among its settings (efSearch follows k, and k the layer)."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for layer in dict.fromkeys(r["layer"] for r in rows):
        seen: dict[str, int] = {}
        for r in (r for r in rows if r["layer"] == layer):
            seen[r["method"]] = seen.get(r["method"], -1) + 1
            groups.setdefault((r["method"], seen[r["method"]]), []).append(r)
    out = []
    for (method, place), found in groups.items():
        setting = (
            f"efSearch max(16, {HNSW_SEARCH[place]}k)" if method.startswith("HNSW") else found[0]["setting"]
        )
        out.append(
            {"database": "fc1, mean", "method": method, "setting": setting}
            | {
                k: mean_of(found, k)
                for k in (
                    "recall",
                    "of_exact",
                    "predictor_density_at_equal_recall",
                    "us",
                    "build_s",
                    "natural_density",
                    "served_density",
                    "served_recall",
                )
            }
        )
    return out


def neighbour_reading(real: list[dict[str, Any]], synthetic: list[dict[str, Any]]) -> list[str]:
    out = []
    for rows in (real, synthetic):
        if not rows:
            continue
        by = {(r["method"], r["setting"].split(",")[0]): r for r in rows}
        exact, fc1 = by["exact", "IndexFlatIP"], by["fc1 itself", "PyTorch"]
        native = by.get(("predictor", "native")) or by.get(("predictor", "PyTorch"))
        approximate = [r for r in rows if r["method"].startswith(("HNSW", "IVF"))]
        text = (
            f"{rows[0]['database']}: exact search at k finds {exact['recall']:.3f} of the active neurons in"
            f" {exact['us']:.0f} us, fc1 itself takes {fc1['us']:.0f} us."
        )
        if native is not None:
            text += f" The predictor ({native['setting'].split(',')[0]}) takes {native['us']:.0f} us" + (
                f" and finds {native['recall']:.3f} at k (as served: {native['served_recall']:.3f} at density"
                f" {native['served_density']:.3f})."
                if native.get("recall") is not None and not math.isnan(native["recall"])
                else "."
            )
            enough = [r for r in approximate if r["recall"] >= native.get("recall", math.nan)]
            if native.get("recall") is not None and not math.isnan(native["recall"]):
                best = min(enough, key=lambda r: r["us"], default=None)
                text += (
                    " No approximate search here reaches its recall."
                    if best is None
                    else (
                        f" The fastest approximate search of at least its recall is {best['method']}"
                        f" ({best['setting']}): {best['recall']:.3f} in {best['us']:.0f} us."
                    )
                )
        best = max(approximate, key=lambda r: r["of_exact"])
        out.append(
            text
            + f" Of the approximate searches the most faithful, {best['method']} ({best['setting']}), shares"
            f" {best['of_exact']:.3f} with the exact one and takes {best['us']:.0f} us."
        )
    return out


def plot_neighbours(study: Study, rows: list[dict[str, Any]]) -> str:
    databases = {"real": [r for r in rows if not r["synthetic"]]} | {
        r["database"]: [q for q in rows if q["database"] == r["database"]] for r in rows if r["synthetic"]
    }
    made = study.figure(1, len(databases), height=3.8)
    if made is None:
        return ""
    figure, [axes] = made
    for axis, (name, found) in zip(axes, databases.items(), strict=True):
        found = real_means(found) if name == "real" else found
        key = "recall" if name == "real" else "of_exact"
        for method in dict.fromkeys(r["method"] for r in found):
            points = [(r["us"], r.get(key)) for r in found if r["method"] == method]
            if all(
                p[1] is None or math.isnan(p[1]) for p in points
            ):  # a random predictor's recall means nothing
                for (us, _), row in zip(points, (r for r in found if r["method"] == method), strict=True):
                    axis.axvline(
                        us,
                        color="k",
                        ls=":" if row["setting"].startswith("PyTorch") else "--",
                        lw=0.8,
                        label=f"predictor, {row['setting'].split(',')[0]}: time only",
                    )
            else:
                axis.plot(
                    *zip(*points, strict=True),
                    "-o" if method.startswith(("HNSW", "IVF")) else "s",
                    ms=4,
                    label=method,
                )
        axis.set(
            xscale="log",
            xlabel="us a token, one thread",
            ylabel="recall of active neurons at k" if key == "recall" else "share of exact top k",
            title="fc1, mean over layers" if name == "real" else name,
        )
        axis.title.set_fontsize(9)
        axis.tick_params(axis="x", which="minor", labelsize=6, labelrotation=90)
        axis.legend(fontsize=6)
    return study.save(figure, "neighbours", "neurons by nearest-neighbour search")
