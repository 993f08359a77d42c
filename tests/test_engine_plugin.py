"""The plugin at the level of an engine: who gets our class, what is refused at start-up, what every load
format ends with.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import HAS_GPU
from engine import engine, generate, metrics_of, model_of, random_prompt
from safetensors.torch import load_file, save_file
from tiny import make_artifact, make_opt, rewrite_tensors
from transformers import LlamaConfig
from vllm.platforms import current_platform

import vllm_dejavu
from vllm_dejavu import artifact as artifacts
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.engine import check_engine

PROMPTS = [random_prompt(5), random_prompt(11)]


@pytest.fixture(scope="module")
def model(opt):
    return opt()


@pytest.fixture(scope="module")
def artifact(model, predictors):
    return predictors(model)


def edit_json(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refusal(model, dejavu=None, **options) -> str:
    """The error of an engine that must not start, as one line."""
    with pytest.raises(ValueError) as caught, engine(model, dejavu=dejavu, **options):
        pass
    return " ".join(str(caught.value).split())


class TestWhoGetsOurClass:
    @pytest.mark.parametrize("impl", ["auto", "vllm"])
    def test_vllms_own_opt_is_untouched(self, impl, model, artifact):
        """Our plugin is registered (twice), and still every other model_impl gives vLLM's class, whatever our
        settings say.
        """
        vllm_dejavu.register()
        vllm_dejavu.register()
        with engine(model, impl=impl, dejavu={"predictor": artifact}) as llm:
            assert llm.model_config.architecture == "OPTForCausalLM"
            assert type(model_of(llm)).__module__ == "vllm.model_executor.models.opt"
            assert llm.llm_engine.vllm_config.additional_config == {"dejavu": {"predictor": str(artifact)}}

    def test_model_impl_dejavu_is_ours(self, model, artifact):
        with engine(model, dejavu={"predictor": artifact}) as llm:
            assert llm.model_config.architecture == "DejaVuOPTForCausalLM"
            assert type(model_of(llm)).__module__ == "vllm_dejavu.models.opt"
            # a changed artifact must change vLLM's compile-cache key
            settings = llm.llm_engine.vllm_config.additional_config["dejavu"]
            assert settings["artifact_digest"].split()[0] == artifacts.load(artifact).digest

    def test_artifact_beside_the_model(self, model, tmp_path):
        """Without settings the artifact is looked for in MODEL/dejavu/."""
        shutil.copytree(model, tmp_path / "m")
        beside = make_artifact(tmp_path / "m" / "dejavu", tmp_path / "m")
        with engine(tmp_path / "m") as llm:
            generate(llm, PROMPTS, 4)
            counted = metrics_of(llm)
        assert counted["artifact"]["path"] == str(beside) and counted["artifact"]["fingerprint_verified"]
        assert counted["steps"]["sparse"] == 3


class TestRefusedModels:
    def test_another_architecture(self, tmp_path):
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=256,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(tmp_path)
        error = refusal(tmp_path)
        assert (
            "model_impl='dejavu' supports the architectures ['OPTForCausalLM', 'NemotronForCausalLM']"
            in error
            and "LlamaForCausalLM" in error
        )

    def test_activation_other_than_relu(self, model, tmp_path):
        shutil.copytree(model, tmp_path, dirs_exist_ok=True)
        edit_json(tmp_path / "config.json", lambda c: c.update(activation_function="gelu"))
        error = refusal(tmp_path, {"mode": "dense"})
        assert "needs an activation that is exactly 0" in error and "'gelu'" in error

    def test_quantized_checkpoint(self, model, artifact, tmp_path):
        shutil.copytree(model, tmp_path, dirs_exist_ok=True)
        edit_json(
            tmp_path / "config.json",
            lambda c: c.update(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        )
        assert "does not support quantization='fp8'" in refusal(tmp_path, {"predictor": artifact})

    @pytest.mark.parametrize("change", ["missing", "unknown"])
    def test_incomplete_checkpoint(self, change, model, artifact, tmp_path):
        """A tensor missing or unknown is named; nothing is served with what happened to be in memory."""
        shutil.copytree(model, tmp_path, dirs_exist_ok=True)
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(n for n in tensors if n.endswith("layers.1.fc2.weight"))
        tensors[name.replace("fc2", "fc3")] = tensors[name].clone()
        if change == "missing":
            del tensors[name], tensors[name.replace("fc2", "fc3")]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        error = refusal(tmp_path, {"predictor": artifact})
        assert (
            ("lacks 1 tensor(s), first" in error and "fc2" in error)
            if change == "missing"
            else ("lacks" in error and "fc3" in error)
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            {"quantization": "fp8"},
            "quantization='fp8': its rows cannot be gathered; those of compressed-tensors",
            id="quantization",
        ),
        pytest.param({"enable_lora": True}, "enable_lora=True: predictors are trained", id="lora"),
        pytest.param(
            {"compilation_config": {"cudagraph_mode": "FULL"}, "enforce_eager": False},
            "cudagraph_mode='FULL': one full graph",
            id="cudagraph_full",
        ),
        pytest.param(
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config='ExampleConnector': the cache depends on mode and predictor",
            id="kv_connector",
        ),
        pytest.param(
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
            "decode_context_parallel_size=2",
            id="decode_context_parallel",
        ),
        pytest.param(
            {"prefill_context_parallel_size": 2},
            "prefill_context_parallel_size=2",
            id="prefill_context_parallel",
        ),
        pytest.param({"enable_dbo": True}, "enable_dbo=True", id="microbatches"),
        pytest.param(
            {"tensor_parallel_size": 3},
            "tensor_parallel_size=3: 2 heads and 256 neurons",
            id="uneven_tensor_parallel",
        ),
    ],
)
def test_refused_engine_options(options, words, model, artifact):
    """Each is refused in the front end, before any worker starts, with its reason and the remedy."""
    error = refusal(model, {"predictor": artifact}, **options)
    assert f"model_impl='dejavu' does not support {words}" in error
    assert "Remove the option, or serve without --model-impl dejavu." in error


def test_an_fp8_cache_is_refused_on_a_gpu(model, artifact, monkeypatch):
    """Whose kernels are ours; on a CPU vLLM's own operators read it (test_engine_native.py)."""
    with engine(model, dejavu={"predictor": artifact}, kv_cache_dtype="fp8") as llm:
        config = llm.llm_engine.vllm_config
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match="kv_cache_dtype='fp8': selected heads are read from an unquantized"):
        check_engine(config, DejaVuConfig.from_vllm_config(config), in_worker=True)


