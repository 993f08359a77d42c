"""A run of the quality study on a tiny random model, for the tests of its parts."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import quality
import tiny
import torch
from quality_tasks import Text

ROOT = Path(__file__).parent.parent

BOS = 2


def arguments_of(place: Path) -> list[str]:
    """Of a run on a tiny random model: heads gated by `previous`, layer 2 without predictors, weights in
    int8.
    """
    model = tiny.make_opt(place / "model", vocab=8192, hidden=128, heads=4)
    tiny.make_artifact(
        model / "dejavu",
        model,
        mlp="self",
        attention="previous",
        dense_layers=(2,),
        density=0.3,
        dtype="int8",
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "opt-books-7m" / name, model / name)
    for name, word in (("train", "river"), ("valid", "harbour"), ("test", "village")):
        text = "\n\n".join(
            " ".join(f"By the {word} in the year {n} nobody spoke of it, {d}." for n in range(60))
            for d in range(4)
        )
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    rows = {
        "lambada": [
            {"text": f"He said the old house by the {w} was " + "very " * n + "empty"}
            for n, w in enumerate(("river", "sea", "road", "mill"))
        ],
        "blimp": [
            {
                "uid": u,
                "field": u[0],
                "good": f"The {u} cats {n} sleep.",
                "bad": f"The {u} cats {n} sleeps very.",
            }
            for u in ("aa", "ab", "ba")
            for n in range(5)
        ],
        "piqa": [
            {"goal": f"open door {n}", "sol1": "turn the handle", "sol2": "eat it " * (n + 1), "label": n % 2}
            for n in range(4)
        ],
    }
    for name, items in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n", encoding="utf-8")
    return [
        "--model",
        str(model),
        "--train",
        str(place / "train.txt"),
        "--calibration",
        str(place / "valid.txt"),
        "--texts",
        f"held={place / 'test.txt'}",
        *(x for name in rows for x in (f"--{name}", str(place / f"{name}.jsonl"))),
        "--output",
        str(place / "out"),
        "--training-tokens",
        "none: random",
        *"--items 3 --tokens 512 --train-tokens 1024 --calibration-tokens 1024".split(),
        *"--passages 3 --densities 0.5".split(),
    ]


def run(arguments: list[str], *more: str) -> Path:
    """Where it wrote."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["quality.py", *arguments, *more])
        quality.main()
    return Path(arguments[arguments.index("--output") + 1])


def study_of(arguments: list[str]) -> Any:
    """The study that `main` would make of these arguments."""
    made = []
    with pytest.MonkeyPatch.context() as m:
        m.setitem(quality.PARTS, "card", made.append)
        m.setattr(quality, "record", lambda *_: None)
        run([*arguments], "--parts", "card")
    return made[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="", encoding="utf-8")))


def some_texts() -> list[Text]:
    return [Text((BOS, *tiny_tokens(n, seed=n)), start) for n, start in ((9, 1), (30, 12), (3, 3), (17, 1))]


def tiny_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 8192, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
