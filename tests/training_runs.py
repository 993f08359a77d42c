"""Training runs as a user makes them, on a small random OPT with a real tokenizer: what their tests share.

The fixtures are for the whole session (conftest.py takes them in): the run of `trained` takes seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from vllm_dejavu import artifact
from vllm_dejavu.predictor_training import pipeline
from vllm_dejavu.predictor_training.config import TrainConfig

TOKENIZER = Path(__file__).parent.parent / "examples" / "opt-books-7m"
PLOTS = ["plots/curve.png", "plots/layers.png", "plots/scores.png"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    directory = tiny.make_opt(tmp_path_factory.mktemp("model"), vocab=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    return str(directory)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Eight documents of plain prose, enough for a few windows of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    scenes = [
        "the old house by the river",
        "a letter from her brother",
        "the road to the village",
        "my father's library",
    ]
    documents = [
        " ".join(
            f"It was {place} that she remembered in the {n}th year, and nobody spoke of {place} again."
            for n in range(4, 40)
        )
        for place in scenes * 2
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def config(model, text, output, **changes) -> TrainConfig:
    small = {
        "seq_len": 64,
        "max_tokens": 2048,
        "valid_tokens": 128,
        "valid_share": 0.25,
        "rank": 16,
        "max_ppl_increase": 0.1,
        "batch": 4,
    }
    return TrainConfig(model=model, data=(text,), output=str(output), **{**small, **changes})


@pytest.fixture(scope="session")
def trained(model, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "artifact"
    return pipeline.run(config(model, text, output)), output


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes a third of a small run. `trained`, made before this, draws; the others leave empty
    files.
    """
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "tight_layout", lambda self: None)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def lines(run_dir):
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


class Killed(BaseException):
    """Stands for a kill signal: nothing in the pipeline may catch it."""


def kill():
    raise Killed


def interrupted(made: TrainConfig, monkeypatch) -> None:
    """A run that is killed when it is about to write the artifact."""
    with monkeypatch.context() as m:
        m.setattr(artifact, "save", lambda *a, **k: kill())
        with pytest.raises(Killed):
            pipeline.run(made)
