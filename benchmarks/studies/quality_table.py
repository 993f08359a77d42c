"""Markdown table of `vllm-dejavu evaluate` results, as the README shows it.

python benchmarks/studies/quality_table.py benchmarks/results/quality/*.json
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tables import cell, of_columns  # noqa: E402

COLUMNS = (
    ("mode", lambda r: r["mode"] + (f", predictor `{r['predictor']}`" if r.get("predictor") else "")),
    ("perplexity", lambda r: f"{r['sparse_ppl']:.2f}"),
    (
        "rise over dense",
        lambda r: f"{100 * r['ppl_increase']:+.2f}% ± {100 * (r['ppl_increase_stderr'] or 0):.2f}",
    ),
    ("MLP density", lambda r: f"{r['mlp_density']:.4f}"),
    ("truly active", lambda r: cell(r["oracle_mlp_density"], ".4f")),
    ("MLP recall", lambda r: cell(r["mlp_recall"], ".2f")),
    ("head density", lambda r: f"{r['head_density']:.3f}"),
    ("bytes density", lambda r: f"{r['bytes_density']:.2f}"),
    ("same most likely token", lambda r: f"{100 * r['teacher_forced_top1_agreement']:.0f}%"),
    ("leading tokens agreeing", lambda r: f"{r['agreement_mean_tokens']:.0f} of {r['agreement_new_tokens']}"),
)


def main(paths: list[str]) -> None:
    rows = [json.loads(Path(p).read_text(encoding="utf-8")) for p in paths]
    order = ("sparse", "oracle", "random", "static", "dense")
    rows.sort(key=lambda r: (order.index(r["mode"]), r.get("predictor") or ""))
    print("\n".join(of_columns(COLUMNS, rows, rule="---")))
    first = rows[0]
    print(
        f"\n{first['num_tokens']:,} tokens, dense perplexity {first['dense_ppl']:.2f},"
        f" {first['agreement_prompts']} prompts."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
