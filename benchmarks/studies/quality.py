"""What sparsity costs in quality: the paper's figure of accuracy against sparsity, with errors, controls and
more tasks.

    python benchmarks/studies/quality.py --model examples/opt-books-7m --train books_train.txt.xz
        --calibration books_valid.txt.xz --texts books=books_test.txt.xz wikitext2=wikitext2_test.txt.xz
        --lambada lambada_test.jsonl.xz --blimp blimp.jsonl.xz --piqa piqa_valid.jsonl.xz
        --training-tokens "16 M" --output benchmarks/results/paper

Parts, all unless --parts names some:

- card: what the model is: dead neurons, training tokens, dense perplexity, dense accuracy beside chance
- sweep: dense, oracle, predictor, random and static selections of MLP neurons, heads or both, over densities
  even over layers
- context: what is kept of in-context learning: passages that come twice, and loss by position in long windows
- generation: free generation through the engine's decode path, dense and sparse as served
- engine: the tasks through the engine at the artifact's own operating point, against masks in transformers
- report: quality.md and PNG of whatever CSV files are there (needs --output only)

With these defaults `sweep` scores about 60,000 tokens at each of 88 points: some 35 minutes on one free core
(2,500 masked tokens a second of this model). Set OMP_NUM_THREADS to the cores that are really free: threads
that wait for each other make it several times slower.

`sweep` and `context` compute masks in transformers, in float32. Densities become thresholds on --calibration,
missing predictors are fitted on --train; nothing is tuned on what is scored. `sweep` skips the points that
its CSV file already has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from quality_parts import part_card, part_context, part_engine, part_generation, part_sweep  # noqa: E402
from quality_report import part_report  # noqa: E402
from quality_study import Study, record  # noqa: E402
from quality_tasks import BLOCK_SETS, MODES  # noqa: E402

DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
PARTS = {
    "card": part_card,
    "sweep": part_sweep,
    "context": part_context,
    "generation": part_generation,
    "engine": part_engine,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--predictor", help="artifact (MODEL/dejavu)")
    parser.add_argument("--train", help="text on which missing predictors are fitted")
    parser.add_argument("--calibration", help="text on which densities become thresholds")
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="NAME=FILE",
        help="scored by perplexity; the first also serves context and generation",
    )
    parser.add_argument("--lambada")
    parser.add_argument("--blimp")
    parser.add_argument("--piqa")
    parser.add_argument("--output", required=True)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "report"], default=[*PARTS, "report"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--blocks", nargs="+", choices=tuple(BLOCK_SETS), default=tuple(BLOCK_SETS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument(
        "--items",
        type=int,
        default=160,
        help="of LAMBADA and PIQA; twice as many pairs of BLiMP, evenly over uids (%(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=10_000, help="of each text (%(default)s)")
    parser.add_argument("--train-tokens", type=int, default=65_536, help="(%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=16_384, help="(%(default)s)")
    parser.add_argument(
        "--training-tokens",
        default="not stated",
        help="that the model was trained on, in words, for the card",
    )
    parser.add_argument("--passages", type=int, default=64, help="that come twice (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument(
        "--engine-dtype", default="auto", help="of generation (%(default)s: the checkpoint's)"
    )
    parser.add_argument(
        "--score-dtype",
        default="float32",
        help="of the engine part (%(default)s, as the masks it is compared with)",
    )
    parser.add_argument("--device", default="cpu", help="of the masked model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wanted = [p for p in PARTS if p in args.parts]
    if wanted:
        for name in ("model", "train", "calibration", "texts"):
            if not getattr(args, name):
                parser.error(f"--{name} is needed for {', '.join(wanted)}")
        if any("=" not in t for t in args.texts):
            parser.error("--texts are NAME=FILE")
        if any(not 0 < d < 1 for d in args.densities):
            parser.error("--densities are in (0, 1)")
        study = Study(args)
        for name in wanted:
            PARTS[name](study)
            record(study, name)
    if "report" in args.parts:
        part_report(Path(args.output))


if __name__ == "__main__":
    main()
