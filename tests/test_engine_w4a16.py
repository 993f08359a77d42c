"""compressed-tensors' W4A16 checkpoints: rows of their integers, with scales for each output or each 128 of
its inputs, against dense and sparse engines on the weights that these stand for.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from engine import TOLERANCE, engine, generate, model_of
from parallel_worker import observe
from safetensors.torch import load_file, save_file
from test_engine_int8 import PROMPTS, assert_alike, log_probs
from test_engine_parallel import FLIPS_ALLOWED, flips, in_processes, job
from test_engine_quantized import artifact_of, refused
from tiny import make_nemotron
from tolerances import relative_rms

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import quantized

SHAPE = {"layers": 2, "hidden": 128, "tied": False}


def edit(model: Path, target: Path, **weights) -> Path:
    """A copy with other arguments of its weights."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module", params=["group", "channel"])
def w4a16(request, opt, tmp_path_factory):
    """With scales for 128 inputs, of which fc2 has 512, or for all."""
    directory = tmp_path_factory.mktemp("w4a16")
    model = quantized.write(opt(**SHAPE), directory / "group", "w4a16")
    if request.param == "group":
        return model
    model = edit(model, directory / "channel", strategy="channel", group_size=None)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].mean(1, keepdim=True)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def meant(model: Path, directory: Path) -> Path:
    """A checkpoint of the weights that the integers stand for, as compressed-tensors unpacks them."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shutil.copytree(model, directory)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        packed, stem = tensors.pop(name), name.removesuffix("_packed")
        shape, scale = tensors.pop(f"{stem}_shape"), tensors.pop(f"{stem}_scale")
        integers = unpack_from_int32(packed, 4, torch.Size(shape.tolist())).float()
        tensors[stem] = integers * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_sparse_equals_the_weights_that_are_meant(w4a16, tmp_path):
    wide = meant(w4a16, tmp_path / "meant")
    expected, counted = log_probs(wide, {"predictor": artifact_of(wide, tmp_path / "a")})
    found, counts = log_probs(w4a16, {"predictor": artifact_of(w4a16, tmp_path / "b")})
    assert_alike(found, expected)
    assert counts["layers"] == counted["layers"] and counts["steps"] == counted["steps"]
    assert (counts["weight_bits"], counts["lm_head_bits"]) == (4, 16)
    assert 0 < counts["mlp_density"] < 1 and 0 < counts["head_density"] < 1


def test_everything_selected_equals_the_dequantized_model(w4a16, tmp_path):
    settings = {"predictor": artifact_of(w4a16, tmp_path / "a", select_all=True), "apply_to": "all"}
    found, counts = log_probs(w4a16, settings)
    assert_alike(found, log_probs(meant(w4a16, tmp_path / "meant"), {"mode": "dense"})[0])
    assert counts["mlp_density"] == counts["head_density"] == 1


def test_one_copy_of_the_integers(w4a16, tmp_path):
    with engine(w4a16, dejavu={"predictor": artifact_of(w4a16, tmp_path / "a")}) as llm:
        layer = model_of(llm).model.decoder.layers[0]
        found = {
            ".".join(name.split(".")[-2:]): (p.dtype, tuple(p.shape))
            for name, p in layer.named_parameters()
            if p.ndim == 2
        }
    groups = 4 if w4a16.name == "group" else 1
    assert found == {
        "qkv_proj.weight": (torch.uint8, (384, 64)),
        "qkv_proj.weight_scale": (torch.float32, (384, 1)),
        "out_proj.weight": (torch.uint8, (128, 64)),
        "out_proj.weight_scale": (torch.float32, (1, 128)),
        "fc1.weight": (torch.uint8, (512, 64)),
        "fc1.weight_scale": (torch.float32, (512, 1)),
        "fc2.weight": (torch.uint8, (512, 64)),
        "fc2.weight_scale": (torch.float32, (groups, 128)),
    }


@pytest.mark.parametrize("mode", ["sparse", "exact", "dense"])
def test_beside_stock_vllms_layers(mode, w4a16, tmp_path):
    """In bf16, which its kernel needs: layers without a gate, and in mode exact all but fc2, are its own."""
    wide = meant(w4a16, tmp_path / "meant")
    settings = {"mode": mode}
    if mode == "sparse":
        settings |= {"predictor": artifact_of(w4a16, tmp_path / "a", dense_layers=(1,), select_all=True)}
    with engine(w4a16, dejavu=settings, dtype="bfloat16") as llm:
        last = model_of(llm).model.decoder.layers[1]
        stock = last.self_attn.qkv_proj.scheme
        generate(llm, PROMPTS, 2)
    assert type(stock).__name__.startswith("CompressedTensors")
    found, _ = log_probs(w4a16, settings, dtype="bfloat16")
    expected, _ = log_probs(wide, {"mode": "dense"}, dtype="bfloat16")
    # what follows the prompts themselves: after that another token may have been taken
    places = [(str(i), len(prompt) - 1) for i, prompt in enumerate(PROMPTS)]
    ours, theirs = (torch.stack([side[place] for place in places]) for side in (found, expected))
    assert relative_rms(ours, theirs) < TOLERANCE["bfloat16"]


def test_a_nemotron(tmp_path):
    """Whose linears checkpoints call by other names."""
    model = make_nemotron(tmp_path / "original", layers=2, tied=False, hidden=128)
    model = quantized.write(model, tmp_path / "w4a16", "w4a16")
    wide = meant(model, tmp_path / "meant")
    expected, _ = log_probs(wide, {"predictor": artifact_of(wide, tmp_path / "a")})
    found, counts = log_probs(model, {"predictor": artifact_of(model, tmp_path / "b")})
    assert_alike(found, expected)
    assert counts["weight_bits"] == 4 and 0 < counts["mlp_density"] < 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"group_size": 32}, "int4 by group of 32, symmetric"),
        ({"symmetric": False}, "int4 by group of 128, asymmetric"),
        ({"actorder": "weight"}, "int4 in the order of its activations"),
    ],
    ids=["groups-of-32", "asymmetric", "actorder"],
)
def test_schemes_that_are_refused(weights, message, opt, tmp_path):
    model = quantized.write(opt(**SHAPE), tmp_path / "w4a16", "w4a16")
    model = edit(model, tmp_path / "edited", **weights)
    refused(
        model,
        f"model_impl='dejavu' reads single rows of .*{message}",
        predictor=artifact_of(model, tmp_path / "a"),
    )


def test_training_sees_the_weights_that_are_meant(w4a16, tmp_path):
    from vllm_dejavu.predictor_training.hf_model import HfModel

    model, expected = HfModel(str(w4a16)), HfModel(str(meant(w4a16, tmp_path / "meant")))
    for name in ("fc1", "fc2", "self_attn.q_proj", "self_attn.out_proj"):
        assert torch.allclose(model.weight(1, name), expected.weight(1, name), rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="made for workers on a CPU: here they would share a GPU"
)
def test_two_ranks(opt, tmp_path):
    """Between groups; within one is refused."""
    model = quantized.write(opt(**SHAPE | {"hidden": 256}), tmp_path / "w4a16", "w4a16")
    arguments = job(model, artifact_of(model, tmp_path / "a"))
    alone = observe(**arguments)
    arguments["options"] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert flips(alone, found) <= FLIPS_ALLOWED
    assert found["metrics"]["weight_bits"] == 4


def test_integers_without_a_scheme(w4a16, tmp_path):
    """They would be taken for weights."""
    target = tmp_path / "model"
    shutil.copytree(w4a16, target)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    refused(target, "holds integers as .*do not belong together", mode="dense")
