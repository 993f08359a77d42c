"""Does contextual sparsity exist in a model, and can it be predicted? The paper's observations, layer by
layer, on any OPT.

    python benchmarks/studies/existence.py --model examples/opt-books-7m --data books_train.txt.xz
    --held-out books_test.txt.xz --output benchmarks/results/paper

Parts (`--parts`; all of them otherwise), each with its CSV and PNG and a section of existence.md:

- oracle: natural density, dead neurons, energy; the density at which a selection that knows the truth costs
  1% of perplexity; the paper's oracle in two passes beside one on the fly.
- bytes: weight bytes read a token at these densities, by our account and by the paper's. Reads what `oracle`
  wrote.
- predictability: how well active neurons and important heads follow from ever more context, by linear fits of
  full rank.
- drift: how slowly the residual stream turns from layer to layer.
- neighbours: neurons as a database for inner-product search (needs faiss), beside the trained predictor.
- heads: heavy and uniform attention heads, and what they contribute.

Training text fits regressions, tables and thresholds; held-out text is scored. Everything runs densely, or
with masks, in transformers. Standard errors are over windows of text.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from existence_bytes import part_bytes  # noqa: E402
from existence_drift import part_drift  # noqa: E402
from existence_heads import SENTENCE, part_heads  # noqa: E402
from existence_neighbours import part_neighbours  # noqa: E402
from existence_oracle import part_oracle  # noqa: E402
from existence_predictability import part_predictability  # noqa: E402
from existence_study import Study  # noqa: E402

PARTS: dict[str, Callable[[Study], None]] = {
    "oracle": part_oracle,
    "bytes": part_bytes,
    "predictability": part_predictability,
    "drift": part_drift,
    "neighbours": part_neighbours,
    "heads": part_heads,
}
SECTION = re.compile(r"<!-- part: (\w+) \| (.*?) -->\n(.*?)(?=\n<!-- part: |\Z)", re.DOTALL)


def command_line(arguments: list[str]) -> str:
    """As typed, without the directories of absolute paths."""
    return " ".join(
        [
            "python benchmarks/studies/existence.py",
            *(shlex.quote(Path(a).name if a.startswith("/") else a) for a in arguments),
        ]
    )


def write_report(study: Study, command: str) -> Path:
    """existence.md: this run's sections, and those of earlier runs on the same model for parts that did not
    run now.
    """
    path, opt = study.output / "existence.md", study.opt
    title = f"# Contextual sparsity in {study.name}: does it exist, can it be predicted?"
    sections = {part: (command, text) for part, text in study.sections.items()}
    if path.is_file():
        old = path.read_text(encoding="utf-8")
        if old.startswith(title + "\n"):
            sections = {
                part: (made_by, text.strip()) for part, made_by, text in SECTION.findall(old)
            } | sections
    names = {k: ", ".join(Path(s).name for s in getattr(study.args, k)) for k in ("data", "held_out")}
    lines = [
        title,
        "",
        f"    {command}",
        "",
        (
            f"Model: {study.name}, {len(opt.layers)} layers, hidden {opt.geometry.hidden_size}, ffn"
            f" {opt.geometry.ffn_dim}, {study.units['heads']} heads. Windows of {study.seq_len} tokens:"
            f" {study.train.numel():,} tokens of {names['data']} to fit, {study.held_out.numel():,} of"
            f" {names['held_out']} for perplexity, the first {study.scored.numel():,} of these for everything"
            " else that is scored. ± is a standard error over windows."
        ),
        "",
    ]
    for part in PARTS:
        if part in sections:
            made_by, text = sections[part]
            lines += [f"<!-- part: {part} | {made_by} -->", text, ""]
            if made_by != command and f"`{made_by}`" not in text:
                lines.insert(-1, f"\nThis section: `{made_by}`")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="text to fit on")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to score")
    parser.add_argument("--output", required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--predictor", help="artifact directory; MODEL/dejavu unless named")
    parser.add_argument("--tokens", type=int, default=65_536, help="of training text")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="for perplexity")
    parser.add_argument("--scored-tokens", type=int, default=8_192, help="of these, for the other statistics")
    parser.add_argument("--max-documents", type=int, help="of each text")
    parser.add_argument(
        "--seq-len", type=int, help="of a window; as long as the model allows, at most 2048, unless given"
    )
    parser.add_argument("--batch", type=int, default=4, help="windows at once")
    parser.add_argument(
        "--layers", type=int, default=12, help="that predictability and neighbours look at, evenly spaced"
    )
    parser.add_argument(
        "--neighbours-geometry",
        nargs="+",
        default=[],
        help="HIDDENxFFN: search times on a synthetic random database of this size too",
    )
    parser.add_argument("--neighbours-tokens", type=int, default=16, help="timed in every round")
    parser.add_argument("--neighbours-rounds", type=int, default=21)
    parser.add_argument("--sentence", default=SENTENCE, help="for the attention maps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice unless given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    study = Study(args)
    command = command_line(arguments)
    for part in (p for p in PARTS if p in args.parts):
        start = time.monotonic()
        PARTS[part](study)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
        write_report(study, command)
    print(study.output / "existence.md")


if __name__ == "__main__":
    main()
