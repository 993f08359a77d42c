"""Union density against batch size, on real text: what a step of B requests reads of each layer, and how much
they share.

    python benchmarks/studies/batching.py --data FILE.txt --output OUT
    python benchmarks/studies/batching.py --model DIR --predictor DIR --data FILE.jsonl --tokens 65536
    --batch 1 8 64 --output OUT

Windows of text stand for requests: a draw takes one token of each of B windows, of different documents as far
as there are enough. The model runs in Transformers with every gate's mask applied to all tokens, as in
calibration; `predicted` is what gates select, `active` what they should. Beside each union: what independent
choices of the same density would read, with all units equally likely (`independent`: 1 - (1 - d)^B) and with
every unit at its own rate (`by_rate`). `ratio` to the first is below 1 where tokens share units, `rate_ratio`
to the second is near 1 where they share them only because some units are always likely.

Writes batching.csv, a row a layer, block, selection and batch size, and batching.png; prints means over
layers in Markdown. Nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_dejavu import artifact, locate
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.kernels import reference
from vllm_dejavu.manifest import check_fingerprint, check_model
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.describe import BATCH_SIZES
from vllm_dejavu.predictor_training.gates import Gate, Key, gates_of
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates, Resumable
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions

sys.path.append(str(Path(__file__).resolve().parents[1]))
import figures  # noqa: E402
import tables  # noqa: E402
from common import ROOT, Table, median, number, percentile, read_rows  # noqa: E402

SELECTIONS = ("predicted", "active")
FORWARD = 16  # windows that run together


# --- requests out of text
# -----------------------------------------------------------------------------------------------


def windows_of(
    documents: Sequence[Sequence[int]], seq_len: int, bos: int, num_tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [BOS, seq_len - 1 tokens] that lie in one document each, from as many documents as possible.

    Documents take turns; each gives windows drawn from all of it. Those shorter than a window are left out.

    Returns:
        tokens [num_windows, seq_len], int64; owner [num_windows]: number of each window's document.

    Raises:
        DataError: no document is as long as a window.
    """
    generator = torch.Generator().manual_seed(seed)
    body, wanted = seq_len - 1, max(1, num_tokens // seq_len)
    places = {
        i: torch.randperm(len(d) // body, generator=generator).tolist()
        for i, d in enumerate(documents)
        if len(d) >= body
    }
    if not places:
        longest = max(map(len, documents), default=0)
        raise data.DataError(
            f"Expected a document of at least {body} tokens, the longest has {longest}. Give longer documents"
            " or a smaller --seq-len."
        )
    windows, owner = [], []
    while places and len(windows) < wanted:
        for i in list(places)[: wanted - len(windows)]:
            start = places[i].pop() * body
            windows.append([bos, *documents[i][start : start + body]])
            owner.append(i)
            if not places[i]:
                del places[i]
    return torch.tensor(windows), torch.tensor(owner)


def draw(
    owner: torch.Tensor, seq_len: int, batch: int, draws: int, generator: torch.Generator
) -> torch.Tensor:
    """Random steps: one token of each of `batch` windows, none of which comes twice.

    Documents take turns in random order, so that no two windows are of one document while others have none.
    First tokens are left out: they are never decoded.

    Args:
        owner: [num_windows], each window's document.

    Returns:
        [draws, batch]: rows of the flattened windows.

    Raises:
        ValueError: fewer windows than `batch`.
    """
    if len(owner) < batch:
        raise ValueError(
            f"--batch {batch} needs as many windows of text, there are {len(owner)}. Give more --tokens, more"
            " text or a smaller --seq-len."
        )
    steps = []
    for _ in range(draws):
        turns: dict[int, int] = defaultdict(int)
        order = torch.randperm(len(owner), generator=generator).tolist()
        ranked = []
        for place, window in enumerate(order):
            document = int(owner[window])
            ranked.append((turns[document], place, window))
            turns[document] += 1
        steps.append([window for _, _, window in sorted(ranked)[:batch]])
    positions = torch.randint(1, seq_len, (draws, batch), generator=generator)
    return torch.tensor(steps) * seq_len + positions


# --- unions
# ----------------------------------------------------------------------------------------------------


def unions(mask: torch.Tensor, steps: torch.Tensor) -> list[float]:
    """Share of units that any row of a step has. mask: [T, units], bool; steps: [draws, batch], rows of
    it.
    """
    return [float(mask[rows].any(0).float().mean()) for rows in steps]


def independent(density: float, batch: int) -> float:
    """Union density if each of `batch` rows had each unit with probability `density`, whatever the others
    have.
    """
    return 1 - (1 - density) ** batch


def by_rate(rates: torch.Tensor, batch: int) -> float:
    """As `independent`, each unit with its own probability. rates: [units]."""
    return float((1 - (1 - rates.double()) ** batch).mean())


def measure(
    mask: torch.Tensor, decoded: torch.Tensor, steps: dict[int, torch.Tensor]
) -> list[dict[str, Any]]:
    """Union densities of one selection of one block, a row a batch size.

    Args:
        mask: [T, units], bool. decoded: [T], bool: rows that a step may hold, of which rates are taken.
        steps: batch size -> `draw`.
    """
    rates = mask[decoded].double().mean(0)
    density = float(rates.mean())
    rows = []
    for batch, drawn in steps.items():
        values = unions(mask, drawn)
        union, expected, expected_by_rate = (
            sum(values) / len(values),
            independent(density, batch),
            by_rate(rates, batch),
        )
        rows.append(
            {
                "batch": batch,
                "union_density": union,
                "union_p20": percentile(values, 0.2),
                "union_p80": percentile(values, 0.8),
                "independent": expected,
                "ratio": union / expected if expected else None,
                "by_rate": expected_by_rate,
                "rate_ratio": union / expected_by_rate if expected_by_rate else None,
                "density": density,
            }
        )
    return rows


# --- the model
# ----------------------------------------------------------------------------------------------------


def layers(
    opt: HfModel, gates: dict[Key, Gate], tokens: torch.Tensor
) -> Iterator[tuple[int, dict[tuple[str, str], torch.Tensor]]]:
    """(layer, {(block, selection): mask [T, units]}) of every layer; one layer's masks are held at a time.

    A block without a gate has nothing `predicted`; without a threshold, no head is said to be `active`.
    """
    caught: dict[tuple[str, str], list[torch.Tensor]] = {}

    @functools.cache
    def grams(layer: int) -> torch.Tensor:
        return opt.head_grams(layer)

    def mask_of(
        key: Key, states: LayerStates, value: torch.Tensor, active: torch.Tensor | None
    ) -> torch.Tensor | None:
        if active is not None:
            caught.setdefault((key[1], "active"), []).append(active.cpu())
        if (gate := gates.get(key)) is None:
            return None
        scores = gate.scores(states, value)
        mask = reference.select(scores, torch.ones(len(scores), dtype=torch.bool, device=scores.device))
        caught.setdefault((key[1], "predicted"), []).append(mask.cpu())
        return mask

    def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
        return mask_of((layer, "mlp"), states, z, active_neurons(z))

    def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
        gate, active = gates.get((layer, "attention")), None
        if gate is not None and gate.spec.threshold is not None:
            active = head_contributions(attn, grams(layer)) > gate.spec.threshold
        return mask_of((layer, "attention"), states, attn, active)

    runs: list[Resumable] = [opt.start(part) for part in tokens.split(FORWARD)]
    for layer in range(len(opt.layers)):
        caught.clear()
        runs = [opt.advance(run, on_attention, on_mlp) for run in runs]
        yield layer, {key: torch.cat(parts) for key, parts in caught.items()}


def study(args: argparse.Namespace) -> Table:
    """All layers' unions, written to batching.csv.

    Raises:
        ValueError: text, artifact and model do not fit each other or the batch sizes.
    """
    loaded = artifact.load(locate.resolve(args.predictor, args.model))
    opt = HfModel(args.model, args.device)
    check_model(loaded.manifest, opt.spec)
    check_fingerprint(loaded.manifest, opt.spec.fingerprint, args.model)
    seq_len = min(args.seq_len, opt.geometry.max_positions)
    documents = data.tokenize(data.read_documents(str(args.data)), opt.tokenizer())
    tokens, owner = windows_of(documents, seq_len, opt.bos, args.tokens, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    steps = {batch: draw(owner, seq_len, batch, args.draws, generator) for batch in sorted({*args.batch})}
    decoded = torch.ones_like(tokens, dtype=torch.bool)
    decoded[:, 0] = False
    shared = {
        "tokens": tokens.numel(),
        "windows": len(tokens),
        "documents": len(owner.unique()),
        "seq_len": seq_len,
        "draws": args.draws,
        "seed": args.seed,
        "data": Path(args.data).name,
        "dtype": "float32",
        "synthetic": False,
    }
    table, model = Table(args.output / "batching.csv"), Path(args.model).resolve().name
    for layer, masks in tqdm(
        layers(opt, gates_of(loaded), tokens), total=len(opt.layers), desc="batching", unit="layer"
    ):
        for (block, selection), mask in sorted(
            masks.items(), key=lambda item: (BLOCKS.index(item[0][0]), SELECTIONS.index(item[0][1]))
        ):
            spec = loaded.manifest.layers[layer][block]
            about = {"lookahead": spec.lookahead, "predictor_dtype": spec.dtype} if spec.sparse else {}
            for row in measure(mask, decoded.flatten(), steps):
                calibrated = spec.density_at(row["batch"]) if selection == "predicted" else None
                table.add(
                    benchmark="batching",
                    model=model,
                    layer=layer,
                    block=block,
                    selection=selection,
                    **row,
                    calibrated=calibrated,
                    **about,
                    **shared,
                )
    return table


# --- what is shown
# ----------------------------------------------------------------------------------------------------


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the layers that have a gate, a row a block and batch size.

    Columns: `predicted`, `active`: union density; `independent`, `ratio`, `by_rate`, `rate_ratio` of what is
    predicted, each ratio of the means; `layers`: that were averaged.
    """
    groups: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        at = groups.setdefault((row["block"], int(row["batch"])), {selection: {} for selection in SELECTIONS})
        at[row["selection"]][int(row["layer"])] = row
    out = []
    for (block, batch), at in groups.items():
        gated = list(at["predicted"])
        if not gated:
            continue

        def mean(selection: str, what: str) -> float | None:
            values = [number(at[selection][layer], what) for layer in gated if layer in at[selection]]  # noqa: B023
            return sum(values) / len(values) if values else None

        row = {
            "block": block,
            "batch": batch,
            "layers": len(gated),
            "predicted": mean("predicted", "union_density"),
            "active": mean("active", "union_density"),
        }
        row |= {what: mean("predicted", what) for what in ("independent", "by_rate")}
        row["ratio"], row["rate_ratio"] = (
            row["predicted"] / row[what] if row[what] else None for what in ("independent", "by_rate")
        )
        out.append(row)
    return sorted(out, key=lambda r: (BLOCKS.index(r["block"]), r["batch"]))


COLUMNS = (
    ("block", lambda r: {"mlp": "MLP", "attention": "heads"}[r["block"]] + f" ({r['layers']} layers)"),
    ("batch", lambda r: str(r["batch"])),
    ("union, predicted", lambda r: tables.cell(r["predicted"], ".3f")),
    ("union, truly active", lambda r: tables.cell(r["active"], ".3f")),
    ("if independent", lambda r: tables.cell(r["independent"], ".3f")),
    ("ratio", lambda r: tables.cell(r["ratio"], ".2f")),
    ("if independent, each unit at its rate", lambda r: tables.cell(r["by_rate"], ".3f")),
    ("ratio", lambda r: tables.cell(r["rate_ratio"], ".2f")),
)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Of `means`."""
    return "\n".join(tables.of_columns(COLUMNS, rows))


def plot(directory: Path, pyplot: Any) -> None:
    """Union density by batch, a line a layer, bars from the 20th to the 80th percentile of draws; dotted:
    independent choices.
    """
    rows = read_rows("batching.csv", directory)
    blocks = [block for block in BLOCKS if any(r["block"] == block for r in rows)]
    if not blocks:
        return
    figure, axes = figures.panels(pyplot, len(blocks), 2, width=4.75, sharex=True, sharey=True)
    last = max(int(r["layer"]) for r in rows)
    colours = pyplot.get_cmap("viridis")
    for row_of_axes, block in zip(axes, blocks, strict=True):
        for axis, selection in zip(row_of_axes, SELECTIONS, strict=True):
            lines = defaultdict(list)
            for row in rows:
                if (row["block"], row["selection"]) == (block, selection):
                    lines[int(row["layer"])].append(row)
            for layer, points in sorted(lines.items()):
                points.sort(key=lambda r: int(r["batch"]))
                batches, values = (
                    [int(r["batch"]) for r in points],
                    [number(r, "union_density") for r in points],
                )
                ends = ([number(r, end) for r in points] for end in ("union_p20", "union_p80"))
                spread = figures.bars(values, *ends)
                # deep models: a few layers name the scale of colours
                label = f"layer {layer}" if last < 12 or layer in (0, last // 2, last) else None
                axis.errorbar(
                    batches,
                    values,
                    yerr=spread,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    color=colours(layer / max(1, last)),
                    label=label,
                )
                axis.plot(
                    batches,
                    [number(r, "independent") for r in points],
                    ":",
                    linewidth=0.8,
                    color=colours(layer / max(1, last)),
                )
            figures.batch_axis(axis, rows)
            axis.set(
                title=f"{'neurons' if block == 'mlp' else 'heads'}, {selection}",
                xlabel="batch",
                ylim=(0, 1.03),
            )
            if lines:
                axis.legend(fontsize=7)
        row_of_axes[0].set_ylabel("union density")
    first = rows[0]
    title = (
        f"Union density, {first['model']} on {first['data']}; {first['windows']} windows of"
        f" {first['documents']} documents, {first['draws']} draws; dotted: independent"
    )
    figures.save_measured(figure, directory / "batching.png", title, rows)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Union density against batch size on real text.")
    parser.add_argument(
        "--model",
        default=str(ROOT / "examples" / "opt-books-7m"),
        help="an OPT checkpoint with its tokenizer (%(default)s)",
    )
    parser.add_argument("--predictor", metavar="DIR", help="its artifact (not given: MODEL/dejavu)")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="text that nothing was tuned on: .txt or .jsonl, also .xz, .gz; its documents are the requests",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of all windows together")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a window")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--draws", type=int, default=200, help="steps drawn of each batch size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="cpu", help="that the model runs on; auto spreads it (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = options()
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("tokens", 1), ("draws", 1), ("seq_len", 2)):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < least:
            parser.error(f"--{name.replace('_', '-')} {values} is too small: expected at least {least}")
    try:
        table = study(args)
    except (ValueError, OSError) as e:
        parser.error(str(e))
    first = table.rows[0]
    print(
        f"{first['model']} on {first['data']}: {first['windows']} windows of {first['seq_len']} tokens, of"
        f" {first['documents']} documents; {args.draws} draws of each size; means over layers with a gate"
    )
    print(markdown(means(table.rows)))
    for block in BLOCKS:
        errors = [
            abs(r["union_density"] / r["calibrated"] - 1)
            for r in table.rows
            if r["block"] == block and r["calibrated"]
        ]
        if errors:
            print(
                f"{block}: union densities differ from the artifact's by {median(errors):.1%} (median over"
                f" layers and sizes), at most {max(errors):.1%}"
            )
    if (plt := figures.pyplot()) is not None:
        plot(args.output, plt)


if __name__ == "__main__":
    main()
