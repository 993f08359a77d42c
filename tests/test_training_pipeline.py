"""`vllm-dejavu train` as a user runs it: what a whole run leaves, and every choice that it offers."""

import builtins
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from training_runs import PLOTS, config, files, lines

from vllm_dejavu import artifact, cli
from vllm_dejavu.manifest import ArtifactError
from vllm_dejavu.predictor_training import collect, data, pipeline, samples
from vllm_dejavu.predictor_training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_run_leaves_a_loadable_artifact_and_its_metrics_and_nothing_else(trained):
    made, output = trained
    loaded = artifact.load(output)
    assert loaded.digest == made.digest
    assert sorted(p.name for p in output.parent.iterdir()) == ["artifact", "artifact.run"]
    assert files(output) == ["README.md", "dejavu.json", "predictors.safetensors"]
    assert files(output.parent / "artifact.run") == ["metrics.jsonl", *PLOTS]
    assert any(g.sparse for layer in loaded.manifest.layers for g in layer.values())
    assert loaded.manifest.calibration["ppl_increase"] <= 0.1
    assert loaded.manifest.training["data"] == ["prose.txt"]
    gates = [
        (i, block, g)
        for i, layer in enumerate(loaded.manifest.layers)
        for block, g in layer.items()
        if g.sparse
    ]
    assert {g.dtype for *_, g in gates} == {"int8"}, "the default"
    assert all(g.lookahead == ("previous" if block == "attention" and i else "self") for i, block, g in gates)


def test_same_seed_same_artifact(trained, model, text, tmp_path):
    made, _ = trained
    again = pipeline.run(config(model, text, tmp_path / "again"))
    assert again.digest == made.digest


def test_text_sampled_from_the_model_itself(model, tmp_path):
    made = pipeline.run(config(model, "self", tmp_path / "self", max_tokens=2048, valid_tokens=512))
    assert not (tmp_path / "self.run" / "sampled.json").exists()
    assert made.manifest.training["data"] == ["self"] and made.manifest.training["tokens"] >= 1024


def test_an_existing_artifact_is_not_overwritten_unasked(trained, model, text):
    _, output = trained
    before = (output / "dejavu.json").read_bytes()
    with pytest.raises(ArtifactError, match="--overwrite"):
        pipeline.run(config(model, text, output))
    assert (output / "dejavu.json").read_bytes() == before


def test_inspect_shows_every_gate(trained, capsys):
    made, output = trained
    assert cli.main(["inspect", str(output)]) == 0
    table = capsys.readouterr().out
    for i, layer in enumerate(made.manifest.layers):
        for block, gate in layer.items():
            assert any(line.split()[:3] == [str(i), block, gate.state] for line in table.splitlines())
    assert made.manifest.model.fingerprint in table


def test_manifest_is_plain_json(trained):
    _, output = trained
    raw = json.loads((output / "dejavu.json").read_text())
    assert raw["format"] == "vllm-dejavu-predictor" and len(raw["layers"]) == 3


def test_split_is_by_document(text):
    """No document's words are in both splits (each document has its own place name)."""
    documents = list(data.read_documents(text))
    train, valid = data.split_documents(documents, 0.25, 0)
    assert len(train) + len(valid) == len(documents) == 8 and valid


def test_fingerprint_of_an_fp32_checkpoint_with_a_16_bit_config(tmp_path):
    """transformers would read it in 16 bits; vLLM fingerprints the values as stored."""
    from vllm_dejavu.predictor_training.hf_model import HfModel

    directory = tiny.make_opt(tmp_path / "m")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": "float16"}))
    assert HfModel(str(directory)).spec.fingerprint == tiny.fingerprint_of(directory)


class TestMemoryAndDisk:
    def test_several_passes_give_the_same_artifact(self, trained, model, text, tmp_path, capsys):
        """Moments of one layer at a time: three passes, each only as far as its layer."""
        made, _ = trained
        limit = collect.layer_bytes(64, 256, 2, {"mlp": ("self",), "attention": ("previous",)})
        again = pipeline.run(config(model, text, tmp_path / "a", max_memory=limit))
        assert again.digest == made.digest
        log = lines(tmp_path / "a.run")
        assert [r["layers"] for r in log if r["stage"] == "collect"] == [[0, 1], [1, 2], [2, 3]]
        with pytest.raises(ValueError, match="cannot hold the moments of one layer"):
            pipeline.run(config(model, text, tmp_path / "b", max_memory=limit - 1))
        assert not (tmp_path / "b").exists()

    def test_stored_activations_stay_below_the_limit(self, model, text, tmp_path):
        limit = 200_000
        pipeline.run(
            config(
                model,
                text,
                tmp_path / "a",
                form="finetuned",
                loss="energy",
                head_form="paper",
                max_disk=limit,
            )
        )
        (collected,) = [r for r in lines(tmp_path / "a.run") if r["stage"] == "collect"]
        assert limit / 10 < collected["sample_bytes"] <= limit
        assert files(tmp_path / "a.run") == ["metrics.jsonl", *PLOTS], "removed afterwards"
        with pytest.raises(ValueError, match="--max-disk 1000 bytes cannot hold"):
            pipeline.run(config(model, text, tmp_path / "b", form="finetuned", max_disk=1000))

    def test_the_closed_form_stores_none(self, model, text, tmp_path, monkeypatch):
        monkeypatch.setattr(samples.SampleStore, "write", lambda *a: pytest.fail("stored"))
        pipeline.run(config(model, text, tmp_path / "a", form="closed_form", max_disk=1))


