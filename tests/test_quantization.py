"""Weights rounded to 8 and 4 bits, against round-to-nearest written out in NumPy; and the simulation in 4
bits as engines and transformers apply it (8 bits: test_engine_int8.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from engine import TOLERANCE, Recorder, engine, generate, metrics_of, next_token_log_probs, random_prompt
from parallel_worker import observe
from safetensors.torch import load_file, save_file
from test_engine_parallel import FLIPS_ALLOWED, flips, in_processes, job
from tiny import fingerprint_of, make_artifact
from tolerances import relative_rms
from transformers import OPTForCausalLM

from vllm_dejavu import quantization
from vllm_dejavu.quantization import quantize_dequantize, quantize_model

NAME = "model.decoder.layers.0.fc1.weight"
PROMPTS = [random_prompt(5), random_prompt(11)]


def brute_force(weight: np.ndarray, bits: int, group: int = 128) -> np.ndarray:
    """4 bits, group by group: the largest magnitude becomes 7.5 steps, the nearest step is taken, ends are
    cut. 8 bits, row by row: it becomes 127.
    """
    out = np.zeros(weight.shape, np.float32)
    if bits == 8:
        for row in range(weight.shape[0]):
            values = weight[row].astype(np.float32)
            scale = np.float32(np.abs(values).max() / np.float32(127))
            out[row] = np.rint(values / scale) * scale if scale > 0 else 0
        return out
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].astype(np.float32)
            scale = np.float32(np.float16(np.abs(values).max() / np.float32((2**bits - 1) / 2)))
            if scale > 0:
                out[row, start : start + group] = (
                    np.clip(np.rint(values / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
                )
    return out


def is_linear(name: str) -> bool:
    """Once more, apart from the code."""
    return name.endswith("weight") and any(
        f".{part}." in name for part in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    )


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_equals_brute_force(self, bits, dtype):
        weight = torch.randn(7, 384, generator=torch.Generator().manual_seed(bits)) / 16
        weight[1, :128] = 0
        weight[2, 130] = 3.0  # takes the whole group's range
        weight[3] = weight[3].abs()
        weight[4, 128:256] = torch.arange(128) - 64.0  # many of them half-way between two steps
        weight = weight.to(dtype)
        rounded = quantize_dequantize(NAME, weight, bits)
        assert rounded.dtype == torch.float32
        np.testing.assert_array_equal(rounded.numpy(), brute_force(weight.float().numpy(), bits))
        groups = rounded if bits == 8 else rounded.unflatten(1, (-1, 128)).flatten(0, 1)
        levels = max(len(set(group.tolist())) for group in groups)
        assert 2 ** (bits - 1) // 2 < levels <= 2**bits, "the groups use their levels, and no more"

    def test_fewer_bits_lose_more(self):
        """As much as rounding by an own step does: evenly within the step, so step / sqrt(12).

        Was red by chance: noise without a seed, and 2.7 taken for the largest of 128 normal values, in eight
        groups (1 seed in 20).
        """
        weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
        groups = {8: weight, 4: weight.unflatten(1, (-1, 128))}
        errors = [float((quantize_dequantize(NAME, weight, bits) - weight).norm()) for bits in (16, 8, 4)]
        for bits, error in ((8, errors[1]), (4, errors[2])):
            steps = groups[bits].abs().amax(-1) / {8: 127, 4: 7.5}[bits]
            each = groups[bits].shape[-1]
            assert error == pytest.approx(float((each * steps**2 / 12).sum().sqrt()), rel=0.02), bits
        assert errors[0] == 0 < errors[1] < errors[2]

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

    def test_scheme_is_what_the_documentation_says(self):
        args = quantization._scheme()
        found = args.num_bits, args.type, args.strategy, args.symmetric, args.group_size
        assert found == (4, "int", "group", True, quantization.GROUP_SIZE)
        assert args.scale_dtype == torch.float16

    @pytest.mark.parametrize("inputs", [64, 192], ids=str)
    def test_a_group_that_is_not_whole_is_refused(self, inputs):
        with pytest.raises(
            ValueError, match=re.escape(f"multiples of 128, the group size of W4A16; {NAME} has {inputs}")
        ):
            quantize_dequantize(NAME, torch.ones(2, inputs), 4)

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
            tensors[name] = torch.from_numpy(brute_force(tensor.numpy(), 4))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def log_probs(model: Path, settings: dict, save_to: Path | None = None) -> tuple[dict, dict]:
    """(request, position) -> log-probabilities, of prompts and of what was written; and the counts."""
    with engine(model, dejavu=settings) as llm:
        with Recorder(llm) as recorder:
            generate(llm, PROMPTS, 12)
        if save_to is not None:
            llm.llm_engine.engine_core.save_sharded_state(str(save_to))
        return next_token_log_probs(recorder.steps), metrics_of(llm)


class TestEngine:
    @pytest.fixture(scope="class")
    def served(self, model, predictors, tmp_path_factory):
        """(log-probabilities, counts, warnings, sharded state) of a sparse engine in 4 bits."""
        from vllm_dejavu.models import base as served_model

        directory = tmp_path_factory.mktemp("sharded")
        with mock.patch.object(served_model.logger, "warning") as warning:
            found, counts = log_probs(
                model, {"predictor": predictors(model), "weight_bits": 4, "apply_to": "all"}, directory
            )
        shutil.copy(model / "config.json", directory)
        return found, counts, [call.args[0] % call.args[1:] for call in warning.call_args_list], directory

    def test_sparse_equals_a_checkpoint_rounded_beforehand(self, served, on_disk, tmp_path):
        """Bit by bit: the same predictors, of an artifact that was made for the rounded checkpoint."""
        artifact = make_artifact(tmp_path / "a", on_disk, fingerprint=fingerprint_of(on_disk))
        expected, counts = log_probs(on_disk, {"predictor": artifact, "apply_to": "all"})
        assert served[0].keys() == expected.keys() and all(
            torch.equal(served[0][k], expected[k]) for k in expected
        )
        assert (
            counts["layers"] == served[1]["layers"]
            and 0 < counts["mlp_density"] < 1
            and counts["steps"]["sparse"] > 0
        )

    def test_artifact_of_the_16_bit_checkpoint_fits(self, served, model):
        found = served[1]["artifact"]
        assert found["fingerprint_verified"] and found["weights_fingerprint"] == fingerprint_of(model)

    def test_start_up_says_that_it_is_simulated(self, served):
        assert any("SIMULATED W4A16" in line and "saves no byte" in line for line in served[2])

    def test_dense_equals_transformers_quantized_in_memory(self, model):
        """The function for masked studies, and vLLM's own linears: the same rounded weights."""
        found, _ = log_probs(model, {"mode": "dense", "weight_bits": 4})
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

    def test_a_sharded_state_of_rounded_weights_is_no_checkpoint(self, served, predictors, model):
        """It holds rounded weights, which must never be served as those of the checkpoint whose fingerprint
        they had.
        """
        with (
            pytest.raises(ValueError, match="Missing keys.*weights_fingerprint"),
            engine(served[3], dejavu={"predictor": predictors(model)}, load_format="sharded_state"),
        ):
            pass

    @pytest.mark.parametrize(
        ("load_format", "reason"),
        [("dummy", "its weights are random"), ("sharded_state", "tensors that an engine had loaded")],
    )
    def test_load_formats_that_hide_the_weights(self, load_format, reason, served, model):
        with (
            pytest.raises(ValueError) as e,
            engine(served[3], dejavu={"mode": "dense", "weight_bits": 4}, load_format=load_format),
        ):
            pass
        assert (
            f"load_format='{load_format}'" in str(e.value)
            and reason in str(e.value)
            and "Use load_format='auto'" in str(e.value)
        )

    def test_any_other_format_that_hides_the_weights(self, model):
        """As a loader that somebody registers: found after loading."""
        blind = mock.patch.dict(quantization.BLIND_FORMATS, clear=True)
        with blind, pytest.raises(ValueError, match="did not come through the model's load_weights"):
            with engine(model, dejavu={"mode": "dense", "weight_bits": 4}, load_format="dummy"):
                pass

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
    """Weights are rounded whole, then cut: a rank has 64 inputs of out_proj here, half of a group."""
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
