"""Sparse engines on quantized checkpoints: compressed-tensors W8A8, whose integers are read as they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from engine import (
    TOLERANCE,
    Recorder,
    engine,
    generate,
    model_of,
    next_token_log_probs,
    one_collection,
    random_prompt,
)
from parallel_worker import observe
from safetensors.torch import load_file, save_file
from test_engine_int8 import PROMPTS, assert_alike, log_probs, meant
from test_engine_parallel import FLIPS_ALLOWED, flips, in_processes, job
from test_evaluate import MODEL, PROSE
from tiny import fingerprint_of, make_artifact, make_nemotron
from tolerances import relative_rms

from vllm_dejavu import cli
from vllm_dejavu.artifact import load

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import quantized


@pytest.fixture(scope="module")
def w8a8(opt, tmp_path_factory):
    return quantized.write(opt(layers=2), tmp_path_factory.mktemp("w8a8") / "model", "w8a8")


def artifact_of(model: Path, directory: Path, **options) -> Path:
    return make_artifact(directory, model, fingerprint=fingerprint_of(model), **options)


def test_sparse_equals_the_weights_that_are_meant(w8a8, opt, tmp_path):
    """The same selections, counts and log-probabilities as on a checkpoint of integers times scales."""
    rounded = meant(opt(layers=2), tmp_path / "rounded", head=False)
    expected, counted = log_probs(rounded, {"predictor": artifact_of(rounded, tmp_path / "a")})
    found, counts = log_probs(w8a8, {"predictor": artifact_of(w8a8, tmp_path / "b")})
    assert_alike(found, expected)
    assert counts["layers"] == counted["layers"] and counts["steps"] == counted["steps"]
    assert counts["artifact"]["fingerprint_verified"]
    assert (counts["weight_bits"], counts["lm_head_bits"]) == (8, 16)


def test_it_is_what_weight_bits_makes_of_the_original(w8a8, opt, predictors, tmp_path):
    """Rounding to nearest with a scale for each output is both."""
    model = opt(layers=2)
    settings = {"predictor": predictors(model), "weight_bits": 8, "lm_head_bits": 16}
    expected, _ = log_probs(model, settings)
    found, _ = log_probs(w8a8, {"predictor": artifact_of(w8a8, tmp_path / "a")})
    assert_alike(found, expected)


def test_everything_selected_equals_the_dequantized_model(w8a8, opt, tmp_path):
    settings = {"predictor": artifact_of(w8a8, tmp_path / "a", select_all=True), "apply_to": "all"}
    found, counts = log_probs(w8a8, settings)
    expected, _ = log_probs(meant(opt(layers=2), tmp_path / "rounded", head=False), {"mode": "dense"})
    assert_alike(found, expected)
    assert counts["mlp_density"] == counts["head_density"] == 1


def test_a_nemotron(tmp_path):
    """Whose linears checkpoints call by other names."""
    model = make_nemotron(tmp_path / "original", layers=2, tied=False)
    copy = quantized.write(model, tmp_path / "w8a8", "w8a8")
    expected, _ = log_probs(
        model, {"predictor": artifact_of(model, tmp_path / "a"), "weight_bits": 8, "lm_head_bits": 16}
    )
    found, counts = log_probs(copy, {"predictor": artifact_of(copy, tmp_path / "b")})
    assert_alike(found, expected)
    assert counts["weight_bits"] == 8 and 0 < counts["mlp_density"] < 1


@pytest.fixture(scope="module")
def w8a16(w8a8, tmp_path_factory):
    """The same integers, packed, for inputs that are not rounded."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    target = tmp_path_factory.mktemp("w8a16") / "model"
    shutil.copytree(w8a8, target)
    config = json.loads((target / "config.json").read_text())
    scheme = config["quantization_config"]
    scheme["format"] = "pack-quantized"
    scheme["config_groups"]["group_0"]["input_activations"] = None
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(target / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        weight = tensors.pop(name)
        tensors[f"{name}_packed"] = pack_to_int32(weight, 8)
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dense_layers", [(), (1,)], ids=["all", "one-dense"])
def test_weights_alone(w8a16, w8a8, dense_layers, tmp_path):
    """Where stock vLLM serves none of it on a CPU: layers without a gate are ours too."""
    found, counts = log_probs(
        w8a16, {"predictor": artifact_of(w8a16, tmp_path / "a", dense_layers=dense_layers)}
    )
    if not dense_layers:
        expected, counted = log_probs(w8a8, {"predictor": artifact_of(w8a8, tmp_path / "b")})
        assert_alike(found, expected)
        assert counts["layers"] == counted["layers"]
    assert counts["weight_bits"] == 8 and 0 < counts["mlp_density"] < 1


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_weights_alone_without_predictors(mode, w8a16, opt, tmp_path):
    found, _ = log_probs(w8a16, {"mode": mode})
    assert_alike(
        found, log_probs(meant(opt(layers=2), tmp_path / "rounded", head=False), {"mode": "dense"})[0]
    )


def test_layers_without_a_gate_are_stock_vllms(w8a8, tmp_path):
    artifact = artifact_of(w8a8, tmp_path / "a", dense_layers=(1,))
    with engine(w8a8, dejavu={"predictor": artifact}) as llm:
        first, second = model_of(llm).model.decoder.layers
        assert first.mlp.fc1.weight.dtype == torch.int8
        assert type(second.mlp.fc1.scheme).__name__.startswith("CompressedTensors")
        assert type(second.self_attn.out_proj.scheme).__name__.startswith("CompressedTensors")


def test_mode_dense_is_stock_vllm(w8a8):
    """Compared in fp32, where W8A8 rounds its inputs alike."""
    found, _ = log_probs(w8a8, {"mode": "dense"})
    with engine(w8a8, impl="vllm") as llm:
        with Recorder(llm) as recorder:
            generate(llm, PROMPTS, 12)
        assert_alike(found, next_token_log_probs(recorder.steps))


@pytest.fixture
def edited(w8a8, tmp_path):
    """edited(ignore=[...], weights={...}): a copy with another quantization_config, and, of what is ignored,
    weights in 16 bits.
    """

    def edit(ignore: tuple[str, ...] = (), **changes: dict) -> Path:
        target = tmp_path / "edited"
        shutil.copytree(w8a8, target)
        config = json.loads((target / "config.json").read_text())
        scheme = config["quantization_config"]
        scheme["ignore"] += list(ignore)
        for name, change in changes.items():
            if name == "kv_cache_scheme":
                scheme[name] = change
            else:
                scheme["config_groups"]["group_0"][name].update(change)
        (target / "config.json").write_text(json.dumps(config))
        tensors = load_file(target / "model.safetensors")
        for name in ignore:
            scale = tensors.pop(f"{name}.weight_scale")
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * scale
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return edit


def test_a_layer_that_is_not_quantized(edited, opt, tmp_path):
    """The MLP of the first layer in 16 bits, which hold what its integers stood for."""
    names = [f"model.decoder.layers.0.{name}" for name in ("fc1", "fc2")]
    model = edited(tuple(names))
    rounded = meant(opt(layers=2), tmp_path / "rounded", head=False)
    expected, _ = log_probs(rounded, {"predictor": artifact_of(rounded, tmp_path / "a")})
    found, _ = log_probs(model, {"predictor": artifact_of(model, tmp_path / "b")})
    assert_alike(found, expected)


def refused(model: Path, message: str, **settings) -> None:
    with pytest.raises(ValueError, match=message), engine(model, dejavu=settings):
        pass


def test_half_of_a_block(edited, tmp_path):
    model = edited(("model.decoder.layers.1.fc2",))
    artifact = artifact_of(model, tmp_path / "a")
    refused(
        model, r"reads fc1 and fc2 of .*layers\.1.* by one kernel.*'fc1': 8, 'fc2': 16", predictor=artifact
    )
    log_probs(model, {"predictor": artifact, "blocks": ["attention"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}},
            "kv_cache_scheme",
        ),
        ({"input_activations": {"dynamic": False, "strategy": "tensor"}}, "fixed scales of its inputs"),
        ({"weights": {"symmetric": False}}, "int8 by channel, asymmetric"),
    ],
    ids=["cache", "inputs", "asymmetric"],
)
def test_schemes_that_are_refused(edited, changes, message, tmp_path):
    model = edited(**changes)
    refused(
        model,
        f"model_impl='dejavu' reads single rows of .*{message}",
        predictor=artifact_of(model, tmp_path / "a"),
    )