def test_gradient_tokens_bound_what_is_stored(model, text, tmp_path, monkeypatch):
    """Drawn evenly over the text, not its beginning."""
    written = []
    write = samples.SampleStore.write
    monkeypatch.setattr(
        samples.SampleStore,
        "write",
        lambda self, layer, part, rows: (
            written.append((layer, part, len(rows))) or write(self, layer, part, rows)
        ),
    )
    pipeline.run(config(model, text, tmp_path / "a", form="finetuned", gradient_tokens=200))
    first = [(part, rows) for layer, part, rows in written if layer == 0]
    assert 150 <= sum(rows for _, rows in first) <= 200
    assert sum(rows > 0 for _, rows in first) >= 0.8 * len(first), "the kept tokens lie together"


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "finetuned"},
        {"form": "paper", "head_form": "paper", "head_label": "output_norm"},
        {"form": "svd"},
        {"loss": "bce"},
        {"form": "finetuned", "loss": "energy", "neuron_label": "energy", "energy_share": 0.9},
        {"dtype": "float16", "mlp_lookahead": "attn_input"},
        {"dtype": "bfloat16", "head_lookahead": "self"},
        {"model_dtype": "bfloat16"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_choice_makes_an_artifact_within_its_budget(model, text, tmp_path, changes):
    made = pipeline.run(config(model, text, tmp_path / "a", max_ppl_increase=0.3, **changes))
    loaded = artifact.load(tmp_path / "a")
    assert loaded.digest == made.digest and loaded.manifest.calibration["ppl_increase"] <= 0.3
    assert any(layer["mlp"].sparse for layer in loaded.manifest.layers)
    assert {g.dtype for layer in loaded.manifest.layers for g in layer.values() if g.sparse} == {
        changes.get("dtype", "int8")
    }
    for name in ("form", "head_form", "loss", "neuron_label", "head_label"):
        assert loaded.manifest.training[name] == changes.get(name, getattr(TrainConfig, name))
    lines(tmp_path / "a.run")


class TestReport:
    def test_metrics(self, trained):
        made, output = trained
        log = lines(output.parent / "artifact.run")
        assert all({"stage", "time"} <= r.keys() for r in log)
        assert all(isinstance(r["time"], float) for r in log)  # not their order: clocks are set back at times
        stages = [r["stage"] for r in log]
        assert list(dict.fromkeys(stages)) == [
            "settings",
            "text",
            "collect",
            "fit",
            "calibrate",
            "gate",
            "done",
        ]
        assert (
            log[0]["rank"] == 16
            and log[0]["seed"] == 0
            and log[-1]["digest"] == made.digest
            and log[-1]["seconds"] > 0
        )
        text = log[stages.index("text")]
        assert (text["training_tokens"], text["calibration_tokens"]) == (
            made.manifest.training["tokens"],
            made.manifest.calibration["tokens"],
        )
        assert [(r["layer"], r["block"], r["state"]) for r in log if r["stage"] == "gate"] == [
            (i, block, layer[block].state)
            for i, layer in enumerate(made.manifest.layers)
            for block in ("mlp", "attention")
        ]
        nats = {r["measured"]: r["nats"] for r in log if r["stage"] == "calibrate"}
        assert torch.tensor(nats["dense/all"]).exp() == pytest.approx(
            made.manifest.calibration["dense_ppl"], rel=1e-5
        )

    def test_plots_are_pictures(self, trained):
        _, output = trained
        for name in PLOTS:
            data = (output.parent / "artifact.run" / name).read_bytes()
            assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000

    def test_without_matplotlib_training_succeeds_and_says_so(
        self, trained, model, text, tmp_path, monkeypatch, capsys
    ):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.split(".")[0] == "matplotlib":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", refuse)
        assert pipeline.run(config(model, text, tmp_path / "a")).digest == trained[0].digest
        assert "matplotlib is not installed (pip install 'vllm-dejavu[train]')" in capsys.readouterr().err
        assert files(tmp_path / "a.run") == ["metrics.jsonl"]

    def test_the_card_says_what_it_is(self, trained, model, text):
        made, output = trained
        card, m = (output / "README.md").read_text(), made.manifest
        assert card.startswith("---\nlibrary_name: vllm-dejavu\n")
        for fact in (
            m.model.fingerprint,
            "prose.txt",
            f"{m.training['tokens']:,} tokens",
            f"{m.calibration['dense_ppl']:.3f} dense",
            "budget 10%",
            "MLP rank 16, int8",
            "seed 0",
            "form finetuned",
            "lookahead | MLP `self`, heads `previous`",
            f"torch {torch.__version__}",
            '"predictor": "artifact"',
        ):
            assert fact in card, fact
        table = [
            line.split("|")[1:3]
            for line in card.splitlines()
            if line.startswith("| ") and line.split("|")[1].strip().isdigit()
        ]
        assert [(int(i), b.strip()) for i, b in table] == [
            (i, b) for i, layer in enumerate(m.layers) for b, g in layer.items() if g.sparse
        ]
        home = {str(Path.home())} - {"/"}  # where a user has no home
        for path in (model, text, str(output), str(output.parent), "/tmp", *home):
            assert path not in card


def test_somebodys_own_readme_beside_the_artifact_stays(model, text, tmp_path, capsys):
    """Bug: the card replaced any README.md in the output directory."""
    output = tmp_path / "a"
    output.mkdir()
    (output / "README.md").write_text("# My notes\n")
    pipeline.run(config(model, text, output))
    assert (output / "README.md").read_text() == "# My notes\n"
    assert "left as it is" in capsys.readouterr().err
    (output / "README.md").unlink()
    for _ in range(2):  # a card of ours is replaced
        pipeline.run(config(model, text, output), overwrite=True)
        assert (output / "README.md").read_text().startswith("---\nlibrary_name: vllm-dejavu\n")
