"""The quality study: tasks, selections, counts and errors against brute force, and a small run of its
parts.
"""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
import quality_parts
import quality_plots
import quality_scorers
import quality_study
import torch
from common import write_rows
from quality_run import ROOT, arguments_of, rows_of, run, some_texts, study_of
from quality_selections import Point
from quality_tasks import OWN


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return arguments_of(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="module")
def study(arguments):
    return study_of(arguments)


@pytest.fixture(scope="module")
def output(arguments):
    return run(arguments, "--parts", "card", "sweep", "context", "report")


def test_card_comes_first_and_holds_the_model(output, study):
    rows = rows_of(output / "quality_card.csv")
    assert [r["value"] for r in rows if r["kind"] == "training"] == ["none: random"]
    dead = [r for r in rows if r["kind"] == "dead neurons"]
    tokens = study.windows(study.args.train, study.args.train_tokens)
    fired = torch.zeros(3, 512, dtype=torch.bool)

    def look(layer, states, z):
        fired[layer] |= (z > 0).any(0)

    with study.opt.observed(None, look):
        study.opt.decoder(tokens)
    assert [int(r["value"]) for r in dead] == (~fired).sum(1).tolist() and {
        int(r["tokens"]) for r in dead
    } == {tokens.numel()}
    text = (output / "quality.md").read_text(encoding="utf-8")
    assert (
        text.index("## The model")
        < text.index("## Quality against sparsity")
        < text.index("## How it was made")
    )
    assert str(output) not in text and "--parts card sweep context report" in text


def test_sweep_has_every_point_once_with_its_densities(output):
    rows = rows_of(output / "quality_sweep.csv")
    tasks = ["held", "lambada", "lambada_nll", "blimp", "piqa", "piqa_norm"]
    assert Counter(r["task"] for r in rows) == {t: 1 + 3 + 4 * 3 for t in tasks}
    assert len({(r["mode"], r["blocks"], r["density"], r["task"]) for r in rows}) == len(rows)
    for r in rows:
        assert r["commit"] and r["torch"]
        if r["mode"] == "dense":
            assert float(r["difference"]) == float(r["total_sparsity"]) == 0
        elif r["mode"] == "random":
            assert float(r["mlp_density"]) == (0.5 if r["blocks"] != "attention" else 1)
            assert float(r["head_density"]) == (0.5 if r["blocks"] != "mlp" else 1)
    uids = rows_of(output / "quality_blimp.csv")
    assert len(uids) == 16 * 3
    for point in {(r["mode"], r["blocks"], r["density"]) for r in uids}:
        mine = [r for r in uids if (r["mode"], r["blocks"], r["density"]) == point]
        [whole] = [r for r in rows if (r["mode"], r["blocks"], r["density"], r["task"]) == (*point, "blimp")]
        assert sum(float(r["value"]) for r in mine) / 3 == pytest.approx(float(whole["value"]), abs=1e-5)
    for name in ("quality_perplexity", "quality_accuracy"):
        assert (output / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_sweep_takes_up_where_it_stopped(output, arguments, tmp_path, monkeypatch):
    """Points in the file are not computed again; what is missing is; other settings are refused."""
    for path in output.glob("quality_*.csv"):
        shutil.copy(path, tmp_path / path.name)
    place = ["--output", str(tmp_path), "--parts", "sweep"]
    scored = []
    plain = quality_scorers.MaskedScorer.score
    monkeypatch.setattr(
        quality_scorers.MaskedScorer,
        "score",
        lambda self, texts: scored.append((bool(self.masks.rules), texts)) or plain(self, texts),
    )
    run(arguments, *place)
    assert not scored and rows_of(tmp_path / "quality_sweep.csv") == rows_of(output / "quality_sweep.csv")
    rows = rows_of(output / "quality_sweep.csv")
    kept = [
        r
        for r in rows
        if (r["mode"], r["blocks"], r["density"], r["task"]) != ("static", "both", "0.5", "blimp")
    ]
    assert len(kept) == len(rows) - 1
    write_rows(tmp_path / "quality_sweep.csv", kept)
    run(arguments, *place)
    assert [sparse for sparse, _ in scored] == [False, True]
    same = (
        "mode",
        "blocks",
        "density",
        "task",
        "value",
        "difference",
        "difference_se",
        "mlp_density",
        "total_sparsity",
    )
    for name, columns in (
        ("quality_sweep", same),
        ("quality_blimp", ("mode", "blocks", "density", "uid", "value", "difference_se")),
    ):
        before, after = (
            {tuple(r[c] for c in columns) for r in rows_of(d / f"{name}.csv")} for d in (output, tmp_path)
        )
        assert before == after and len(rows_of(tmp_path / f"{name}.csv")) == len(
            rows_of(output / f"{name}.csv")
        )
    with pytest.raises(ValueError, match="other settings"):
        run(arguments, *place, "--items", "2")


def test_context_rows_by_hand(output, study):
    rows = rows_of(output / "quality_context.csv")
    length = (127 - 1) // 2
    passages = study.windows(study.args.texts[0].split("=", 1)[1], 3 * (length + 1), length + 1)
    gains = []
    for row in passages.tolist():
        logits = (
            study.opt.model(input_ids=torch.tensor([[*row, *row[1:]]]))
            .logits[0]
            .detach()
            .double()
            .log_softmax(-1)
        )
        nll = [-float(logits[i, t]) for i, t in enumerate([*row[1:], *row[1:]])]
        gains.append(sum(nll[length + 1 :]) / (length - 1) - sum(nll[1:length]) / (length - 1))
    [found] = [r for r in rows if (r["mode"], r["name"]) == ("dense", "second - first")]
    assert float(found["value"]) == pytest.approx(sum(gains) / 3, abs=1e-4)
    assert float(found["value_se"]) == pytest.approx(np.std(gains, ddof=1) / math.sqrt(3), abs=1e-4)
    buckets = [r["name"] for r in rows if r["kind"] == "position" and r["mode"] == "dense"]
    assert buckets == ["1-15", "16-31", "32-63", "64-126"]
    assert {r["mode"] for r in rows if r["kind"] == "position"} == {"dense", "predictor", "oracle", "random"}


# vLLM's import and its inspection of the model class, where no other test has paid for them
@pytest.mark.slow
def test_engine_and_masks_agree(study):
    """The engine's scores, densities and total sparsity at the artifact's own point are those of the
    masks.
    """
    point, texts = Point("predictor", "both", OWN), some_texts()
    masked = study.masked(point)
    expected = masked.score(texts)
    simulated = study.selections.densities(point, masked.masks.read_out())
    with quality_parts.engine(
        study,
        "float32",
        mode=quality_parts.SERVED[point.mode],
        apply_to="all",
        measure=True,
        blocks=["mlp", "attention"],
    ) as llm:
        found = quality_scorers.EngineScorer(llm).score(texts)
        counted = quality_parts.metrics.summarize(llm.collective_rpc("dejavu_metrics"))["layers"]
    served = study.selections.densities(point, counted)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.nll, b.nll, atol=2e-3) and a.correct.tolist() == b.correct.tolist()
    assert served == pytest.approx(simulated, abs=2e-3) and served["mlp_density"] < 0.9


