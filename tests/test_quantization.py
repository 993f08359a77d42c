"""Weights rounded to 8 and 4 bits, against round-to-nearest written out in NumPy; and engines that keep and
read theirs in 4 bits, against dense and sparse ones on the checkpoint that those stand for (8 bits:
test_engine_int8.py).
"""

from __future__ import annotations

import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from engine import TOLERANCE, Recorder, engine, generate, next_token_log_probs
from parallel_worker import observe
from safetensors.torch import load_file, save_file
from test_engine_int8 import PROMPTS, assert_alike, log_probs
from test_engine_parallel import FLIPS_ALLOWED, flips, in_processes, job
from tiny import fingerprint_of, make_artifact
from tolerances import relative_rms
from transformers import OPTForCausalLM

from vllm_dejavu.quantization import quantize_dequantize, quantize_model

NAME = "model.decoder.layers.0.fc1.weight"


FC2 = "model.decoder.layers.0.fc2.weight"


def bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float().numpy()


def brute_force(weight: np.ndarray, bits: int, transposed: bool = False) -> np.ndarray:
    """8 bits, row by row: the largest magnitude becomes 127. 4 bits, for each 128 inputs of an output: the
    largest becomes one of a few numbers of steps of either sign, whichever leaves the smallest error;
    transposed: for each 128 outputs of an input, after each output was divided by its largest, and positive
    steps alone.
    """
    weight = weight.astype(np.float32)
    if bits == 8:
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        return np.rint(weight / np.maximum(scale, 1e-30)) * scale
    if transposed:
        each = np.abs(weight).max(1, keepdims=True)
        each[each == 0] = 1
        return (in_groups((weight / each).T, (7, 7.5, 8, 8.5, 9), abs_only=True)).T * each
    return in_groups(weight, (-7.5, -8, -8.5, -9, 7, 7.5, 8, 8.5), abs_only=False)


def in_groups(weight: np.ndarray, steps: tuple[float, ...], abs_only: bool) -> np.ndarray:
    out = np.zeros(weight.shape, np.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 128):
            values = weight[row, start : start + 128]
            largest = np.abs(values).max() if abs_only else values[np.abs(values).argmax()]
            if largest == 0:
                continue
            tried = []
            for number in steps:
                scale = bf16(np.float32(largest) / np.float32(number))
                tried.append(np.clip(np.rint(values / scale), -8, 7) * scale)
            errors = [np.square(found - values, dtype=np.float64).sum() for found in tried]
            out[row, start : start + 128] = tried[int(np.argmin(errors))]
    return out


def is_linear(name: str) -> bool:
    """Once more, apart from the code."""
    return name.endswith("weight") and any(
        f".{part}." in name for part in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    )


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("bits", "name"), [(8, NAME), (8, FC2), (4, NAME), (4, FC2)])
    def test_equals_brute_force(self, bits, name, dtype):
        weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(bits)) / 16
        weight[1, :128] = 0
        weight[2, 130] = 3.0  # takes the whole group's range
        weight[3] = weight[3].abs()
        weight[4] = 0
        weight = weight.to(dtype)
        rounded = quantize_dequantize(name, weight, bits)
        assert rounded.dtype == torch.float32
        expected = torch.from_numpy(brute_force(weight.float().numpy(), bits, name == FC2))
        alike = torch.isclose(rounded, expected, rtol=1e-5, atol=1e-9)
        # of two numbers of steps that are as good, either may be taken
        assert alike.float().mean() > 0.999
        error, least = (rounded - weight.float()).norm(), (expected - weight.float()).norm()
        assert error <= least * (1 + 1e-5)

    def test_fewer_bits_lose_more(self):
        """8 as much as rounding by an own step does: evenly within the step, so step / sqrt(12); 4 less than
        with the largest of a group as 7.
        """
        weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
        eight, four = (float((quantize_dequantize(NAME, weight, bits) - weight).norm()) for bits in (8, 4))
        steps = weight.abs().amax(-1) / 127
        assert eight == pytest.approx(float((1024 * steps**2 / 12).sum().sqrt()), rel=0.02)
        steps = weight.unflatten(1, (-1, 128)).abs().amax(-1) / 7
        assert 5 * eight < four < 0.95 * float((128 * steps**2 / 12).sum().sqrt())
        assert torch.equal(quantize_dequantize(NAME, weight, 16), weight)

    @pytest.mark.parametrize(
        ("name", "quantized"),
        [
            ("model.decoder.layers.0.self_attn.q_proj.weight", True),
            ("decoder.layers.11.self_attn.out_proj.weight", True),
            ("model.decoder.layers.95.fc2.weight", True),
            ("model.decoder.layers.0.fc1.bias", False),
            ("lm_head.weight", False),
            ("model.decoder.layers.0.self_attn_layer_norm.weight", False),
            ("model.decoder.embed_tokens.weight", False),
            ("model.decoder.embed_positions.weight", False),
            ("model.decoder.project_in.weight", False),
            ("model.decoder.final_layer_norm.weight", False),
        ],
    )
    def test_only_linear_weights_of_the_layers(self, name, quantized):
        tensor = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        assert (quantize_dequantize(name, tensor, 4) is not tensor) == quantized
        assert quantize_dequantize(name, tensor, 16) is tensor

    @pytest.mark.parametrize(("name", "shape"), [(NAME, (2, 64)), (NAME, (2, 192)), (FC2, (64, 128))])
    def test_a_group_that_is_not_whole_is_refused(self, name, shape):
        with pytest.raises(ValueError, match=re.escape(f"multiple of 128, which share a scale; {name} has")):
            quantize_dequantize(name, torch.ones(shape), 4)

    def test_offloaded_weights_are_refused(self, opt):
        config = OPTForCausalLM.config_class.from_pretrained(opt(hidden=128, layers=1))
        with torch.device("meta"):
            model = OPTForCausalLM(config)
        with pytest.raises(ValueError, match="is offloaded"):
            quantize_model(model, 4)


