"""`predictor: auto`: built once, from text the model writes itself; served; rebuilt for other weights."""

import subprocess

import pytest
import tiny
from engine import engine, generate, metrics_of, random_prompt

from vllm_dejavu import artifact, auto, locate
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.manifest import MANIFEST_FILE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_opt(tmp_path_factory.mktemp("auto") / "tiny-opt")


@pytest.fixture(autouse=True)
def small_cache(tmp_path_factory, monkeypatch):
    """A cache of this module's own, and a recipe small enough for a model of 128 positions."""
    monkeypatch.setenv(auto.CACHE_VARIABLE, str(tmp_path_factory.getbasetemp() / "auto-cache"))
    monkeypatch.setattr(
        auto,
        "RECIPE",
        {**auto.RECIPE, "max-tokens": 1024, "valid-tokens": 512, "seq-len": 64, "max-ppl-increase": 0.5},
    )


def test_first_start_builds_and_serves_sparse(model):
    prompts = [random_prompt(n) for n in (5, 9)]
    with engine(model, dejavu={"predictor": "auto"}) as llm:
        generate(llm, prompts, 8)
        counted = metrics_of(llm)
        path = llm.llm_engine.vllm_config.additional_config["dejavu"]["predictor"]
    assert path.startswith(str(auto.cache_directory()))  # workers are told where it lies
    assert artifact.load(path).manifest.training["data"] == ["self"]
    assert counted["steps"]["sparse"] > 0 and counted["mlp_density"] < 1
    assert counted["artifact"]["fingerprint_verified"]


def test_second_start_reads_the_cache(model, monkeypatch):
    first = auto.resolve(str(model))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("built again"))
    assert auto.resolve(str(model)) == first
    assert locate.resolve("auto", str(model)) == first


def test_other_weights_have_an_artifact_of_their_own(model, tmp_path):
    other = tiny.make_opt(tmp_path / "tiny-opt", seed=1)
    assert auto._key(other) != auto._key(model)


def test_another_recipe_is_another_artifact(model, monkeypatch):
    before = auto._key(model)
    monkeypatch.setattr(auto, "RECIPE", {**auto.RECIPE, "seed": 1})
    assert auto._key(model) != before


def test_failure_names_the_command_and_leaves_no_artifact(tmp_path):
    broken = tiny.make_opt(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match="vllm_dejavu.cli train"):
        auto.resolve(str(broken))
    assert not (auto.cache_directory() / auto._key(broken) / MANIFEST_FILE).exists()


def test_banner_says_what_it_was_made_from(model):
    from vllm_dejavu.models.base import _origin

    manifest = artifact.load(auto.resolve(str(model))).manifest
    assert "text that the model wrote itself" in _origin(manifest)
    assert "% on such text" in _origin(manifest)


def test_auto_is_a_setting():
    assert DejaVuConfig.from_dict({"predictor": "auto"}).predictor == auto.AUTO


def test_cache_directory_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv(auto.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert auto.cache_directory() == tmp_path / "vllm-dejavu"
