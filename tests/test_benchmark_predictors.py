"""The predictor study: its figures against brute force, and a small run of every study."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import predictor_study
import pytest
import tiny
import torch
from conftest import HANG_S

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    model = tiny.make_opt(place / "model", vocab=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "opt-books-7m" / name, model / name)
    for name, word in (("train", "river"), ("held", "village")):
        text = "\n\n".join(
            " ".join(f"By the {word} in the year {n} nobody spoke of it, {d}." for n in range(60))
            for d in range(4)
        )
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return [
        "--model",
        str(model),
        "--data",
        str(place / "train.txt"),
        "--held-out",
        str(place / "held.txt"),
        "--output",
        str(place / "out"),
        "--tokens",
        "1024",
        "--held-out-tokens",
        "1024",
        "--scored-tokens",
        "256",
        "--seeds",
        "1",
    ]


@pytest.fixture(scope="module")
def results(arguments):
    # As users run it, in a process of its own: after some orders of engine tests autograd was off in this
    # one.
    command = [
        sys.executable,
        predictor_study.__file__,
        "forms",
        "quality",
        "lookahead",
        "heads",
        "data",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    out = Path(arguments[arguments.index("--output") + 1])
    return out, {p.stem: list(csv.DictReader(p.open(newline=""))) for p in out.glob("*.csv")}


def test_every_study_writes_rows_with_provenance(results):
    out, tables = results
    assert set(tables) == {"forms", "quality", "lookahead", "heads", "data"}
    for rows in tables.values():
        assert rows and all(r["commit"] and r["torch"] for r in rows)
    for name in ("forms", "heads", "data"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_equal_budgets_take_equal_bytes(results):
    """The rank that a budget allows doubles when weights take half the bits."""
    ranks = {(r["byte_budget"], r["dtype"]): int(r["rank"]) for r in results[1]["forms"]}
    hidden, ffn = 64, 256
    for (budget, dtype), rank in ranks.items():
        allowed = float(budget) * 2 * hidden * ffn * 16
        bits = predictor_study.WEIGHT_BITS[dtype]
        assert rank * (hidden + ffn) * bits <= allowed < (rank + 1) * (hidden + ffn) * bits


def test_oracle_heads_are_no_denser_than_predicted_ones_at_the_same_budget(results):
    rows = results[1]["heads"]
    density = {(r["selection"], r["budget"]): float(r["head_density"]) for r in rows}
    assert all(float(r["ppl_increase"]) <= float(r["budget"]) for r in rows)
    budgets = {b for _, b in density}
    assert (
        sum(density["oracle", b] for b in budgets) <= sum(density["closed_form", b] for b in budgets) + 1e-9
    )


def test_scores_equal_brute_force(arguments):
    parsed = {
        "model": arguments[1],
        "data": [arguments[3]],
        "held_out": [arguments[5]],
        "held_out_tokens": 512,
        "scored_tokens": 128,
    }
    study = predictor_study.Study(type("Arguments", (), parsed))
    g = torch.Generator().manual_seed(0)
    tensors = {
        "down": torch.randn(8, 64, generator=g),
        "up": torch.randn(256, 8, generator=g),
        "bias": torch.zeros(256),
    }
    found = study.score(1, tensors, "self")
    seen = study.seen[1]
    scores = (seen["mlp_input"] @ tensors["down"].T @ tensors["up"].T).flatten()[:4000]
    active = (seen["z"] > 0).flatten()
    natural = float(active.float().mean())
    cut = (
        (seen["mlp_input"] @ tensors["down"].T @ tensors["up"].T)
        .flatten()
        .sort()
        .values[int((1 - 1.25 * natural) * active.numel())]
    )
    selected = (seen["mlp_input"] @ tensors["down"].T @ tensors["up"].T).flatten() > cut
    assert found["recall"] == pytest.approx(float((selected & active).sum() / active.sum()), abs=1e-3)
    assert found["precision"] == pytest.approx(float((selected & active).sum() / selected.sum()), abs=1e-3)
    # AUC: the share of (active, inactive) pairs in the right order; on a part, hence the tolerance.
    some = active[:4000]
    pairs = (scores[some][:, None] > scores[~some][None, :]).double().mean()
    assert found["auc"] == pytest.approx(float(pairs), abs=0.03)
