"""`vllm-dejavu probe`: what is counted of a model, against our counts; what is modelled, against bytes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_dejavu import cli
from vllm_dejavu.predictor_training import probe
from vllm_dejavu.predictor_training.probe import ProbeConfig, Sizes, find_modules, modelled, shares_that_hold


def make_llama(directory, activation="relu"):
    """A tiny gated model, tied to nothing that is served."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        hidden_act=activation,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def probed(model, **options):
    return probe.run(ProbeConfig(str(model), tokens=512, seq_len=32, **options))


def test_shares_that_hold():
    """Of 10, 4, 4, 2 the first holds half, the first three 90%; a row of zeros is held by one."""
    amounts = torch.tensor([[4.0, 10.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert shares_that_hold(amounts, (0.5, 0.9, 0.91))[0].tolist() == [0.25, 0.75, 1.0]
    assert shares_that_hold(torch.ones(1, 4), (0.25, 0.26, 1.0)).tolist() == [[0.25, 0.5, 1.0]]


@pytest.mark.parametrize("family", ["opt", "nemotron", "llama"])
def test_counts(family, opt, nemotron, tmp_path, monkeypatch):
    """Densities of all tokens, neurons that never fire, unions of drawn tokens: as hooks of ours see them."""
    model = make_llama(tmp_path / "m") if family == "llama" else {"opt": opt, "nemotron": nemotron}[family]()
    given = []
    texts = probe._texts
    monkeypatch.setattr(probe, "_texts", lambda *args: given.append(texts(*args)) or given[-1])
    result = probed(model)
    hf = probe.AutoModelForCausalLM.from_pretrained(model).eval()
    down = {"opt": "fc2", "nemotron": "mlp.down_proj", "llama": "mlp.down_proj"}[family]
    seen: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(find_modules(hf, "").layers):
        layer.get_submodule(down).register_forward_pre_hook(
            lambda m, args, i=i: seen.setdefault(i, []).append(args[0].flatten(0, -2) != 0)
        )
    with torch.inference_mode():
        for window in given[0]:
            hf(window[None])
    assert result["served"] == (family != "llama") and len(seen) == len(result["measured"]["layers"])
    assert result["sizes"]["matrices"] == (3 if family == "llama" else 2)
    for i, layer in enumerate(result["measured"]["layers"]):
        alive = torch.cat(seen[i])
        assert layer["density"] == pytest.approx(float(alive.float().mean()), abs=1e-6)
        assert layer["never"] == pytest.approx(float((~alive.any(0)).float().mean()), abs=1e-6)
        unions = list(layer["union"].values())
        assert unions == sorted(unions) and unions[0] == pytest.approx(layer["density"], abs=0.03)
        assert unions[-1] <= 1 - layer["never"] + 1e-6
        energy, heads = list(layer["energy"].values()), list(layer["heads"].values())
        assert energy == sorted(energy) and 0 < energy[0] < energy[-1] <= layer["density"] + 0.05
        assert heads == sorted(heads) and 0 < heads[-1] <= 1


def test_modelled_bytes():
    """By hand: 2 layers of 4 x 8, 2 heads of 2, one of keys, vocabulary 10; half of fc2 is read."""
    sizes = Sizes(2, 4, 8, 2, 1, 2, 10, 2)
    rows = {(r["batch"], r["bits"]): r for r in modelled(sizes, dict.fromkeys(probe.BATCHES, 0.5))}
    attention, matrix, head = 2 * 4 * 2 * 3, 32, 40
    stock, exact = (2 * (attention + n * matrix) + head for n in (2, 1.5))
    assert rows[1, 16]["stock_mb"] == pytest.approx(2 * stock / 1e6)
    assert rows[1, 16]["exact_mb"] == pytest.approx(2 * exact / 1e6)
    assert rows[8, 4]["exact_speedup"] == pytest.approx(stock / exact)
    rank = probe.default_rank(4, 8, 1)
    predicted = 2 * (attention + matrix) + head
    assert rows[1, 8]["predictors_mb"] == pytest.approx((predicted + 2 * rank * 12) / 1e6)


def test_the_command(nemotron, tmp_path, capsys):
    argv = ["probe", str(nemotron()), "--tokens", "256", "--seq-len", "32", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "**Measured** on 256 tokens (self)" in printed and "**Modelled**, from bytes" in printed
    assert "NemotronForCausalLM, served with --model-impl dejavu" in printed
    saved = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert saved["measured"]["tokens"] == 256 and len(saved["modelled"]) == 21
    assert (tmp_path / "out" / "probe.md").read_text().strip() in printed
    assert (tmp_path / "out" / "probe.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: make_llama(d / "m", "silu"), "with 'silu': 100.0% of all neurons are not 0"),
        (lambda d: "/no/such/place", "no such directory, and not a hub id"),
    ],
    ids=["silu", "nowhere"],
)
def test_refused(make, words, tmp_path, capsys):
    assert cli.main(["probe", str(make(tmp_path)), "--tokens", "128", "--seq-len", "32"]) == 1
    assert words in capsys.readouterr().err


def test_too_little_is_refused(capsys):
    assert cli.main(["probe", "anything", "--tokens", "3"]) == 1
    assert "--tokens 3 is too few: at least 64" in capsys.readouterr().err


def test_times_on_a_gpu(opt, tmp_path, capsys):
    """Of the model that `plan` has, at the unions that were counted; apart from what was measured."""
    from vllm_dejavu.plan import find_model
    from vllm_dejavu.published import DEVICES
    from vllm_dejavu.roofline import Workload, account

    result = probed(opt(), gpu="h200")
    rows = {(row["batch"], row["bits"]): row for row in result["modelled_on"]["rows"]}
    geometry = find_model(str(opt()))[0]
    for batch in (1, 64):
        union = result["measured"]["union"][batch]
        found = account(geometry, DEVICES["h200"], Workload(batch=batch, mlp_density=union, head_density=1.0))
        row = rows[batch, 16]
        assert row["stock_16_ms"] == row["stock_ms"] == found.dense_step_us / 1e3
        assert row["predictors_ms"] == found.sparse_step_us / 1e3
        bandwidth = DEVICES["h200"].read_us(geometry.hidden_size * geometry.ffn_dim * 2 * (1 - union))
        assert row["exact_ms"] == pytest.approx(row["stock_ms"] - geometry.num_layers * bandwidth / 1e3)
        assert rows[batch, 4]["stock_ms"] < rows[batch, 8]["stock_ms"] < row["stock_ms"]
    assert "**Modelled** on H200" in probe.report(result)
    assert "Modelled** on" not in probe.report(probed(opt()))
    with pytest.raises(ValueError, match="--gpu 'tpu' is unknown: expected one of a100"):
        probed(opt(), gpu="tpu")
    with pytest.raises(ValueError, match="architectures that are served .*this model is a LlamaForCausalLM"):
        probed(make_llama(tmp_path / "m"), gpu="h200")
