"""`vllm-dejavu tune`: what is run, what follows from the times, and that engines take it. No time is
asserted.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from engine import engine, generate, model_of, random_prompt

from vllm_dejavu import artifact, cli, tune, tune_cache
from vllm_dejavu.kernels import cpu as native
from vllm_dejavu.kernels.interface import implementation
from vllm_dejavu.manifest import MANIFEST_FILE, TENSORS_FILE, ArtifactError
from vllm_dejavu.metrics import GATE_COUNTERS

CPU = torch.device("cpu")
TABLE = {"mlp": {1: 0.6, 2: 0.2}, "attention": {1: 0.0}}


@pytest.fixture(scope="module")
def made(opt, predictors):
    model = opt()
    union = {str(batch): {"mean": d, "upper": d} for batch, d in {1: 0.5, 2: 0.55, 4: 0.7}.items()}
    return model, predictors(model, union_density=union)


@pytest.fixture
def place(made, tmp_path):
    """A copy of the artifact that a test may add to."""
    copy = tmp_path / "artifact"
    copy.mkdir()
    for file in (MANIFEST_FILE, TENSORS_FILE):
        (copy / file).write_bytes((made[1] / file).read_bytes())
    return copy


def key_of(place, dtype=torch.float32, tp=1, bits=16):
    return tune.Key.of(artifact.load(place), CPU, dtype, tp, bits)


def write(place, key, table=TABLE):
    return tune.save(place, key, {"crossovers": table}, {"torch": torch.__version__})


class FakeTimer:
    """Runs everything once; says that dense takes `dense` and that sparse takes 2 + 16 a density."""

    dense = 10.0

    def __init__(self, device, rounds):
        assert rounds == 3

    def __call__(self, runs, copies):
        assert copies >= 2
        for run in runs.values():
            run(0), run(copies - 1)
        if "all" in runs:  # the cache of all heads, and of half of them
            return dict.fromkeys(runs, [10.0])
        units = 2 if "2" in runs else 1  # runs of heads are named by their number
        return {
            name: [1e9, self.dense if name == "dense" else 2 + 16 * float(name) / units, 0.0] for name in runs
        }


@pytest.mark.parametrize(
    ("dense", "mlp", "attention"),
    [
        pytest.param(10.0, 0.5, 0.5, id="half"),
        pytest.param(100.0, 1.0, 1.0, id="never-slower"),
        pytest.param(1.0, 0.0, 0.0, id="always-slower"),
    ],
)
def test_crossovers_follow_from_the_times(made, monkeypatch, dense, mlp, attention):
    monkeypatch.setattr(tune, "Timer", FakeTimer)
    monkeypatch.setattr(FakeTimer, "dense", dense)
    monkeypatch.setattr(tune, "ROTATED_BYTES", 1)
    loaded, said = artifact.load(made[1]), []
    result = tune.measure(
        key_of(made[1]), loaded.manifest.model, CPU, tokens=[1, 3], rounds=3, progress=said.append
    )
    # Lists are drawn, so that their densities are near those that were asked for.
    assert result["crossovers"]["mlp"] == {1: pytest.approx(mlp, abs=0.15), 3: pytest.approx(mlp, abs=0.15)}
    assert result["crossovers"]["attention"] == {
        1: pytest.approx(attention, abs=1e-3),
        3: pytest.approx(attention, abs=1e-3),
    }
    assert result["measured"]["mlp"][3]["dense_us"] == dense and len(
        result["measured"]["mlp"][3]["sparse_us"]
    ) == len(tune.DENSITIES)
    assert len(said) == 4 + len(result.get("cache_measured", ())) and "3 tokens" in said[1]
    assert result.get("cache_crossover", tune_cache.NEVER) == tune_cache.NEVER


def test_of_neighbouring_batch_sizes_the_lowest_counts():
    assert tune._cautious({1: 0.9, 2: 0.5, 4: 0.8, 8: 0.85, 16: 0.9}) == {
        1: 0.5,
        2: 0.5,
        4: 0.5,
        8: 0.8,
        16: 0.85,
    }
    assert tune._cautious({4: 0.7}) == {4: 0.7}


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_timed_is_what_a_layer_runs(made, monkeypatch, bits):
    """The sparse side at density 1 gives the dense side's numbers, so that neither does less than it
    should.
    """
    layers, results = tune._Layers(key_of(made[1], bits=bits), 32, CPU, 4), []
    weights = [rows[0].weight for rows in (layers.fc1, layers.fc2, layers.qkv, layers.out)]
    assert {w.dtype for w in weights} == {torch.int8 if bits == 8 else torch.float32}
    for side in ("sparse_mlp", "linear", "sparse_qkv"):
        inner = getattr(layers.impl, side)
        monkeypatch.setattr(
            layers.impl, side, lambda *args, inner=inner, **options: results.append(inner(*args, **options))
        )
    for block, full in (("mlp", "1.0"), ("attention", "2")):
        runs, real = getattr(layers, block)(4, [1.0])
        assert real == {full: 1.0}
        runs["dense"](1), runs[full](1)
    dense, sparse, qkv, out, sparse_qkv = results
    assert torch.allclose(dense, sparse, atol=1e-4) and torch.allclose(qkv, sparse_qkv, atol=1e-4)
    assert min(result.abs().max() for result in results) > 0.1


def test_on_a_cpu_masking_heads_is_timed_too(made, monkeypatch):
    """Its attention computes all heads, of which a served layer then drops those that a row did not
    select.
    """
    layers, masked = tune._Layers(key_of(made[1]), 32, CPU, 3), []
    inner = layers.impl.mask_heads
    monkeypatch.setattr(layers.impl, "mask_heads", lambda *args: masked.append(args) or inner(*args))
    runs, real = layers.attention(3, [0.5])
    assert real == {"1": 0.5}
    runs["dense"](0)
    assert not masked
    runs["1"](0)
    assert len(masked) == 1


def test_the_largest_rank_is_measured(made):
    """Gates of heads have none."""
    loaded = artifact.load(made[1])
    assert key_of(made[1]).rank == max(layer["mlp"].rank for layer in loaded.manifest.layers) > 0


def test_kept_and_found_again(place):
    key = key_of(place)
    assert tune.load(place, key) is None
    path = write(place, key)
    assert (
        path.parent == place / "tuned"
        and "float32" in path.name
        and f"{torch.get_num_threads()}-threads" in path.name
    )
    assert tune.load(place, key) == tune.Tuned(TABLE)
    write(place, key, {"mlp": {1: 0.9}, "attention": {1: 0.5}})
    assert tune.load(place, key).crossovers["mlp"] == {1: 0.9} and len(list(path.parent.iterdir())) == 1
    for changed in (
        {"rank": 99},
        {"kernels": "others"},
        {"threads": 77},
        {"dtype": "bfloat16"},
        {"hidden": 1},
        {"weight_bits": 8},
    ):
        assert tune.load(place, dataclasses.replace(key, **changed)) is None, changed
    assert key_of(place, tp=2).ffn * 2 == key.ffn and tune.load(place, key_of(place, tp=2)) is None


def test_a_file_from_before_there_were_weight_bits(place):
    key = key_of(place)
    path = write(place, key)
    found = json.loads(path.read_text())
    del found["key"]["weight_bits"]
    path.write_text(json.dumps(found))
    assert tune.load(place, key) == tune.Tuned(TABLE)


def test_8_bits_are_measured_and_taken_apart(made, place):
    in_8 = {"predictor": place, "weight_bits": 8}
    with engine(made[0], dejavu=in_8):
        threads = torch.get_num_threads()  # of the worker, which is this process
    for bits, densities in ((16, 0.0), (8, 1.0)):
        table = {block: {1: densities, 2: densities} for block in TABLE}
        write(place, dataclasses.replace(key_of(place, bits=bits), threads=threads), table)
    with engine(made[0], dejavu=in_8) as llm:
        assert {gate.max_tokens for gate in model_of(llm).gates} == {None}
    with engine(made[0], dejavu={"predictor": place}) as llm:
        assert {gate.max_tokens for gate in model_of(llm).gates} == {0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:-5],
        lambda t: "[]",
        lambda t: t.replace("0.6", "1.6"),
        lambda t: t.replace('"mlp": {', '"mlpp": {'),
        lambda t: t.replace("0.6", '"x"'),
        lambda t: t.replace('"1": 0.6', '"one": 0.6'),
        lambda t: t.replace('"versions"', '"cache_crossover": -1, "versions"'),
        lambda t: t.replace('"versions"', '"cache_crossover": 0.5, "versions"'),
    ],
    ids=["cut", "no-object", "out-of-range", "no-block", "no-number", "no-size", "below-0", "no-integer"],
)
def test_a_damaged_file_is_an_error_with_its_remedy(place, damage):
    path = write(place, key_of(place))
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ArtifactError, match=r"tuned/.*Delete it, or tune again"):
        tune.load(place, key_of(place))


def test_an_engine_takes_what_was_measured_here(made, place):
    with engine(made[0], dejavu={"predictor": place}) as llm:
        assert model_of(llm).tuned is None
        threads = torch.get_num_threads()  # of the worker, which is this process
    write(place, dataclasses.replace(key_of(place), threads=threads))
    with engine(made[0], dejavu={"predictor": place}) as llm:
        limits = {gate.block: gate.max_tokens for gate in model_of(llm).gates}
    # Unions 0.5, 0.55: below 0.6 at one token, above 0.2 at two; no head density is below 0.
    assert limits == {"mlp": 1, "attention": 0}
    with engine(made[0], dejavu={"predictor": place, "crossover": 1.0}) as llm:
        assert {gate.max_tokens for gate in model_of(llm).gates} == {None}, "the setting comes first"


@pytest.mark.parametrize(
    ("largest", "expected"), [(2, 64), (96, 96)], ids=["measured-below-the-cap", "measured-beyond-it"]
)
def test_the_cap_gives_way_to_larger_batches_that_were_measured(made, place, monkeypatch, largest, expected):
    monkeypatch.setattr(implementation("cpu"), "largest_batch", 64)
    with engine(made[0], dejavu={"predictor": place}) as llm:
        threads = torch.get_num_threads()  # of the worker, which is this process
    never = {1: 1.0, largest: 1.0}
    write(place, dataclasses.replace(key_of(place), threads=threads), {"mlp": never, "attention": never})
    with engine(made[0], dejavu={"predictor": place}) as llm:
        assert {gate.max_tokens for gate in model_of(llm).gates} == {expected}


@pytest.mark.skipif(not native.available(), reason=native.MISSING)
def test_an_engine_takes_the_cache_crossover(made, place):
    """The setting, else what was measured, else the built-in one: in tokens of all sequences, from the two
    heads' calibrated density.
    """

    def least_cached(**settings):
        with engine(made[0], dejavu={"predictor": place, **settings}) as llm:
            generate(llm, [random_prompt(5)])
            gates = [gate for gate in model_of(llm).gates if gate.block == "attention"]
            assert {gate.spec.density["mean"] for gate in gates} == {0.5}
            return {gate.least_cached for gate in gates}, torch.get_num_threads()

    built_in = implementation("cpu").cache_crossover
    (least,), threads = least_cached()
    assert least == built_in
    measured = {"crossovers": TABLE, "cache_crossover": 77}
    key = dataclasses.replace(key_of(place), threads=threads)
    tune.save(place, key, measured, {"torch": torch.__version__})
    assert tune.load(place, key).cache_crossover == 77
    assert least_cached()[0] == {77}
    assert least_cached(cache_crossover=5)[0] == {5}


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (lambda spared: 0.25 * spared - 100, 400),
        (lambda spared: 0.25 * spared + 1, 0),
        (lambda spared: -10 - 0.1 * spared, tune_cache.NEVER),
    ],
    ids=["a-cost-once", "always", "never"],
)
def test_where_a_line_through_the_gains_crosses_zero(gain, expected):
    assert tune_cache.crossing([(n, gain(n), float(n)) for n in (100, 300, 1000)]) == expected


@pytest.mark.skipif(not native.available(), reason=native.MISSING)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_half_of_the_cache_is_read(monkeypatch, kv_heads):
    """The timed runs do what their names say, on copies of their own."""
    monkeypatch.setattr(tune_cache, "ROTATED_BYTES", 1)
    counted, said = [], []

    def timer(runs, copies):
        assert copies == 2 and set(runs) == {"all", "selected"}
        for name, run in runs.items():
            before = [read.clone() for read in counters]
            run(0), run(1)
            counted.append((name, sum(after - b for after, b in zip(counters, before, strict=True))))
        return {"all": [3.0, 1e9, 0.0], "selected": [2.0, 1e9, 0.0]}

    counters = []
    zeros = torch.zeros

    def watched(*shape, **options):
        made = zeros(*shape, **options)
        if shape == (len(GATE_COUNTERS),):
            counters.append(made)
        return made

    monkeypatch.setattr(tune_cache.torch, "zeros", watched)
    found = tune_cache.measure(4, kv_heads, 32, torch.float32, timer, said.append)
    rows = found["cache_measured"]
    assert len(rows) == len(said) == len(tune_cache.BATCHES) * len(tune_cache.CONTEXTS)
    held, read = (GATE_COUNTERS.index(name) for name in ("cache_held", "cache_read"))
    for row, of_all, of_selected in zip(rows, counted[::2], counted[1::2], strict=True):
        keys = row["batch"] * row["context"] * kv_heads
        assert of_all[0] == "all" and of_all[1][read] == of_all[1][held] == 2 * keys
        assert of_selected[1][held] == 2 * keys and of_selected[1][read] == keys
        assert row["spared"] == keys / 2 and (row["all_us"], row["selected_us"]) == (3.0, 2.0)


def test_the_command(place, capsys):
    threads = torch.get_num_threads()
    try:
        assert (
            cli.main(
                [
                    "tune",
                    str(place),
                    "--dtype",
                    "float32",
                    "--tokens",
                    "1",
                    "2",
                    "--rounds",
                    "2",
                    "--threads",
                    "1",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        key = key_of(place)
    finally:
        torch.set_num_threads(threads)
    assert key.threads == 1
    table, cache = tune.load(place, key)
    assert cache is None or cache >= 0
    assert (cache is not None) == native.available()
    assert all(set(sizes) == {1, 2} and all(0 <= d <= 1 for d in sizes.values()) for sizes in table.values())
    written = json.loads(key.file(place).read_text())
    assert (
        written["measured"]["mlp"]["1"]["dense_us"] > 0 and written["versions"]["torch"] == torch.__version__
    )
    assert f"written to {key.file(place)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tp", "3"], "--tp 3 does not divide 2 heads"),
        (["--rounds", "0"], "at least 1"),
        (["--tokens", "0"], "at least 1"),
        (["--threads", "0"], "at least 1"),
    ],
    ids=["tp", "rounds", "tokens", "threads"],
)
def test_the_command_refuses(place, capsys, args, message):
    assert cli.main(["tune", str(place), "--device", "cpu", *args]) == 1
    assert message in capsys.readouterr().err
