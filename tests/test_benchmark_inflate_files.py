"""benchmarks/inflate.py: what it refuses, and which files it takes along."""

import shutil

import inflate
import pytest
from tiny import make_artifact, make_opt
from transformers import OPTConfig

from vllm_dejavu.manifest import ArtifactError
from vllm_dejavu.published import GEOMETRIES, opt_geometry


class TestRefusals:
    """What cannot be widened with the same logits ends before anything is written, with what to do
    instead.
    """

    @pytest.mark.parametrize("factor", [0, 1, -2, 2.5, True])
    def test_factors(self, opt, tmp_path, factor):
        with pytest.raises(ValueError, match="integer of at least 2"):
            inflate.inflate(opt(), tmp_path / "wide", factor)
        assert not (tmp_path / "wide").exists()

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            pytest.param(opt_geometry(600, 8, 2), "no multiple of the model's 256", id="hidden"),
            pytest.param(opt_geometry(128, 2, 2), "no multiple of the model's 256", id="smaller"),
            pytest.param(
                GEOMETRIES["6.7b"],
                r"heads of 128, the model of 64.*--factor 16 .* 64 heads of 64",
                id="head_size",
            ),
            pytest.param(GEOMETRIES["2.7b"], r"heads of 80, the model of 64.*--factor 10", id="head_size_80"),
        ],
    )
    def test_geometries(self, target, message):
        config = OPTConfig.from_pretrained(inflate.DEFAULT_MODEL)
        assert inflate.factor_for(config, GEOMETRIES["1.3b"]) == 8
        with pytest.raises(ValueError, match=message):
            inflate.factor_for(config, target)

    def test_ffn_ratio(self):
        config = OPTConfig(
            architectures=["OPTForCausalLM"], hidden_size=256, ffn_dim=512, num_attention_heads=4
        )
        with pytest.raises(ValueError, match="8192 neurons a layer, .* 4096"):
            inflate.factor_for(config, GEOMETRIES["1.3b"])

    @pytest.mark.parametrize(
        ("form", "message"),
        [
            pytest.param({"pre_ln": False}, "pre-LN", id="post_ln"),
            pytest.param({"tied": False}, "tied embeddings", id="untied"),
            pytest.param({"embed_dim": 32}, "as wide as the hidden state", id="projected"),
        ],
    )
    def test_forms(self, opt, tmp_path, form, message):
        with pytest.raises(ValueError, match=message):
            inflate.inflate(opt(**form), tmp_path / "wide", 2)
        assert not (tmp_path / "wide").exists()

    def test_output_in_use(self, opt, tmp_path):
        """The model itself, above all."""
        for output in (opt(), inflate.DEFAULT_MODEL):
            before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
            with pytest.raises(ValueError, match="not an empty directory"):
                inflate.inflate(output, output, 2)
            assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before

    def test_artifact_of_other_weights(self, tmp_path):
        """Widened, it would get the new weights' fingerprint, and nobody would notice any more."""
        model = make_opt(tmp_path / "opt")
        make_artifact(model / "dejavu", make_opt(tmp_path / "other", seed=1))
        with pytest.raises(ArtifactError, match="trained on the weights"):
            inflate.inflate(model, tmp_path / "wide", 2)
        assert not (tmp_path / "wide").exists()

    def test_command_line(self, tmp_path, capsys):
        """Errors are lines, not tracebacks."""
        with pytest.raises(SystemExit) as failed:
            inflate.main(["--geometry", "30b", "--output", str(tmp_path / "wide")])
        assert failed.value.code == 2 and "heads of 128, the model of 64" in capsys.readouterr().err


def test_copied_files_are_only_those_of_the_model(tmp_path):
    """Weights of other formats beside the original's must not be taken along: a loader may prefer them."""
    model = shutil.copytree(inflate.DEFAULT_MODEL, tmp_path / "opt")
    (model / "pytorch_model.bin").write_bytes(b"old")
    (model / "vocab.json").write_text("{}")
    wide = inflate.inflate(model, tmp_path / "wide", 2)
    assert {p.name for p in wide.iterdir()} == {
        "README.md",
        "config.json",
        "dejavu",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