def test_report_of_generation_and_engine(tmp_path):
    """Numbers of the summary, from rows made by hand."""
    rows = []
    for decoding in ("greedy", "sampled"):
        for mode, dtype in (("dense", "bfloat16"), ("sparse", "bfloat16"), ("dense", "float32")):
            for prompt in range(4):
                rows.append(
                    {
                        "decoding": decoding,
                        "mode": mode,
                        "dtype": dtype,
                        "prompt": prompt,
                        "prompt_tokens": 32,
                        "new_tokens": 8,
                        "batch": 16,
                        "agreement": 8 if (mode, dtype) == ("dense", "bfloat16") else (0, 2, 4, 8)[prompt],
                        "distinct_1": 0.5,
                        "distinct_2": 0.6,
                        "distinct_3": 0.7,
                        "rep_4": 0.1 if mode == "dense" else 0.2 + 0.1 * prompt,
                        "nll": 2.0 + 0.5 * (mode == "sparse") * prompt,
                        "mlp_density": 0.1,
                        "head_density": 0.9,
                        "sparse_step_share": 0.95,
                    }
                )
    write_rows(tmp_path / "quality_generation.csv", rows)
    run(["--output", str(tmp_path)], "--parts", "report")
    line = next(
        x
        for x in (tmp_path / "quality.md").read_text().splitlines()
        if x.startswith("| greedy | sparse, bfloat16")
    )
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[2] == "3.5 ± 1.7 (median 2)"
    assert cells[3:7] == ["0.25", "0.25", "0.25", "0.25"]
    assert cells[8] == "+0.750 ± 0.323" and cells[-1] == "+0.250 ± 0.065"
    assert (tmp_path / "quality_generation.png").read_bytes()[:4] == b"\x89PNG"


def test_panels_say_what_they_show(output, tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    quality_plots.plot_sweep(
        tmp_path / "x.png",
        rows_of(output / "quality_sweep.csv"),
        ["blimp", "piqa"],
        ["mlp", "both"],
        "accuracy",
        pyplot,
    )
    axes = pyplot.gcf().axes
    assert [a.get_title() for a in axes] == ["MLP only", "MLP and heads", "", ""]
    assert [bool(a.get_xlabel()) for a in axes] == [False, False, True, True] and axes[
        2
    ].get_ylabel().startswith("piqa")
    drawn = {tuple(line.get_xdata()) for line in axes[0].lines}
    wanted = {
        (float(r["total_sparsity"]),)
        for r in rows_of(output / "quality_sweep.csv")
        if (r["blocks"], r["task"]) == ("mlp", "blimp")
    }
    assert wanted <= drawn
    pyplot.figure().clear()


def test_arguments_of_this_machine_are_not_written_down():
    assert quality_study.shown("books=/somewhere/else/books.txt.xz") == "books=books.txt.xz"
    assert quality_study.shown(str(ROOT / "examples" / "opt-books-7m")) == "examples/opt-books-7m"
    assert quality_study.shown("--items") == "--items"
