"""batching.py: requests out of text, unions and what independence predicts by hand, masks against
calibration's, a run of it all.
"""

import csv
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import batching
import pytest
import tiny
import torch

from vllm_dejavu import artifact
from vllm_dejavu.predictor_training.data import DataError
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import head_contributions
from vllm_dejavu.predictor_training.masked import Masked

ROOT = Path(__file__).parent.parent

BOS = 2
COLUMNS = {
    "benchmark",
    "model",
    "layer",
    "block",
    "selection",
    "batch",
    "union_density",
    "union_p20",
    "union_p80",
    "independent",
    "ratio",
    "by_rate",
    "rate_ratio",
    "density",
    "calibrated",
    "lookahead",
    "predictor_dtype",
    "tokens",
    "windows",
    "documents",
    "seq_len",
    "draws",
    "seed",
    "data",
    "dtype",
    "synthetic",
    "device",
    "commit",
    "torch",
    "triton",
    "vllm",
    "transformers",
}


# Requests out of text.


def documents(*lengths: int) -> list[list[int]]:
    """Every token tells its document and its place."""
    return [[1000 * (i + 1) + n for n in range(length)] for i, length in enumerate(lengths)]


def test_windows_lie_in_one_document_and_come_once():
    tokens, owner = batching.windows_of(
        documents(35, 9, 100, 61), seq_len=11, bos=BOS, num_tokens=10**6, seed=0
    )
    assert tokens.shape == (3 + 10 + 6, 11) and (tokens[:, 0] == BOS).all()
    assert torch.equal(tokens[:, 1:] // 1000 - 1, owner[:, None].expand(-1, 10)), "a window mixes documents"
    assert owner.unique().tolist() == [0, 2, 3], "a document shorter than a window gives none"
    assert torch.equal(tokens[:, 1:].diff(dim=1), torch.ones(19, 9, dtype=torch.long)), (
        "a window is no piece of text"
    )
    assert len({tuple(row) for row in tokens.tolist()}) == 19


def test_documents_take_turns():
    """A long first document must not be all there is."""
    tokens, owner = batching.windows_of(
        documents(1000, 20, 30), seq_len=11, bos=BOS, num_tokens=8 * 11, seed=0
    )
    assert owner.tolist() == [0, 1, 2, 0, 1, 2, 0, 2]
    first = sorted(tokens[owner == 0][:, 1].tolist())
    assert first != [1000, 1010, 1020], "windows come from its beginning only"
    other, _ = batching.windows_of(documents(1000, 20, 30), seq_len=11, bos=BOS, num_tokens=8 * 11, seed=1)
    assert not torch.equal(tokens, other)


def test_text_without_a_window():
    with pytest.raises(DataError, match="at least 10 tokens, the longest has 9"):
        batching.windows_of(documents(9, 3), seq_len=11, bos=BOS, num_tokens=100, seed=0)


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 12], ids=lambda b: f"batch{b}")
def test_a_step_holds_one_token_of_each_of_its_windows(batch):
    owner, seq_len = torch.tensor([0, 1, 2, 3] * 3), 5
    steps = batching.draw(owner, seq_len, batch, 200, torch.Generator().manual_seed(0))
    assert steps.shape == (200, batch)
    assert (steps % seq_len > 0).all(), "first tokens are never decoded"
    assert set((steps % seq_len).flatten().tolist()) == {1, 2, 3, 4}
    for windows in (steps // seq_len).tolist():
        assert len(set(windows)) == batch, "a request twice in a step"
        counts = torch.bincount(owner[torch.tensor(windows)], minlength=4)
        assert counts.max() - counts.min() <= 1, "two of a document while others have none"
    assert set((steps // seq_len).flatten().tolist()) == set(range(12)), "some window never comes"


def test_draws_follow_the_seed():
    owner = torch.arange(20)
    first, again, other = (
        batching.draw(owner, 9, 4, 10, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_more_requests_than_windows():
    with pytest.raises(ValueError, match="--batch 4 needs as many windows of text, there are 3"):
        batching.draw(torch.arange(3), 9, 4, 1, torch.Generator())


# Unions.


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def test_unions_by_hand():
    mask = mask_of("1000", "1100", "0011", "0000")
    assert batching.unions(mask, torch.tensor([[0], [1], [3]])) == [0.25, 0.5, 0.0]
    assert batching.unions(mask, torch.tensor([[0, 1], [0, 2], [1, 2], [3, 3]])) == [0.5, 0.75, 1.0, 0.0]
    assert batching.unions(mask, torch.tensor([[0, 1, 2, 3]])) == [1.0]


def test_independence_by_hand():
    assert [batching.independent(0.5, b) for b in (1, 2, 3)] == [0.5, 0.75, 0.875]
    assert batching.independent(0.1, 64) == pytest.approx(1 - 0.9**64)
    assert batching.independent(0.0, 8) == 0 and batching.independent(1.0, 8) == 1


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rates_give_the_mean_over_all_steps(batch):
    """Every step of independently drawn rows, one by one."""
    mask = torch.rand(6, 11, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 11)
    every = [
        float(mask[list(rows)].any(0).float().mean()) for rows in itertools.product(range(6), repeat=batch)
    ]
    assert batching.by_rate(mask.double().mean(0), batch) == pytest.approx(sum(every) / len(every), abs=1e-6)


def test_unequal_rates_read_less():
    rates = torch.tensor([0.9, 0.1, 0.0, 0.0])
    assert batching.by_rate(rates, 1) == pytest.approx(batching.independent(0.25, 1))
    assert batching.by_rate(rates, 4) < batching.independent(0.25, 4) - 0.2
    assert batching.by_rate(torch.full((5,), 0.3), 4) == pytest.approx(batching.independent(0.3, 4))


def measured(
    mask: torch.Tensor, steps: dict[int, list[list[int]]], decoded: list[bool] | None = None
) -> list[dict]:
    keep = torch.ones(len(mask), dtype=torch.bool) if decoded is None else torch.tensor(decoded)
    return batching.measure(mask, keep, {batch: torch.tensor(rows) for batch, rows in steps.items()})


def test_rows_that_choose_alike_share_everything():
    one, two = measured(mask_of(*["1100"] * 6), {1: [[0], [3]], 2: [[0, 1], [4, 5]]})
    assert (one["batch"], one["union_density"], one["density"], one["ratio"]) == (1, 0.5, 0.5, 1.0)
    assert (two["batch"], two["union_density"], two["independent"]) == (2, 0.5, 0.75)
    assert two["ratio"] == pytest.approx(2 / 3) and two["by_rate"] == 0.5 and two["rate_ratio"] == 1


def test_rows_that_avoid_each_other_share_nothing():
    (two,) = measured(mask_of("1000", "0100", "0010", "0001"), {2: [[0, 1], [2, 3], [1, 2]]})
    assert (
        two["union_density"] == 0.5
        and two["independent"] == pytest.approx(0.4375)
        and two["ratio"] > 1
        and two["rate_ratio"] > 1
    )


def test_quantiles_are_those_of_the_draws():
    mask = mask_of(*("1" * n + "0" * (10 - n) for n in range(11)))
    (one,) = measured(mask, {1: [[n] for n in range(11)]})
    assert (one["union_density"], one["union_p20"], one["union_p80"]) == pytest.approx((0.5, 0.2, 0.8))


def test_rates_are_those_of_rows_that_may_be_drawn():
    """A first token, which is never decoded, selects everything."""
    (one,) = measured(mask_of("1111", "1000", "1000"), {1: [[1], [2]]}, decoded=[False, True, True])
    assert (one["density"], one["union_density"], one["ratio"]) == (0.25, 0.25, 1.0)


def test_nothing_selected_has_no_ratio():
    (two,) = measured(mask_of("000", "000"), {2: [[0, 1]]})
    assert (two["union_density"], two["independent"], two["ratio"], two["rate_ratio"]) == (0, 0, None, None)


# What is shown.


def shown(layer, block, selection, batch, union, independent=0.5, rate=0.25, **kwargs):
    return {
        "layer": layer,
        "block": block,
        "selection": selection,
        "batch": batch,
        "union_density": union,
        "independent": independent,
        "by_rate": rate,
        **kwargs,
    }


def test_means_are_over_layers_with_a_gate():
    rows = [
        shown("0", "mlp", "predicted", "2", "0.2"),
        shown("1", "mlp", "predicted", "2", "0.4", "0.7", "0.35"),
        shown("0", "mlp", "active", "2", "0.1"),
        shown("1", "mlp", "active", "2", "0.3"),
        shown("2", "mlp", "active", "2", "0.9"),
        shown("0", "mlp", "predicted", "1", "0.2"),
        shown("0", "attention", "predicted", "2", "1"),
        shown("1", "attention", "active", "4", "1"),
    ]
    first, second, heads = batching.means(rows)
    assert (first["block"], first["batch"], first["layers"], first["active"]) == ("mlp", 1, 1, None)
    assert (second["batch"], second["layers"]) == (2, 2)
    assert (second["predicted"], second["active"], second["independent"], second["by_rate"]) == pytest.approx(
        (0.3, 0.2, 0.6, 0.3)
    ), "layer 2 is dense"
    assert (second["ratio"], second["rate_ratio"]) == pytest.approx((0.5, 1.0))
    assert (heads["block"], heads["batch"], heads["active"]) == ("attention", 2, None)
    table = batching.markdown([first, second, heads]).splitlines()
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert table[3] == "| MLP (2 layers) | 2 | 0.300 | 0.200 | 0.600 | 0.50 | 0.300 | 1.00 |"
    assert table[4].startswith("| heads (1 layers) | 2 | 1.000 | - |")


# A model.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny OPT with a tokenizer; its artifact gates layers 0 and 1."""
    directory = tiny.make_opt(tmp_path_factory.mktemp("batching") / "model", vocab=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "opt-books-7m" / name, directory / name)
    union = {"1": {"mean": 0.3, "upper": 0.4}, "4": {"mean": 0.7, "upper": 0.8}}
    tiny.make_artifact(
        directory / "dejavu",
        directory,
        density=0.3,
        attention="previous",
        dense_layers=(2,),
        dtype="int8",
        union_density=union,
    )
    # Thresholds among the contributions, so that some heads are active.
    opt, norms = HfModel(str(directory)), {}

    def on_attention(layer, states, attn):
        norms[layer] = head_contributions(attn, opt.head_grams(layer))

    with opt.observed(on_attention):
        opt.decoder(torch.randint(4, 8192, (4, 32), generator=torch.Generator().manual_seed(1)))
    loaded = artifact.load(directory / "dejavu")
    layers = tuple(
        (
            {**gates, "attention": replace(gates["attention"], threshold=float(norms[i].median()))}
            if gates["attention"].sparse
            else gates
        )
        for i, gates in enumerate(loaded.manifest.layers)
    )
    artifact.save(
        directory / "dejavu", replace(loaded.manifest, layers=layers), loaded.tensors, overwrite=True
    )
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(
            " ".join(f"By the {word} in the year {n} nobody spoke of it." for n in range(40))
            for word in ("river", "sea", "hill", "road")
        ),
        encoding="utf-8",
    )
    return path


def test_masks_are_those_of_calibration(model):
    """Predicted and truly active, of both blocks, with every gate's mask applied."""
    opt, gates = HfModel(str(model)), batching.gates_of(artifact.load(model / "dejavu"))
    assert sorted(gates) == [(layer, block) for layer in (0, 1) for block in ("attention", "mlp")]
    tokens = torch.randint(4, 8192, (batching.FORWARD + 3, 24), generator=torch.Generator().manual_seed(0))
    run = Masked(opt, gates, measure=True)
    run.nll(tokens, batching.FORWARD)
    found = dict(batching.layers(opt, gates, tokens))
    assert list(found) == [0, 1, 2]
    assert set(found[2]) == {("mlp", "active")}, (
        "layer 2 has no gate, so no predictions, and its heads no threshold"
    )
    for (layer, block), counts in run.counts.items():
        assert torch.equal(found[layer][block, "predicted"].sum(1), torch.cat(counts)), (layer, block)
    for (layer, block), active in run.active.items():
        mask = found[layer][block, "active"]
        assert mask.shape == (tokens.numel(), 256 if block == "mlp" else 2)
        assert int(mask.sum()) == active and 0 < active < mask.numel(), (layer, block)


def test_a_run(model, text, tmp_path, capsys):
    batching.main(
        [
            "--model",
            str(model),
            "--data",
            str(text),
            "--output",
            str(tmp_path),
            "--tokens",
            "512",
            "--seq-len",
            "32",
            "--batch",
            "1",
            "4",
            "16",
            "--draws",
            "40",
        ]
    )
    with (tmp_path / "batching.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == COLUMNS
    points = [(r["layer"], r["block"], r["selection"], r["batch"]) for r in rows]
    gated = list(itertools.product("01", ("mlp", "attention"), ("predicted", "active"), ("1", "4", "16")))
    assert points == [*gated, *itertools.product("2", ["mlp"], ["active"], ("1", "4", "16"))]
    assert {(r["windows"], r["documents"], r["tokens"], r["data"]) for r in rows} == {
        ("16", "4", "512", "text.txt")
    }
    for (layer, _, selection), group in itertools.groupby(
        rows, lambda r: (r["layer"], r["block"], r["selection"])
    ):
        one, *_, last = group = list(group)
        values = [float(r["union_density"]) for r in group]
        assert values == sorted(values), "a larger batch reads more"
        assert all(float(r["union_p20"]) <= float(r["union_p80"]) for r in group)
        assert float(one["independent"]) == float(one["density"]) == pytest.approx(values[0], abs=0.2)
        assert float(last["independent"]) == pytest.approx(1 - (1 - float(last["density"])) ** 16, abs=1e-4)
        assert [r["calibrated"] for r in group] == (
            ["0.3", "0.7", "0.9919"] if selection == "predicted" else [""] * 3
        )
        assert one["predictor_dtype"] == ("" if layer == "2" else "int8")
    printed = capsys.readouterr().out
    assert "text.txt: 16 windows of 32 tokens, of 4 documents; 40 draws" in printed
    assert "| MLP (2 layers) | 16 |" in printed and "| heads (2 layers) | 4 |" in printed
    assert (tmp_path / "batching.png").exists() or "matplotlib is not installed" in printed


def test_a_run_follows_its_seed(model, text, tmp_path):
    def run(name: str, seed: int) -> str:
        out = tmp_path / name
        batching.study(
            batching.options().parse_args(
                [
                    "--model",
                    str(model),
                    "--data",
                    str(text),
                    "--output",
                    str(out),
                    "--tokens",
                    "256",
                    "--seq-len",
                    "32",
                    "--batch",
                    "2",
                    "--draws",
                    "5",
                    "--seed",
                    str(seed),
                ]
            )
        )
        return (out / "batching.csv").read_text(encoding="utf-8")

    first = run("first", 0)
    assert run("again", 0) == first
    assert run("other", 1).replace(",5,1,", ",5,0,") != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--data", "missing.txt"], "No such file", id="no-text"),
        pytest.param(["--batch", "0"], "--batch [0] is too small", id="batch-0"),
        pytest.param(["--draws", "0"], "--draws 0 is too small", id="no-draws"),
        pytest.param(
            ["--tokens", "64", "--seq-len", "32", "--batch", "64"], "there are 2", id="too-little-text"
        ),
        pytest.param(
            ["--predictor", "/no/such/place"], "No predictor artifact at /no/such/place", id="no-artifact"
        ),
    ],
)
def test_refusals_are_lines(model, text, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as failed:
        batching.main(["--model", str(model), "--data", str(text), "--output", str(tmp_path), *arguments])
    assert failed.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "batching.csv").exists()


def test_an_artifact_of_other_weights_is_refused(model, text, tmp_path, capsys):
    other = tiny.make_artifact(tmp_path / "other", model, fingerprint="sha256:other")
    with pytest.raises(SystemExit):
        batching.main(
            [
                "--model",
                str(model),
                "--predictor",
                str(other),
                "--data",
                str(text),
                "--output",
                str(tmp_path / "out"),
            ]
        )
    assert "trained on the weights" in capsys.readouterr().err
