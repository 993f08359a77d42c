"""The existence study: its figures against brute force on tiny inputs, and one run of every part."""

import csv
import re
import shutil
import sys
from pathlib import Path

import existence
import pytest
import tiny
import torch
from existence_bytes import Weights
from existence_heads import MAP_FROM
from existence_oracle import BUDGET, SHARED, Oracle
from existence_predictability import MULTIPLE, Sums
from existence_search import mask_of, searches, with_bias, with_one
from existence_study import Study, Walk

from vllm_dejavu.predictor_training import forms
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.train import LayerWeights, fit_heads, fit_mlp
from vllm_dejavu.selection import contributions

ROOT = Path(__file__).parent.parent

PARTS_WITHOUT_FAISS = ["oracle", "bytes", "predictability", "drift", "heads"]
SEQ_LEN = 32


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with our tokenizer and a predictor, and two texts."""
    place = tmp_path_factory.mktemp("existence")
    model = tiny.make_opt(place / "model", vocab=8192)
    tiny.make_artifact(model / "dejavu", model, dtype="int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "opt-books-7m" / name, model / name)
    for name, word in (("train", "river"), ("held", "village")):
        text = "\n\n".join(
            " ".join(f"By the {word} in the year {n} nobody spoke of it, {d}." for n in range(40))
            for d in range(3)
        )
        (place / f"{name}.txt").write_text(text, encoding="utf-8")
    return place


def arguments(place, output, *parts):
    return [
        "--model",
        str(place / "model"),
        "--data",
        str(place / "train.txt"),
        "--held-out",
        str(place / "held.txt"),
        "--output",
        str(output),
        *"--tokens 512 --held-out-tokens 256 --scored-tokens 128 --layers 2 --batch 3".split(),
        *f"--seq-len {SEQ_LEN} --neighbours-rounds 2 --neighbours-tokens 4".split(),
        *"--neighbours-geometry 24x96".split(),
        "--parts",
        *parts,
    ]


@pytest.fixture(scope="module")
def results(place):
    out = place / "out"
    existence.main(arguments(place, out, *PARTS_WITHOUT_FAISS))
    return out, {
        p.stem.removeprefix("existence_"): list(csv.DictReader(p.open(newline=""))) for p in out.glob("*.csv")
    }


@pytest.fixture(scope="module")
def model(place):
    return HfModel(str(place / "model"))


@pytest.fixture(scope="module")
def tokens():
    return torch.cat(
        [torch.full((4, 1), 2), torch.randint(4, 8192, (4, SEQ_LEN - 1), generator=generator(3))], 1
    )


@pytest.fixture(scope="module")
def oracle(model):
    count = len(model.layers)
    norms = [model.weight(i, "fc2").norm(dim=0) for i in range(count)]
    return Oracle(
        model,
        norms,
        [model.head_grams(i) for i in range(count)],
        batch=3,
    )


# --- what is observed


def test_a_walk_sees_what_the_model_does(model, tokens):
    hidden = model.model(tokens, output_hidden_states=True).hidden_states
    walk, last_middle = Walk(model, tokens, batch=3), None
    for i, layer in enumerate(model.layers):
        seen = list(walk.layer())
        before, middle, z, attn_update, mlp_update = (
            torch.cat([getattr(s, n) for s in seen])
            for n in ("before", "middle", "z", "attn_update", "mlp_update")
        )
        torch.testing.assert_close(before, hidden[i].flatten(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(middle, before + attn_update)
        torch.testing.assert_close(
            torch.cat([s.after for s in seen]), middle + mlp_update, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(z, layer.fc1(layer.final_layer_norm(middle)), rtol=1e-4, atol=1e-4)
        attn_input = torch.cat([s.inputs["attn_input"] for s in seen])
        torch.testing.assert_close(attn_input, layer.self_attn_layer_norm(before), rtol=1e-4, atol=1e-4)
        if i:
            torch.testing.assert_close(torch.cat([s.inputs["previous"] for s in seen]), last_middle)
        else:
            assert "previous" not in seen[0].inputs
        last_middle = middle


def test_a_post_norm_model_walks_too(opt, tokens):
    post = HfModel(str(opt(pre_ln=False)))
    ids = tokens % tiny.VOCAB
    hidden = post.model(ids, output_hidden_states=True).hidden_states
    walk = Walk(post, ids, batch=4)
    for i, layer in enumerate(post.layers):
        [seen] = walk.layer()
        torch.testing.assert_close(seen.after, hidden[i + 1].flatten(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            seen.after, layer.final_layer_norm(seen.middle + seen.mlp_update), rtol=1e-4, atol=1e-4
        )


# --- oracle


def test_a_selection_of_everything_costs_nothing(model, oracle, tokens):
    """Both rules, one pass and two: nothing but the inactive is left out, and every head is kept."""
    dense = model.nll(tokens).double().mean(1)
    units = {"neurons": 256, "heads": 2}
    for cuts in ({"neurons": [0.0] * 3, "heads": [0.0] * 3}, {b: [n] * 3 for b, n in units.items()}):
        one = oracle.score(tokens, cuts)
        torch.testing.assert_close(one.nats, dense, rtol=1e-4, atol=1e-5)
        assert one.mean_density("heads") == 1.0 and 0 < one.mean_density("neurons") < 0.6
        torch.testing.assert_close(
            oracle.score(tokens, cuts, two_pass=True).nats, dense, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("two_pass", [False, True], ids=["one pass", "two passes"])
@pytest.mark.parametrize("rule", ["threshold", "top"])
def test_oracle_equals_masks_by_hand(model, oracle, tokens, rule, two_pass):
    """In two passes the masks of the dense run apply, in one those of the masked run itself."""
    cuts = (
        {"neurons": [0.5] * 3, "heads": [3.4, 4.1, 4.8]}
        if rule == "threshold"
        else {"neurons": [11] * 3, "heads": [1] * 3}
    )
    count = {"neurons": 0.0, "heads": 0.0}

    def choose(block, layer, values):
        cut = cuts[block][layer]
        if rule == "threshold":
            mask = values > cut
        else:
            mask = (values >= values.sort(1, descending=True).values[:, cut - 1 : cut]) & (values > 0)
        count[block] += float(mask.float().mean()) / 3
        return mask

    def on_attention(layer, states, attn):
        return choose("heads", layer, contributions(attn, model.weight(layer, "self_attn.out_proj")))

    def on_mlp(layer, states, z):
        return choose("neurons", layer, z.relu() * model.weight(layer, "fc2").norm(dim=0))

    if two_pass:
        masks = {}
        with model.observed(
            lambda i, s, v: masks.update({("a", i): on_attention(i, s, v)}),
            lambda i, s, v: masks.update({("m", i): on_mlp(i, s, v)}),
        ):
            model.decoder(tokens)
        with model.observed(lambda i, s, v: masks["a", i], lambda i, s, v: masks["m", i]):
            expected = model.nll(tokens)
    else:
        with model.observed(on_attention, on_mlp):
            expected = model.nll(tokens)
    found = oracle.score(tokens, cuts, two_pass)
    torch.testing.assert_close(found.nats, expected.double().mean(1), rtol=1e-4, atol=1e-5)
    assert 0 < count["neurons"] < 0.4 and 0 < count["heads"] < 1
    for block in cuts:
        assert found.mean_density(block) == pytest.approx(count[block], abs=2e-3)
    other = oracle.score(tokens, cuts, not two_pass)
    assert float((other.nats - found.nats).abs().max()) > 1e-5  # the two are not the same thing


def test_limits_cost_no_more_than_the_budget(results):
    rows = {r["blocks"]: r for r in results[1]["oracle_limits"]}
    assert set(rows) == {"neurons", "heads", "both", SHARED}
    assert all(float(r["ppl_increase"]) <= BUDGET for r in rows.values())
    assert float(rows["neurons"]["heads_density"]) == 1 == float(rows["heads"]["neurons_density"])
    natural = [float(r["natural_density"]) for r in results[1]["oracle"]]
    assert float(rows["neurons"]["neurons_density"]) <= sum(natural) / len(natural) + 0.02
    shared = rows[SHARED]
    for kept, active in zip(
        shared["neurons_by_layer"].split(), natural, strict=True
    ):  # on other text than the thresholds', and behind masks
        assert float(kept) == pytest.approx(float(shared["neurons_nominal"]) * active, abs=0.05)


# --- bytes


def test_dense_reads_are_all_that_is_stored(model, opt):
    """What dense decoding does not read of a tied model are the other rows of the position table."""
    weights = Weights.of(model)
    positions = model.model.model.decoder.embed_positions.weight.numel()
    # A row of the token table is read for the embedding, and again with the whole table as LM head.
    assert weights.layers_read(1, 1, 1) + weights.outside - 2 * 64 == weights.stored - positions
    assert Weights.of(HfModel(str(opt(bias=False)))).layers_read(1, 1, 1) == 3 * (12 * 64 * 64 + 4 * 64)


def test_bytes_of_the_artifact_count_its_predictors(results):
    """Of each layer: rank 8 in int8 (half an element each) for the neurons, a linear one for the heads."""
    row = next(r for r in results[1]["bytes"] if r["point"].startswith("artifact"))
    hidden, ffn, heads, rank = 64, 256, 2, 8
    predictors = 3 * 0.5 * (rank * (hidden + ffn) + heads * hidden)
    layer = 4 * hidden**2 + 2 * hidden * ffn + 9 * hidden + ffn
    assert float(row["neurons"]) == float(row["heads"]) == 0.5
    dense = next(r for r in results[1]["bytes"] if r["point"] == "dense")
    assert float(dense["layers_read"]) == 1
    skipped = 0.5 * (2 * hidden**2 + hidden + 2 * hidden * ffn + ffn)  # half of Q, out_proj, fc1 and fc2
    assert float(row["layers_read"]) == pytest.approx(
        (3 * layer - 3 * skipped + predictors) / (3 * layer), rel=1e-5
    )


# --- predictability


def test_moments_of_any_input_reach_the_fits(model, tokens):
    """The regression on an input is least squares on it, whatever the fits call it."""
    walk = Walk(model, tokens, batch=2)
    sums, kept = Sums(), []
    for seen in walk.layer():
        inputs = {
            "embedding": torch.randn(len(seen.z), 64, generator=generator(len(kept))),
            "mlp_input": seen.inputs["mlp_input"],
        }
        heads = torch.randn(len(seen.z), 2, generator=generator(7 + len(kept)))
        sums.add_batch(inputs, seen.z > 0, seen.z.relu(), heads)
        kept.append((inputs["embedding"], seen.z, heads))
    x, z, heads = (torch.cat(parts).double() for parts in zip(*kept, strict=True))
    moments = sums.as_moments(0, "embedding")
    fit = fit_mlp(moments, 0, LayerWeights.of(model, 0), "attn_input", 64, forms.get("closed_form"))
    centred, ridge = x - x.mean(0), forms.RIDGE
    cov = centred.T @ centred / len(x)
    solve = torch.linalg.solve(
        cov + ridge * cov.diagonal().mean() * torch.eye(64, dtype=cov.dtype),
        centred.T @ (z - z.mean(0)) / len(x),
    )
    predicted = z.mean(0) + centred @ solve
    found = x @ (fit.up @ fit.down).T + fit.bias
    for neuron in range(0, 256, 51):  # up to a positive scale each
        assert float(torch.corrcoef(torch.stack([predicted[:, neuron], found[:, neuron]]))[0, 1]) > 0.999
        assert float(((predicted[:, neuron] > 0) == (found[:, neuron] > 0)).double().mean()) > 0.97
    by_head = fit_heads(moments, 0, "self")
    expected = torch.linalg.lstsq(centred, heads - heads.mean(0)).solution.T
    assert float((by_head.weight - expected).norm() / expected.norm()) < 0.05


def test_more_context_predicts_better(results):
    rows = results[1]["predictability"]
    auc = {(r["block"], int(r["layer"]), r["input"]): float(r["auc"]) for r in rows}
    assert {layer for _, layer, _ in auc} == {0, 2}  # --layers 2
    for layer in (0, 2):
        assert auc["neurons", layer, "mlp_input"] > 0.99  # pre-activations are linear in it
        assert (
            auc["neurons", layer, "mlp_input"]
            > auc["neurons", layer, "embedding"]
            > auc["neurons", layer, "random"]
        )
        assert abs(auc["neurons", layer, "random"] - 0.5) < 0.02
    assert ("neurons", 0, "previous") not in auc and ("neurons", 2, "previous") in auc
    random = [r for r in rows if r["input"] == "random" and r["block"] == "neurons"]
    for r in random:
        assert float(r["recall"]) == pytest.approx(MULTIPLE * float(r["density"]), abs=0.03)


# --- drift


def test_drift_equals_brute_force(place, results):
    study = Study(argparse_of(place))
    hidden = [
        h.view(-1, SEQ_LEN, 64)[:, 1:].flatten(0, 1)
        for h in study.opt.model.model.decoder(study.scored, output_hidden_states=True).hidden_states
    ]
    rows = results[1]["drift"]
    cosine = torch.nn.functional.cosine_similarity
    for i in (0, 1):  # what stands behind the last layer is returned after one more LayerNorm
        assert float(rows[i]["cos_next"]) == pytest.approx(
            float(cosine(hidden[i], hidden[i + 1], dim=1).mean()), abs=1e-4
        )
    assert float(rows[0]["cos_next_but_one"]) == pytest.approx(
        float(cosine(hidden[0], hidden[2], dim=1).mean()), abs=1e-4
    )
    caught = []
    hook = study.opt.layers[1].self_attn.out_proj.register_forward_hook(
        lambda m, a, o: caught.append(o.view(-1, SEQ_LEN, 64)[:, 1:].flatten(0, 1))
    )
    study.opt.decoder(study.scored)
    hook.remove()
    ratio = caught[0].norm(dim=1) / hidden[1].norm(dim=1)
    assert float(rows[1]["attn_update"]) == pytest.approx(float(ratio.mean()), abs=1e-3)
    assert float(rows[1]["attn_update_p5"]) <= float(ratio.median()) <= float(rows[1]["attn_update_p95"])
    assert rows[2]["cos_next_but_one"] == "" and rows[0]["cos_previous"] == ""


def argparse_of(place):
    class Arguments:
        model, data, held_out, output = (
            str(place / "model"),
            [str(place / "train.txt")],
            [str(place / "held.txt")],
            str(place / "unused"),
        )
        (
            tokens,
            held_out_tokens,
            scored_tokens,
            max_documents,
            seq_len,
            batch,
            layers,
            seed,
            device,
            predictor,
        ) = (
            512,
            256,
            128,
            None,
            SEQ_LEN,
            3,
            2,
            0,
            "cpu",
            None,
        )

    return Arguments()


@pytest.mark.parametrize(("asked", "layers"), [(12, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 2]), (1, [0])])
def test_layers_are_spread_evenly_and_all_taken_if_no_more_are_there(model, asked, layers):
    study = type("Some", (), {"opt": model, "args": type("Arguments", (), {"layers": asked})})()
    assert Study.some_layers(study) == layers


# --- neighbours


def test_without_faiss_the_part_says_so_and_the_others_run(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    existence.main(arguments(place, tmp_path, "neighbours", "bytes"))
    said = capsys.readouterr().out
    assert "SKIPPED, faiss is not installed; pip install faiss-cpu" in said
    assert "results of the part `oracle`" in said  # and what `bytes` alone has to do without
    assert (
        not (tmp_path / "existence_neighbours.csv").exists() and (tmp_path / "existence_bytes.csv").exists()
    )


def test_searches_find_what_brute_force_finds(place, tmp_path):
    faiss = pytest.importorskip("faiss", reason="needs faiss-cpu")
    faiss.omp_set_num_threads(1)
    g = generator()
    fc1, bias, x = (
        torch.randn(120, 16, generator=g) / 4,
        torch.randn(120, generator=g),
        torch.randn(10, 16, generator=g),
    )
    z = x @ fc1.T + bias
    top = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(12, dim=1).indices, True)
    for search in searches(faiss, with_bias(fc1, bias), 12):
        mask = mask_of(search.ids(with_one(x), 12), 120)
        assert int(mask.sum()) <= 120
        if search.method == "exact":
            assert torch.equal(mask, top)
        assert float((mask & top).sum()) / 120 > (0.25 if search.method == "IVF" else 0.6)
    existence.main(arguments(place, tmp_path, "neighbours"))
    rows = list(csv.DictReader((tmp_path / "existence_neighbours.csv").open(newline="")))
    synthetic = [r for r in rows if r["synthetic"] == "True"]
    assert {r["layer"] for r in rows} == {"0", "2", ""} and all(
        "SYNTHETIC 24x96" == r["database"] for r in synthetic
    )
    assert {r["method"] for r in rows} >= {
        "exact",
        "IVF",
        "predictor",
        "fc1 itself",
        "HNSW, inner product",
        "HNSW, L2 by augmentation",
    }
    assert all(float(r["us_p20"]) <= float(r["us"]) <= float(r["us_p80"]) for r in rows)
    # a random predictor has none
    assert not any(r["recall"] for r in synthetic if r["method"] == "predictor")
    exact = {r["layer"]: float(r["recall"]) for r in rows if r["method"] == "exact"}
    assert all(0.3 < v <= 1 for v in exact.values())


# --- heads


def test_heads_are_measured_on_the_models_own_attention(results, place, model):
    rows = results[1]["heads"]
    assert [(int(r["layer"]), int(r["head"])) for r in rows] == [(i, h) for i in range(3) for h in range(2)]
    study = Study(argparse_of(place))
    study.opt.model.set_attn_implementation("eager")
    maps = study.opt.model(study.held_out, output_attentions=True).attentions
    tail = maps[1][:, 1, MAP_FROM:].double()
    assert float(rows[3]["bos"]) == pytest.approx(float(tail[..., 0].mean()), abs=1e-4)
    entropy = -(tail * tail.clamp_min(1e-30).log()).sum(-1) / torch.arange(MAP_FROM + 1, SEQ_LEN + 1).log()
    assert float(rows[3]["entropy"]) == pytest.approx(float(entropy.mean()), abs=1e-3)
    overall = next(r for r in results[1]["heads_correlation"] if r["layer"] == "all")
    assert int(overall["n"]) == 6


# --- the report


def test_every_part_leaves_rows_with_provenance_and_pictures(results):
    out, tables = results
    assert set(tables) == {
        "oracle",
        "oracle_curve",
        "oracle_limits",
        "oracle_passes",
        "bytes",
        "predictability",
        "drift",
        "heads",
        "heads_correlation",
    }
    for rows in tables.values():
        assert rows and all(r["commit"] and r["torch"] for r in rows)
    for name in ("oracle", "bytes", "predictability", "drift", "heads", "attention"):
        assert (out / f"existence_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_begins_with_its_command_and_keeps_sections_of_earlier_runs(results, place):
    out, _ = results
    first = (out / "existence.md").read_text(encoding="utf-8")
    assert (
        first.splitlines()[2]
        .strip()
        .startswith("python benchmarks/studies/existence.py --model model --data train.txt")
    )
    assert str(place) not in first
    assert re.findall(r"<!-- part: (\w+)", first) == PARTS_WITHOUT_FAISS
    existence.main(arguments(place, out, "bytes"))
    second = (out / "existence.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- part: (\w+)", second) == PARTS_WITHOUT_FAISS
    assert second.count("This section: `") == 4 and second.count("## Weight bytes") == 1
    existence.main(arguments(place, out, "bytes"))
    assert (out / "existence.md").read_text(encoding="utf-8") == second