def test_integers_without_a_scheme(w8a8, tmp_path):
    """They would be taken for weights."""
    target = tmp_path / "model"
    shutil.copytree(w8a8, target)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    refused(target, "holds integers as .*do not belong together", mode="dense")


def test_predictors_of_the_original_are_refused(w8a8, opt, predictors):
    with pytest.raises(ValueError, match="was trained on the weights"):
        log_probs(w8a8, {"predictor": predictors(opt(layers=2))})


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="made for workers on a CPU: here they would share a GPU"
)
def test_two_ranks(w8a8, tmp_path):
    arguments = job(w8a8, artifact_of(w8a8, tmp_path / "a"))
    alone = observe(**arguments)
    arguments["options"] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert flips(alone, found) <= FLIPS_ALLOWED
    assert found["metrics"]["weight_bits"] == 8


# Predictors made for it, and taken over.


def test_training_sees_the_weights_that_are_meant(w8a8, w8a16, opt, tmp_path):
    from vllm_dejavu.predictor_training.hf_model import HfModel

    expected = HfModel(str(meant(opt(layers=2), tmp_path / "rounded", head=False)))
    for directory in (w8a8, w8a16):
        model = HfModel(str(directory))
        assert model.spec.fingerprint == fingerprint_of(directory) != expected.spec.fingerprint
        for layer in range(2):
            for name in ("fc1", "fc2", "self_attn.q_proj", "self_attn.out_proj"):
                found = model.weight(layer, name)
                assert found.dtype == torch.float32
                assert torch.allclose(found, expected.weight(layer, name), rtol=1e-5, atol=1e-7)
    tokens = torch.tensor([random_prompt(20)])
    with torch.inference_mode():
        logits = [m.model(tokens).logits for m in (HfModel(str(w8a16)), expected)]
    assert relative_rms(*logits) < TOLERANCE["float32"]