@pytest.fixture(scope="module")
def model(opt):
    return opt(hidden=128, layers=2)


@pytest.fixture(scope="module")
def on_disk(model, tmp_path_factory):
    """The same checkpoint, its weights rounded beforehand by brute force."""
    directory = tmp_path_factory.mktemp("on_disk") / "model"
    shutil.copytree(model, directory)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if is_linear(name):
            transposed = ".fc2." in name or ".out_proj." in name
            tensors[name] = torch.from_numpy(brute_force(tensor.numpy(), 4, transposed).copy())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


HEAD16 = {"weight_bits": 4, "lm_head_bits": 16}


class TestEngine:
    @pytest.fixture(scope="class")
    def served(self, model, predictors, tmp_path_factory):
        """(log-probabilities, counts, start-up log, sharded state, settings) of a sparse engine in 4 bits."""
        from vllm_dejavu.models import base as served_model

        directory = tmp_path_factory.mktemp("sharded")
        settings = {"predictor": predictors(model), "apply_to": "all"} | HEAD16
        with mock.patch.object(served_model.logger, "info") as info:
            found, counts = log_probs(model, settings, directory)
        shutil.copy(model / "config.json", directory)
        said = [call.args[0] % call.args[1:] for call in info.call_args_list]
        return found, counts, said, directory, settings

    def test_sparse_equals_a_checkpoint_rounded_beforehand(self, served, on_disk, tmp_path):
        """The same predictors, of an artifact that was made for the rounded checkpoint."""
        artifact = make_artifact(tmp_path / "a", on_disk, fingerprint=fingerprint_of(on_disk))
        expected, counts = log_probs(on_disk, {"predictor": artifact, "apply_to": "all"})
        assert_alike(served[0], expected)
        assert (
            counts["layers"] == served[1]["layers"]
            and 0 < counts["mlp_density"] < 1
            and counts["steps"]["sparse"] > 0
        )

    @pytest.mark.parametrize("mode", ["decode", "exact", "oracle", "measured", "blocks"])
    def test_every_mode_reads_the_weights_that_are_meant(self, mode, model, on_disk, predictors, tmp_path):
        settings = {
            "decode": {},
            "exact": {"mode": "exact"},
            "oracle": {"mode": "oracle"},
            "measured": {"measure": True},
            "blocks": {"blocks": ["attention"]},
        }[mode]
        artifact = make_artifact(tmp_path / "a", on_disk, fingerprint=fingerprint_of(on_disk))
        theirs, ours = {"predictor": artifact}, {"predictor": predictors(model)}
        if mode == "exact":
            theirs = ours = {}
        expected, counted = log_probs(on_disk, theirs | settings)
        found, counts = log_probs(model, ours | settings | HEAD16)
        assert_alike(found, expected)
        assert counts["weight_bits"] == 4
        if mode != "exact":  # which counts tiles of tokens, made from other numbers of these on
            assert counts["layers"] == counted["layers"]

    def test_everything_selected_equals_vllms_own_model(self, model, on_disk, predictors):
        with engine(on_disk, impl="vllm") as llm, Recorder(llm) as recorder:
            generate(llm, PROMPTS, 12)
            expected = next_token_log_probs(recorder.steps)
        settings = {"predictor": predictors(model, select_all=True), "apply_to": "all"} | HEAD16
        found, counts = log_probs(model, settings)
        assert_alike(found, expected)
        assert counts["mlp_density"] == 1 and counts["steps"]["sparse"] == sum(counts["steps"].values())

    @pytest.mark.parametrize("apply_to", ["decode", "all"])
    def test_in_16_bits_inputs_are_rounded(self, apply_to, model, on_disk, predictors, tmp_path):
        """To 8 bits a group, where the CPU has such products."""
        artifact = make_artifact(tmp_path / "a", on_disk, fingerprint=fingerprint_of(on_disk))
        settings = {"apply_to": apply_to}
        expected, _ = log_probs(on_disk, settings | {"predictor": artifact}, dtype="bfloat16")
        settings |= {"predictor": predictors(model)} | HEAD16
        found, counts = log_probs(model, settings, dtype="bfloat16")
        shared = found.keys() & expected.keys()
        ours, theirs = (torch.stack([side[k] for k in sorted(shared)]) for side in (found, expected))
        assert len(shared) >= len(PROMPTS) and relative_rms(ours, theirs) < 3 * TOLERANCE["bfloat16"]
        assert counts["steps"]["sparse"] > 0

    def test_artifact_of_the_16_bit_checkpoint_fits(self, served, model):
        found = served[1]["artifact"]
        assert found["fingerprint_verified"] and found["weights_fingerprint"] == fingerprint_of(model)

    def test_start_up_says_so(self, served):
        assert any("INT4 weights (the layers' linears; a scale for each 128" in line for line in served[2])

    def test_the_head_goes_along_in_8_bits(self, model):
        found, counts = log_probs(model, {"mode": "dense", "weight_bits": 4})
        assert (counts["weight_bits"], counts["lm_head_bits"]) == (4, 8)
        other, _ = log_probs(model, {"mode": "dense"} | HEAD16)
        assert (
            1e-4 < relative_rms(torch.stack(list(found.values())), torch.stack(list(other.values()))) < 0.05
        )

    def test_dense_equals_transformers_quantized_in_memory(self, model):
        """The function for masked studies: the same rounded weights."""
        found, _ = log_probs(model, {"mode": "dense"} | HEAD16)
        hf = OPTForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

        def reference() -> torch.Tensor:
            rows = []
            with torch.no_grad():
                for prompt in PROMPTS:
                    rows.append(hf(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1))
            return torch.stack(rows)

        first = {request: min(p for r, p in found if r == request) for request, _ in found}
        ours = torch.stack(
            [
                found[request, position]
                for request, position in sorted(first.items(), key=lambda item: item[1])
            ]
        )
        before = reference()
        assert quantize_model(hf, 4) == 2 * 6
        assert relative_rms(ours, reference()) < TOLERANCE["float32"]
        assert relative_rms(ours, before) > 1e-2, "4 bits must show"

    def test_one_copy_of_each_weight(self, model):
        with engine(model, dejavu={"mode": "dense", "weight_bits": 4}) as llm:
            held = llm.apply_model(lambda m: {n: (p.dtype, p.nbytes) for n, p in m.named_parameters()})[0]
        linears = {
            n: kind for n, kind in held.items() if ".layers." in n and "norm" not in n and "bias" not in n
        }
        integers = {n: size for n, (kind, size) in linears.items() if kind == torch.uint8}
        assert len(integers) == 2 * 4 and all(n.endswith(".weight") for n in integers)
        weights = 2 * (4 * 128 * 128 + 2 * 128 * 512)
        assert sum(integers.values()) == weights // 2
        scales = {n: size for n, (_, size) in linears.items() if n.endswith("weight_scale")}
        assert sum(scales.values()) == weights // 128 * 4, "fp32, as the engine's dtype"
        assert len(linears) == len(integers) + len(scales) + 2 * 2, "and of fc2 and out_proj outputs' own"

    def test_a_sharded_state_is_loaded_as_it_was_saved(self, served):
        expected, _, _, directory, settings = served
        found, counts = log_probs(directory, settings, load_format="sharded_state")
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
        assert counts["artifact"]["fingerprint_verified"]

    def test_a_sharded_state_in_4_bits_is_none_in_16(self, served):
        directory, settings = served[3], served[4]
        with (
            pytest.raises((ValueError, KeyError)),
            engine(directory, dejavu=settings | {"weight_bits": 16}, load_format="sharded_state"),
        ):
            pass

    def test_dummy_weights_are_filled(self, served):
        """vLLM fills floats only."""
        with engine(served[3], dejavu={"mode": "dense", "weight_bits": 4}, load_format="dummy") as llm:
            found = llm.apply_model(
                lambda m: [p.float().std().item() for p in m.parameters() if p.dtype == torch.uint8]
            )[0]
            generate(llm, PROMPTS, 2)
        assert len(found) == 2 * 4 and all(70 < std < 77 for std in found)

    def test_sizes_that_are_no_multiple_of_the_group(self, opt):
        with (
            pytest.raises(ValueError, match="hidden_size has 64"),
            engine(opt(), dejavu={"mode": "dense", "weight_bits": 4}),
        ):
            pass


@pytest.mark.on_demand
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="made for workers on a CPU: here they would share a GPU"
)
def test_tensor_parallel_ranks_share_the_same_rounded_weights(model, predictors, tmp_path):
    """Weights are rounded whole, then cut."""
    arguments = job(model, predictors(model))
    arguments["dejavu"]["weight_bits"] = 4
    alone = observe(**arguments)
    arguments["options"] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert found["tokens"] == alone["tokens"] and flips(found, alone) <= FLIPS_ALLOWED
    ours, theirs = (torch.cat([step.log_probs for step in run["steps"]]) for run in (found, alone))
    assert relative_rms(ours, theirs) < TOLERANCE["float32"]
    arguments["dejavu"]["weight_bits"], arguments["options"] = 16, {}
    assert (
        relative_rms(theirs, torch.cat([step.log_probs for step in observe(**arguments)["steps"]])) > 1e-2
    ), "4 bits must show"
