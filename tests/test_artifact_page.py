"""What docs/artifact.md says is enough to write an artifact and the fingerprint of its weights."""

import dataclasses
import re

import pytest
import tiny
import torch
from artifact_files import DOCS
from safetensors.torch import load_file

from vllm_dejavu import artifact
from vllm_dejavu.artifact import WeightsFingerprint
from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    GateSpec,
    ModelSpec,
    check_model,
)


def fingerprint(items) -> str:
    f = WeightsFingerprint()
    for name, tensor in items:
        f.add(name, tensor)
    return f.hexdigest()


class TestFingerprint:
    @pytest.fixture(scope="class")
    def weights(self, model_dir):
        return load_file(model_dir / "model.safetensors")

    def test_order_prefix_and_tied_head_do_not_matter(self, weights):
        base = fingerprint(weights.items())
        assert base == fingerprint(reversed(weights.items()))
        assert base == fingerprint((k.removeprefix("model."), v) for k, v in weights.items())
        assert base == fingerprint([*weights.items(), ("lm_head.weight", torch.ones(3))])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_16_bit_checkpoint_reads_the_same_in_32_bits(self, weights, dtype):
        half = {k: v.to(dtype) for k, v in weights.items()}
        assert fingerprint(half.items()) == fingerprint((k, v.float()) for k, v in half.items())

    def test_any_changed_tensor_changes_it(self, weights):
        base = fingerprint(weights.items())
        for name in weights:
            changed = {**weights, name: weights[name] * 1.01 + 0.01}
            assert fingerprint(changed.items()) != base, name

    def test_tee_passes_everything_on(self, weights):
        f = WeightsFingerprint()
        assert [name for name, _ in f.tee(weights.items())] == list(weights)
        assert f.hexdigest() == fingerprint(weights.items())

    def test_first_and_last_value_of_every_tensor_count(self, weights):
        base = fingerprint(weights.items())
        for name, place in ((name, place) for name in weights for place in (0, -1)):
            changed = weights[name].clone()
            changed.view(-1)[place] += 1
            assert fingerprint({**weights, name: changed}.items()) != base, name

    def test_it_is_as_documented(self, weights):
        """The function printed in docs/artifact.md, without torch.

        Bug: the sampled positions came from a floating-point linspace, whose rounding (1058 values: one
        position) depends on who computes it; now they are integers.
        """
        documented = documented_code("fingerprint")
        odd = {f"layers.0.odd{n}": torch.arange(float(n)) for n in (1, 2, 511, 512, 513, 1058, 2052, 19993)}
        for tensors in (weights, {k: v.half() for k, v in weights.items()}, odd):
            assert documented({k: v.numpy() for k, v in tensors.items()}) == fingerprint(tensors.items())


def documented_code(function):
    """A function out of docs/artifact.md."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    names: dict = {}
    exec(next(b for b in blocks if f"def {function}(" in b), names)
    return names[function]


def test_the_documented_manifest_is_one(tmp_path):
    text = re.search(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S).group(1)
    (tmp_path / MANIFEST_FILE).write_text(text)
    manifest, _ = artifact.load_manifest(tmp_path)
    assert manifest.layers[0]["mlp"].sparse and not manifest.layers[0]["attention"].sparse


def test_every_key_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    for cls in (ModelSpec, GateSpec):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in text or f"`model.{field.name}`" in text, field.name


def test_the_documented_example_writes_a_loadable_artifact(model_dir, tmp_path):
    from transformers import OPTConfig

    spec = ModelSpec.from_hf_config(
        OPTConfig.from_pretrained(model_dir), "tiny", tiny.fingerprint_of(model_dir)
    )
    documented_code("write")(str(tmp_path / "made"), dataclasses.asdict(spec))
    loaded = artifact.load(tmp_path / "made")
    assert loaded.manifest.layers[0]["mlp"].sparse and not loaded.manifest.layers[1]["mlp"].sparse
    check_model(loaded.manifest, spec)