class TestRefusedSettingsAndArtifacts:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            pytest.param(
                {"densty": 0.1},
                "Unknown setting additional_config[\"dejavu\"]['densty']=0.1",
                id="unknown_setting",
            ),
            pytest.param({"mode": "fast"}, "[\"mode\"]='fast' is not allowed", id="wrong_value"),
            pytest.param({"row_exact": "yes"}, "[\"row_exact\"]='yes' is not allowed", id="wrong_type"),
            pytest.param(
                {"predictor": "/nowhere/at/all"},
                "No predictor artifact at /nowhere/at/all",
                id="missing_artifact",
            ),
            pytest.param({}, "No predictor artifact: looked for", id="no_artifact_beside_the_model"),
        ],
    )
    def test_settings(self, settings, words, model):
        assert words in refusal(model, settings)

    @pytest.mark.parametrize("mode", ["sparse", "dense"])
    def test_another_geometry(self, mode, model, opt, predictors):
        """Refused even in mode="dense" if an artifact is named."""
        error = refusal(model, {"predictor": predictors(opt(hidden=128, heads=4)), "mode": mode})
        assert "hidden_size=128" in error and "hidden_size=64" in error and "Retrain it" in error

    def test_weights_of_another_model(self, model, opt, predictors):
        """The same geometry, other weights: found from the fingerprint taken while the checkpoint loads."""
        error = refusal(model, {"predictor": predictors(opt(seed=1))})
        assert "was trained on the weights of" in error and error.count("sha256:") == 2

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            pytest.param(
                lambda d: (d / "dejavu.json").unlink(), "No predictor artifact at", id="no_manifest"
            ),
            pytest.param(
                lambda d: (d / "predictors.safetensors").unlink(),
                "has no predictors.safetensors",
                id="no_tensors",
            ),
            pytest.param(
                lambda d: edit_json(d / "dejavu.json", lambda m: m.update(format_version=4)),
                "expected format_version 1, 2 or 3, found 4",
                id="format_version",
            ),
            pytest.param(
                lambda d: edit_json(d / "dejavu.json", lambda m: m["model"].update(layer_norm="post")),
                "layer_norm='post'",
                id="other_variant",
            ),
            pytest.param(
                lambda d: (d / "predictors.safetensors").write_bytes(
                    (d / "predictors.safetensors").read_bytes()[:-100]
                ),
                "cut short",
                id="truncated",
            ),
            pytest.param(
                lambda d: rewrite_tensors(d, lambda t: t["layers.1.mlp.up"].fill_(float("nan"))),
                "of 'layers.1.mlp.up' are not finite",
                id="nan",
            ),
            pytest.param(
                lambda d: rewrite_tensors(d, lambda t: t.pop("layers.1.mlp.up")),
                "misses 1 tensor(s), first 'layers.1.mlp.up'",
                id="missing_tensor",
            ),
            pytest.param(
                lambda d: rewrite_tensors(d, lambda t: t.update(more=torch.ones(1))),
                "has unexpected 1 tensor(s), first 'more'",
                id="extra_tensor",
            ),
            pytest.param(
                lambda d: rewrite_tensors(d, lambda t: t["layers.1.mlp.up"].mul_(2)),
                "expects sha256",
                id="edited_tensor",
            ),
        ],
    )
    def test_damaged_artifact(self, damage, words, model, artifact, tmp_path):
        shutil.copytree(artifact, tmp_path / "a")
        damage(tmp_path / "a")
        assert words in refusal(model, {"predictor": tmp_path / "a"})


