"""Markdown table of `vllm-dejavu evaluate` results, as the README shows it.

python benchmarks/quality_table.py benchmarks/results/quality/*.json
"""

import json
import sys
from pathlib import Path


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS = (
    ("mode", lambda r: r["mode"] + (f", predictor `{r['predictor']}`" if r.get("predictor") else "")),
    ("perplexity", lambda r: f"{r['sparse_ppl']:.2f}"),
    (
        "rise over dense",
        lambda r: f"{100 * r['ppl_increase']:+.2f}% ± {100 * (r['ppl_increase_stderr'] or 0):.2f}",
    ),
    ("MLP density", lambda r: f"{r['mlp_density']:.4f}"),
    ("truly active", lambda r: number(r["oracle_mlp_density"], ".4f")),
    ("MLP recall", lambda r: number(r["mlp_recall"], ".2f")),
    ("head density", lambda r: f"{r['head_density']:.3f}"),
    ("bytes density", lambda r: f"{r['bytes_density']:.2f}"),
    ("same most likely token", lambda r: f"{100 * r['teacher_forced_top1_agreement']:.0f}%"),
    ("leading tokens agreeing", lambda r: f"{r['agreement_mean_tokens']:.0f} of {r['agreement_new_tokens']}"),
)


def main(paths: list[str]) -> None:
    rows = [json.loads(Path(p).read_text(encoding="utf-8")) for p in paths]
    order = ("sparse", "oracle", "random", "static", "dense")
    rows.sort(key=lambda r: (order.index(r["mode"]), r.get("predictor") or ""))
    print("| " + " | ".join(name for name, _ in COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(cell(row) for _, cell in COLUMNS) + " |")
    first = rows[0]
    print(
        f"\n{first['num_tokens']:,} tokens, dense perplexity {first['dense_ppl']:.2f},"
        f" {first['agreement_prompts']} prompts."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
