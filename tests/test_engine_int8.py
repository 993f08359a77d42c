"""Engines that keep their weights in 8 bits, against dense and sparse engines on the checkpoint that those
weights stand for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from engine import TOLERANCE, Recorder, engine, generate, metrics_of, next_token_log_probs, random_prompt
from parallel_worker import observe
from safetensors.torch import load_file, save_file
from test_engine_parallel import FLIPS_ALLOWED, flips, in_processes, job
from tiny import fingerprint_of, make_artifact
from tolerances import relative_rms

from vllm_dejavu.quantization import int8_rows

PROMPTS = [random_prompt(5), random_prompt(40)]
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def meant(model: Path, directory: Path, head: bool = True) -> Path:
    """A checkpoint of the weights that the integers stand for; head: of the LM head, and what is tied to it,
    too.
    """
    shutil.copytree(model, directory)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        is_head = "lm_head." in name or ("embed_tokens." in name and "lm_head.weight" not in tensors)
        if name.endswith(".weight") and (any(f".{part}." in name for part in LINEARS) or (head and is_head)):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round() * scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def log_probs(model: Path, settings: dict, save_to: Path | None = None, **options) -> tuple[dict, dict]:
    """(request, position) -> log-probabilities, of prompts and of what was written; and the counts."""
    with engine(model, dejavu=settings, **options) as llm:
        with Recorder(llm) as recorder:
            generate(llm, PROMPTS, 12)
        if save_to is not None:
            llm.llm_engine.engine_core.save_sharded_state(str(save_to))
        return next_token_log_probs(recorder.steps), metrics_of(llm)


def assert_alike(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    pairs = [torch.stack([side[k] for k in sorted(found)]) for side in (found, expected)]
    assert relative_rms(*pairs) < TOLERANCE["float32"]


MODELS = {
    "tied": {},
    "untied": {"tied": False},
    "350m": {"pre_ln": False, "embed_dim": 32},
    "no-bias": {"bias": False},
}


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("apply_to", ["decode", "all"])
def test_sparse_equals_the_checkpoint_that_is_meant(shape, apply_to, opt, predictors, tmp_path):
    """Prompts dense or sparse, decode steps sparse: the same selection, log-probabilities, and counts."""
    model = opt(layers=2, **shape)
    rounded = meant(model, tmp_path / "rounded")
    artifact = make_artifact(tmp_path / "a", rounded, fingerprint=fingerprint_of(rounded))
    expected, counted = log_probs(rounded, {"predictor": artifact, "apply_to": apply_to})
    found, counts = log_probs(model, {"predictor": predictors(model), "apply_to": apply_to, "weight_bits": 8})
    assert_alike(found, expected)
    assert counts["layers"] == counted["layers"] and counts["steps"] == counted["steps"]
    assert 0 < counts["mlp_density"] < 1 and 0 < counts["head_density"] < 1
    assert counts["artifact"]["fingerprint_verified"]


def test_everything_selected_equals_vllms_own_model(opt, predictors, tmp_path):
    """Of the weights that are meant, dense."""
    model = opt(layers=2)
    rounded = meant(model, tmp_path / "rounded")
    with engine(rounded, impl="vllm") as llm, Recorder(llm) as recorder:
        generate(llm, PROMPTS, 12)
        expected = next_token_log_probs(recorder.steps)
    settings = {"predictor": predictors(model, select_all=True), "weight_bits": 8, "apply_to": "all"}
    found, counts = log_probs(model, settings)
    assert_alike(found, expected)
    assert counts["mlp_density"] == 1 and counts["steps"]["sparse"] == sum(counts["steps"].values())


def test_the_head_may_stay(opt, predictors, tmp_path):
    model = opt(layers=2)
    found, _ = log_probs(model, {"mode": "dense", "weight_bits": 8, "lm_head_bits": 16})
    assert_alike(found, log_probs(meant(model, tmp_path / "rounded", head=False), {"mode": "dense"})[0])
    alone, counts = log_probs(model, {"mode": "dense", "lm_head_bits": 8})
    assert (counts["weight_bits"], counts["lm_head_bits"]) == (16, 8)
    before, _ = log_probs(model, {"mode": "dense"})
    assert relative_rms(torch.stack(list(alone.values())), torch.stack(list(before.values()))) > 1e-4


@pytest.mark.parametrize("mode", ["oracle", "measured", "blocks"])
def test_controls_and_ungated_layers(mode, opt, predictors, tmp_path):
    """What computes true activations and contributions reads the weights that are meant; layers without a
    gate, whose linears are in 8 bits too.
    """
    model = opt(layers=2)
    settings = {
        "oracle": {"mode": "oracle"},
        "measured": {"measure": True},
        "blocks": {"blocks": ["attention"]},
    }[mode]
    rounded = meant(model, tmp_path / "rounded")
    artifact = make_artifact(tmp_path / "a", rounded, fingerprint=fingerprint_of(rounded))
    expected, counted = log_probs(rounded, {"predictor": artifact, **settings})
    found, counts = log_probs(model, {"predictor": predictors(model), "weight_bits": 8, **settings})
    assert_alike(found, expected)
    assert counts["layers"] == counted["layers"]


def test_prompts_are_sampled_for_recall(opt, predictors, tmp_path):
    """The truth comes from the same integers."""
    model = opt(layers=2)
    rounded = meant(model, tmp_path / "rounded")
    artifact = make_artifact(tmp_path / "a", rounded, fingerprint=fingerprint_of(rounded))
    counted = []
    for directory, settings in ((rounded, {"predictor": artifact}), (model, {"weight_bits": 8})):
        settings = {"predictor": predictors(model), "sample_recall": 1} | settings
        with engine(directory, dejavu=settings) as llm:
            generate(llm, [random_prompt(100)], 4)
            counted.append(metrics_of(llm)["layers"])
    assert counted[0] == counted[1]
    for layer in counted[0]:
        assert 0 < layer["mlp"]["sampled_recall"] <= 1 and 0 < layer["attention"]["sampled_recall"] <= 1


@pytest.mark.parametrize("apply_to", ["decode", "all"])
def test_in_16_bits_inputs_are_rounded(apply_to, opt, predictors, tmp_path):
    """The prompt of 40 tokens to 8 bits a group where the CPU has such products, the steps to 16."""
    model, options = opt(layers=2), {"dtype": "bfloat16"}
    rounded = meant(model, tmp_path / "rounded")
    artifact = make_artifact(tmp_path / "a", rounded, fingerprint=fingerprint_of(rounded))
    settings = {"predictor": artifact, "apply_to": apply_to}
    expected, _ = log_probs(rounded, settings, **options)
    settings |= {"predictor": predictors(model), "weight_bits": 8}
    found, counts = log_probs(model, settings, **options)
    shared = found.keys() & expected.keys()
    ours, theirs = (torch.stack([side[k] for k in sorted(shared)]) for side in (found, expected))
    assert len(shared) >= len(PROMPTS) and relative_rms(ours, theirs) < 2 * TOLERANCE["bfloat16"]
    assert counts["steps"]["sparse"] > 0


class TestInMemory:
    @pytest.fixture(scope="class")
    def saved(self, opt, predictors, tmp_path_factory):
        """(log-probabilities, parameters' types and bytes, sharded state) of an engine in 8 bits."""
        model, directory = opt(layers=2), tmp_path_factory.mktemp("sharded")
        settings = {"predictor": predictors(model), "weight_bits": 8}
        with engine(model, dejavu=settings) as llm:
            with Recorder(llm) as recorder:
                generate(llm, PROMPTS, 12)
            parameters = llm.apply_model(lambda m: {n: (p.dtype, p.nbytes) for n, p in m.named_parameters()})[
                0
            ]
            llm.llm_engine.engine_core.save_sharded_state(str(directory))
        shutil.copy(model / "config.json", directory)
        return next_token_log_probs(recorder.steps), parameters, directory, settings

    def test_one_copy_of_each_weight(self, saved):
        """Matrices of the layers and the tied embedding are int8, with a scale for each output."""
        linears = {
            n: kind for n, kind in saved[1].items() if any(f".{p}." in n for p in (*LINEARS, "qkv_proj"))
        }
        weights = {n: kind for n, kind in linears.items() if n.endswith(".weight")}
        assert len(weights) == 2 * 4 and all(dtype == torch.int8 for dtype, _ in weights.values())
        assert sum(size for _, size in weights.values()) == 2 * (4 * 64 * 64 + 2 * 64 * 256)
        scales = [kind for n, kind in linears.items() if n.endswith("weight_scale")]
        assert all(dtype == torch.float32 for dtype, _ in scales)
        assert sum(size for _, size in scales) == 2 * 4 * (3 * 64 + 64 + 256 + 64)
        assert saved[1]["model.decoder.embed_tokens.weight"][0] == torch.int8
        assert len([n for n in saved[1] if "embed_tokens" in n or "lm_head" in n]) == 2

    def test_a_sharded_state_is_loaded_as_it_was_saved(self, saved):
        expected, _, directory, settings = saved
        found, counts = log_probs(directory, settings, load_format="sharded_state")
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
        assert counts["artifact"]["fingerprint_verified"]

    def test_a_sharded_state_in_8_bits_is_none_in_16(self, saved):
        directory, settings = saved[2], saved[3]
        with (
            pytest.raises((ValueError, KeyError)),
            engine(directory, dejavu=settings | {"weight_bits": 16}, load_format="sharded_state"),
        ):
            pass

    def test_dummy_weights_are_filled(self, saved):
        """vLLM fills floats only."""
        with engine(saved[2], dejavu={"mode": "dense", "weight_bits": 8}, load_format="dummy") as llm:
            found = llm.apply_model(
                lambda m: [
                    (float(p.float().std()), int(p.amin()), int(p.amax()))
                    for p in m.parameters()
                    if p.dtype == torch.int8
                ]
            )[0]
            generate(llm, PROMPTS, 2)
        assert len(found) == 2 * 4 + 1
        for std, least, most in found:
            assert 70 < std < 77 and least == -127 and most == 127


def test_rounding_keeps_any_scale_finite():
    """Rows of zeros, and of numbers so small that their scale is none of fp32's normal ones."""
    weight = torch.tensor([[0.0, 0.0], [1e-40, -1e-40], [3e38, -1e38]])
    integers, scale = int8_rows(weight)
    assert scale.isfinite().all() and (scale > 0).all()
    assert integers[0].tolist() == [0, 0] and integers[2].tolist() == [127, -42]


@pytest.mark.on_demand
def test_tensor_parallel_ranks_share_the_same_rounded_weights(opt, predictors, tmp_path):
    """Weights are rounded whole, then cut, the LM head by its rows."""
    model = opt(layers=2, hidden=128)
    arguments = job(model, predictors(model))
    arguments["dejavu"]["weight_bits"] = 8
    alone = observe(**arguments)
    arguments["options"] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert found["tokens"] == alone["tokens"] and flips(found, alone) <= FLIPS_ALLOWED
    ours, theirs = (torch.cat([step.log_probs for step in run["steps"]]) for run in (found, alone))
    assert relative_rms(ours, theirs) < TOLERANCE["float32"]