def test_training_on_other_checkpoints_is_refused(edited):
    from vllm_dejavu.predictor_training.hf_model import HfModel

    model = edited()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized as 'gptq'.*vllm-dejavu adopt"):
        HfModel(str(model))


def adopt(original: Path, model: Path, tmp_path: Path, monkeypatch, rise: float = 0.004):
    """With `evaluate` replaced by what it would have found."""
    from vllm_dejavu.predictor_training import adopt as module

    result = {"data": ["t.txt"], "num_tokens": 9, "dense_ppl": 10.0, "sparse_ppl": 10 * (1 + rise)}
    result |= {"ppl_increase": rise, "mlp_recall": 0.9, "head_recall": None, "mlp_density": 0.5}
    monkeypatch.setattr(module, "measured", lambda config, predictor: result | {"head_density": 0.5})
    config = module.AdoptConfig(str(original), str(model), ("t.txt",), str(tmp_path / "adopted"))
    return module.run(config)


def test_adopted_predictors_are_served(w8a8, opt, predictors, tmp_path, monkeypatch):
    """They select what they did, and their manifest names both checkpoints."""
    model = opt(layers=2)
    before = predictors(model)
    made = adopt(before, w8a8, tmp_path, monkeypatch)
    record = made.manifest.calibration["adopted_from"]
    assert record["fingerprint"] == fingerprint_of(model) != made.manifest.model.fingerprint
    assert made.manifest.model.fingerprint == fingerprint_of(w8a8) and record["ppl_increase"] == 0.004
    found, counts = log_probs(w8a8, {"predictor": str(tmp_path / "adopted")})
    assert counts["artifact"]["fingerprint_verified"]
    settings = {"predictor": before, "weight_bits": 8, "lm_head_bits": 16}
    assert_alike(found, log_probs(model, settings)[0])
    from vllm_dejavu.inspection import artifact_table

    assert f"fingerprint={fingerprint_of(model)}" in artifact_table(made)


def test_adopting_the_shipped_predictors(tmp_path, capsys):
    """The command, with what it measures: on the W8A8 copy they find about what they do on the original; with
    a smaller budget than they cost nothing is left behind.
    """
    model = quantized.write(Path(MODEL), tmp_path / "w8a8", "w8a8")
    (tmp_path / "prose.txt").write_text("\n\n".join(PROSE * n for n in (3, 4, 5)), encoding="utf-8")
    command = ["adopt", f"{MODEL}/dejavu", "--model", str(model), "--data", str(tmp_path / "prose.txt")]
    command += ["--dtype", "float32"]
    with one_collection():
        assert cli.main([*command, "--output", str(tmp_path / "a"), "--max-ppl-increase", "0.2"]) == 0
    assert "adopted     model=" in capsys.readouterr().out
    record = load(tmp_path / "a").manifest.calibration["adopted_from"]
    assert record["fingerprint"] == load(f"{MODEL}/dejavu").manifest.model.fingerprint
    assert record["sparse_ppl"] / record["dense_ppl"] - 1 == pytest.approx(record["ppl_increase"], abs=1e-5)
    assert record["sparse_ppl"] != record["dense_ppl"]
    assert 0.7 < record["mlp_recall"] < 1 and 0.03 < record["mlp_density"] < 0.15
    with one_collection():
        assert cli.main([*command, "--output", str(tmp_path / "b"), "--max-ppl-increase", "-0.9"]) == 1
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("rise", [0.02, float("nan")])
def test_predictors_that_cost_too_much_are_not_adopted(w8a8, opt, predictors, tmp_path, monkeypatch, rise):
    with pytest.raises(ValueError, match="more than 1.00%: nothing was written.*vllm-dejavu train"):
        adopt(predictors(opt(layers=2)), w8a8, tmp_path, monkeypatch, rise)
    assert not (tmp_path / "adopted").exists()


def test_nothing_to_adopt(opt, predictors, tmp_path, monkeypatch):
    model = opt(layers=2)
    with pytest.raises(ValueError, match="was made for the weights of .*serve it as it is"):
        adopt(predictors(model), model, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="hidden"):
        adopt(predictors(model), opt(layers=2, hidden=128), tmp_path, monkeypatch)