def assert_own_predictors(llm, artifact) -> None:
    """Every predictor tensor of the served model is bit by bit the artifact's; a rank that is no multiple of
    16 ends in zeros.
    """
    tensors = load_file(artifact / "predictors.safetensors")
    gates = model_of(llm).gates
    served = {
        f"layers.{g.layer}.{g.block}.{name}": t for g in gates for name, t in g.predictor.named_buffers()
    }
    assert served.keys() == tensors.keys() and len(gates) == 6
    for name, tensor in tensors.items():
        own = served[name][tuple(slice(n) for n in tensor.shape)]
        assert own.dtype == tensor.dtype and torch.equal(own, tensor), name
        assert served[name].count_nonzero() == tensor.count_nonzero(), "the padding is not zero"
    assert all(
        t.shape[t.ndim - 2 if n.endswith("down") else -1] == 16
        for n, t in served.items()
        if n.endswith(("down", "up"))
    )


class TestLoadFormats:
    """However the model's weights are loaded, the predictors are the artifact's own, and checked against the
    weights.
    """

    @pytest.fixture(scope="class")
    def saved(self, model, artifact, tmp_path_factory):
        """(sharded state saved by our engine, what that engine generated)."""
        directory = tmp_path_factory.mktemp("sharded")
        with engine(model, dejavu={"predictor": artifact}) as llm:
            tokens = generate(llm, PROMPTS, 8)
            llm.llm_engine.engine_core.save_sharded_state(str(directory))
        for name in ("config.json", "generation_config.json"):
            shutil.copy(model / name, directory / name)
        return directory, tokens

    def test_auto(self, model, artifact):
        with engine(model, dejavu={"predictor": artifact}) as llm:
            assert_own_predictors(llm, artifact)
            assert metrics_of(llm)["artifact"]["fingerprint_verified"]

    def test_dummy(self, model, artifact):
        """Random weights carry no fingerprint: served, reported as not verified, predictors untouched by the
        filling-in.
        """
        with engine(model, dejavu={"predictor": artifact}, load_format="dummy") as llm:
            assert_own_predictors(llm, artifact)
            generate(llm, PROMPTS, 4)
            counted = metrics_of(llm)
        assert (
            counted["artifact"]["weights_fingerprint"] is None
            and not counted["artifact"]["fingerprint_verified"]
        )
        assert counted["steps"]["sparse"] == 3

    def test_sharded_state(self, saved, artifact):
        """A sharded state holds no predictors; it does carry the fingerprint, so the artifact is verified as
        usual.
        """
        directory, tokens = saved
        assert not any("predictor" in n for f in directory.glob("*.safetensors") for n in load_file(f))
        with engine(directory, dejavu={"predictor": artifact}, load_format="sharded_state") as llm:
            assert_own_predictors(llm, artifact)
            assert generate(llm, PROMPTS, 8) == tokens
            assert metrics_of(llm)["artifact"]["fingerprint_verified"]

    def test_sharded_state_with_another_artifact(self, saved, artifact, model, predictors):
        """The predictors in use are those of the artifact named now; one of other weights is refused."""
        other = predictors(model, seed=3)
        with engine(saved[0], dejavu={"predictor": other}, load_format="sharded_state") as llm:
            assert_own_predictors(llm, other)
        wrong = predictors(model, fingerprint="sha256:" + "0" * 64)
        assert "was trained on the weights of" in refusal(
            saved[0], {"predictor": wrong}, load_format="sharded_state"
        )

    def test_sharded_state_of_a_partly_dense_model(self, model, predictors, tmp_path):
        """Layers without gates keep vLLM's own linears. On a CPU those repack their weights and drop the
        originals, so that vLLM's sharded states lack them, its own OPT's too: an error on loading, never
        weights out of nowhere."""
        settings = {"predictor": predictors(model, dense_layers=(1,))}
        with engine(model, dejavu=settings) as llm:
            tokens = generate(llm, PROMPTS, 8)
            llm.llm_engine.engine_core.save_sharded_state(str(tmp_path))
        shutil.copy(model / "config.json", tmp_path)
        if not HAS_GPU:
            error = refusal(tmp_path, settings, load_format="sharded_state")
            assert "Missing keys" in error and "layers.1.mlp.fc1.weight" in error
            return
        with engine(tmp_path, dejavu=settings, load_format="sharded_state") as llm:
            assert generate(llm, PROMPTS, 8) == tokens


def test_fingerprint_ignores_dtype_and_tied_heads(tmp_path, model, artifact):
    """The artifact fits its model served in bfloat16 too, and the same checkpoint with its tied head written
    out.
    """
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(t for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    save_file(
        {**tensors, "lm_head.weight": embedding.clone()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with engine(tmp_path, dejavu={"predictor": artifact}) as llm:
        assert metrics_of(llm)["artifact"]["fingerprint_verified"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fingerprint_of_a_16_bit_checkpoint(dtype, tmp_path):
    """Served in its own type or in float32, a 16-bit checkpoint has the fingerprint its artifact was trained
    with.
    """
    model = make_opt(tmp_path / "m", dtype=dtype)
    artifact = make_artifact(tmp_path / "a", model)
    for served in (dtype, "float32"):
        with engine(model, dejavu={"predictor": artifact}, dtype=served) as llm:
            assert metrics_of(llm)["artifact"]["fingerprint_verified"]
