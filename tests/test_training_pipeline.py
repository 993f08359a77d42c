"""`vllm-dejavu train` as a user runs it, on a small random OPT with a real tokenizer: whole, interrupted,
refused.
"""

import argparse
import builtins
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vllm_dejavu import artifact, cli
from vllm_dejavu.manifest import ArtifactError
from vllm_dejavu.predictor_training import calibrate, collect, data, pipeline, samples
from vllm_dejavu.predictor_training.pipeline import TrainConfig

TOKENIZER = Path(__file__).parent.parent / "examples" / "opt-books-7m"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny.make_opt(tmp_path_factory.mktemp("model"), vocab=8192)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Eight documents of plain prose, enough for a few windows of 64 tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    scenes = [
        "the old house by the river",
        "a letter from her brother",
        "the road to the village",
        "my father's library",
    ]
    documents = [
        " ".join(
            f"It was {place} that she remembered in the {n}th year, and nobody spoke of {place} again."
            for n in range(4, 40)
        )
        for place in scenes * 2
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def config(model, text, output, **changes) -> TrainConfig:
    small = {
        "seq_len": 64,
        "max_tokens": 2048,
        "valid_tokens": 128,
        "valid_share": 0.25,
        "rank": 16,
        "max_ppl_increase": 0.1,
        "batch": 4,
    }
    return TrainConfig(model=model, data=(text,), output=str(output), **{**small, **changes})


@pytest.fixture(scope="module")
def trained(model, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "artifact"
    return pipeline.run(config(model, text, output)), output


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


PLOTS = ["plots/curve.png", "plots/layers.png", "plots/scores.png"]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing takes a third of a small run. `trained`, made before this, draws; the others leave empty
    files.
    """
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "tight_layout", lambda self: None)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


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


class Killed(BaseException):
    """Stands for a kill signal: nothing in the pipeline may catch it."""


@pytest.mark.parametrize("stage", ["collect", "calibrate", "save"])
def test_interrupted_run_leaves_no_artifact_and_resumes_to_the_same(
    trained, model, text, tmp_path, monkeypatch, stage
):
    made, _ = trained
    output = tmp_path / "artifact"
    collected, measured = [], []
    decoder, measure = collect.OptModel.decoder, calibrate.Masked.nll_from
    monkeypatch.setattr(
        collect.OptModel,
        "decoder",
        lambda self, tokens, last_layer: collected.append(1) or decoder(self, tokens, last_layer),
    )
    monkeypatch.setattr(
        calibrate.Masked, "nll_from", lambda self, runs: measured.append(1) or measure(self, runs)
    )
    monkeypatch.setattr(collect.Collector.run, "__defaults__", (1, None))  # a checkpoint after every batch
    with monkeypatch.context() as m:
        if stage == "collect":
            m.setattr(
                collect.OptModel,
                "decoder",
                lambda self, tokens, last_layer: (
                    kill()
                    if len(collected) >= 3
                    else collected.append(1) or decoder(self, tokens, last_layer)
                ),
            )
        elif stage == "calibrate":
            m.setattr(
                calibrate.Masked,
                "nll_from",
                lambda self, runs: (
                    kill() if len(measured) >= 5 else measured.append(1) or measure(self, runs)
                ),
            )
        else:
            m.setattr(artifact.os, "rename", lambda *a: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, output))
    with pytest.raises(ArtifactError):
        artifact.load(output)
    assert not output.exists() and (tmp_path / "artifact.run").is_dir()

    batches, probes = len(collected), len(measured)
    resumed = pipeline.run(config(model, text, output), resume=True)
    assert resumed.digest == made.digest
    # 32 windows of text are 8 batches; each is collected once, each candidate measured once.
    assert len(collected) == 8 and batches == (3 if stage == "collect" else 8)
    assert probes == {"collect": 0, "calibrate": 5}.get(stage, len(measured)) and len(measured) > 5
    assert files(tmp_path / "artifact.run") == ["metrics.jsonl", *PLOTS]


def kill():
    raise Killed


def test_changed_settings_do_not_reuse_an_interrupted_run(model, text, tmp_path, monkeypatch):
    """A checkpoint of another seed would silently train on other text."""
    run_dir = tmp_path / "artifact.run"
    with monkeypatch.context() as m:
        m.setattr(artifact, "save", lambda *a, **k: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, tmp_path / "artifact"))
    kept = load_file(run_dir / "fitted-0-3.safetensors")
    with monkeypatch.context() as m:
        m.setattr(artifact, "save", lambda *a, **k: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, tmp_path / "artifact", seed=1, max_tokens=1024))
    assert not any(
        bool((kept[k] == v).all())
        for k, v in load_file(run_dir / "fitted-0-3.safetensors").items()
        if k.endswith("up")
    )


def test_text_sampled_from_the_model_itself(model, tmp_path):
    made = pipeline.run(config(model, "self", tmp_path / "self", max_tokens=2048, valid_tokens=512))
    assert not (tmp_path / "self.run" / "sampled.json").exists()
    assert made.manifest.training["data"] == ["self"] and made.manifest.training["tokens"] >= 1024


def test_rank_above_the_hidden_size_is_refused(model, text, tmp_path):
    with pytest.raises(ValueError, match="hidden size 64"):
        pipeline.run(config(model, text, tmp_path / "x", rank=4096))
    assert not (tmp_path / "x").exists()


def test_text_shorter_than_one_sequence_is_refused(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("One line.\n\nAnother.\n")
    with pytest.raises(data.DataError, match="one sequence"):
        pipeline.run(config(model, str(short), tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "--rank -1"),
        ({"max_ppl_increase": -0.5}, "--max-ppl-increase -0.5"),
        ({"valid_share": 1.5}, "--valid-share 1.5"),
        ({"mlp_lookahead": "next"}, "--mlp-lookahead 'next'"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"form": "magic"}, "--form 'magic' is unknown"),
        ({"head_form": "svd"}, "--head-form 'svd'"),
        ({"loss": "mse"}, "--loss 'mse'"),
        ({"neuron_label": "large"}, "--neuron-label 'large'"),
        ({"head_label": "x"}, "--head-label 'x'"),
        ({"model_dtype": "int8"}, "--model-dtype 'int8'"),
        ({"energy_share": 0.0}, "--energy-share 0.0"),
        ({"head_share": 2.0}, "--head-share 2.0"),
        ({"max_disk": -1}, "--max-disk -1"),
        # Bug: this was found out after the whole pass over the text.
        ({"form": "svd", "mlp_lookahead": "previous"}, "--form svd is for --mlp-lookahead self only"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_bad_values_name_the_flag(model, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(model, text, tmp_path / "x", **changes)


def test_cli_reports_errors_in_one_line(model, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.main(["train", "--model", model, "--data", str(empty), "--output", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "empty" in error and "Traceback" not in error
    (tmp_path / "file").write_text("")
    assert (
        cli.main(["train", "--model", model, "--data", str(empty), "--output", str(tmp_path / "file" / "x")])
        == 1
    )
    assert "cannot be written" in capsys.readouterr().err
    assert (
        cli.main(["train", "--model", "/no/such/model", "--data", "self", "--output", str(tmp_path / "x")])
        == 1
    )
    assert "Model /no/such/model: no such directory" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "dejavu.json" in capsys.readouterr().err


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


def test_changed_text_does_not_reuse_an_interrupted_run(model, tmp_path, monkeypatch):
    """The file kept its name: moments of the old text would be continued with windows of the new one."""
    source = tmp_path / "prose.txt"
    for words in ("the river rose in the night", "a carriage stood before the gate"):
        source.write_text("\n\n".join(f"{words}, as it did in the year {n}. " * 40 for n in range(8)))
        with monkeypatch.context() as m:
            m.setattr(artifact, "save", lambda *a, **k: kill())
            with pytest.raises(Killed):
                pipeline.run(config(model, str(source), tmp_path / "resumed"))
    resumed = pipeline.run(config(model, str(source), tmp_path / "resumed"))
    assert resumed.digest == pipeline.run(config(model, str(source), tmp_path / "fresh")).digest


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("rank", 0),
        ("seq_len", 0),
        ("max_documents", 0),
        ("max_memory", 0),
        ("max_disk", 0),
        ("max_tokens", 0),
    ],
)
def test_zero_is_not_taken_for_the_default(model, text, tmp_path, flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} 0 is out of range"):
        config(model, text, tmp_path / "x", **{flag: value})


def test_data_errors_leave_no_run_directory(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(data.DataError):
        pipeline.run(config(model, str(tmp_path / "empty.txt"), tmp_path / "x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"]


def test_fingerprint_of_an_fp32_checkpoint_with_a_16_bit_config(tmp_path):
    """transformers would read it in 16 bits; vLLM fingerprints the values as stored."""
    from vllm_dejavu.predictor_training.hf_opt import OptModel

    directory = tiny.make_opt(tmp_path / "m")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": "float16"}))
    assert OptModel(str(directory)).spec.fingerprint == tiny.fingerprint_of(directory)


def lines(run_dir):
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


class TestResume:
    def interrupted(self, model, text, output, monkeypatch, **changes):
        with monkeypatch.context() as m:
            m.setattr(artifact, "save", lambda *a, **k: kill())
            with pytest.raises(Killed):
                pipeline.run(config(model, text, output, **changes))

    def test_nothing_was_interrupted(self, model, text, tmp_path):
        with pytest.raises(
            ValueError, match=r"--resume: .*x.run holds no interrupted run. Leave the flag out"
        ):
            pipeline.run(config(model, text, tmp_path / "x"), resume=True)
        assert list(tmp_path.iterdir()) == []

    def test_a_finished_run_cannot_be_resumed(self, trained, model, text):
        _, output = trained
        with pytest.raises(ValueError, match="holds no interrupted run"):
            pipeline.run(config(model, text, output), overwrite=True, resume=True)
        assert files(output.parent / "artifact.run") == ["metrics.jsonl", *PLOTS]

    def test_other_settings_are_named_and_nothing_is_lost(self, model, text, tmp_path, monkeypatch):
        self.interrupted(model, text, tmp_path / "a", monkeypatch)
        before = files(tmp_path / "a.run")
        with pytest.raises(
            ValueError,
            match=r"has other settings \(max_ppl_increase, rank\). Repeat its command, or pass --restart",
        ):
            pipeline.run(config(model, text, tmp_path / "a", rank=32, max_ppl_increase=0.2), resume=True)
        assert files(tmp_path / "a.run") == before and "fitted-0-3.safetensors" in before

    def test_what_does_not_decide_the_artifact_may_change(self, trained, model, text, tmp_path, monkeypatch):
        self.interrupted(model, text, tmp_path / "a", monkeypatch)
        resumed = pipeline.run(config(model, text, tmp_path / "a", batch=3), resume=True)
        assert all(torch.equal(resumed.tensors[k], v) for k, v in trained[0].tensors.items()), (
            "only what is measured at the end varies, by other draws"
        )

    def test_restart_forgets(self, model, text, tmp_path, monkeypatch):
        self.interrupted(model, text, tmp_path / "a", monkeypatch)
        monkeypatch.setattr(
            pipeline.RunDirectory,
            "load_fitted",
            lambda self, layers, key: (
                pytest.fail("found") if files(self.path) != ["metrics.jsonl", "settings.json"] else None
            ),
        )
        pipeline.run(config(model, text, tmp_path / "a"), restart=True)

    def test_a_run_directory_of_ones_own(self, model, text, tmp_path):
        """Named on the command line; what else lies in it stays."""
        own = tmp_path / "mine"
        (own / "samples").mkdir(parents=True)
        for name in ("notes.txt", "samples/drum.wav"):
            (own / name).write_text("mine")
        pipeline.run(config(model, text, tmp_path / "a"), run_dir=str(own))
        assert (
            files(own) == sorted(["metrics.jsonl", "notes.txt", *PLOTS, "samples/drum.wav"])
            and not (tmp_path / "a.run").exists()
        )

    def test_samples_of_an_interrupted_run_are_not_trained_on(self, model, text, tmp_path, monkeypatch):
        """Bug: shards that an interrupted run wrote behind its checkpoint, in batches of another size or of a
        text that has changed since, stayed among those of the resumed run."""
        gradient = {"form": "finetuned", "rank": 8}
        expected = pipeline.run(config(model, text, tmp_path / "whole", batch=3, **gradient))
        decoder, ran = collect.OptModel.decoder, []
        with monkeypatch.context() as m:
            m.setattr(
                collect.OptModel,
                "decoder",
                lambda self, tokens, last_layer: (
                    kill() if len(ran) >= 5 else ran.append(1) or decoder(self, tokens, last_layer)
                ),
            )
            with pytest.raises(Killed):
                pipeline.run(config(model, text, tmp_path / "a", batch=4, **gradient))
        assert len(list((tmp_path / "a.run" / "samples" / "layer-000").iterdir())) == 5
        assert (
            pipeline.run(config(model, text, tmp_path / "a", batch=3, **gradient), resume=True).digest
            == expected.digest
        )


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


class TestCommandLine:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("500", 500),
            ("1K", 1000),
            ("500M", 5 * 10**8),
            ("64G", 64 * 10**9),
            ("2t", 2 * 10**12),
            ("1.5G", 15 * 10**8),
            ("1e3", 1000),
        ],
    )
    def test_sizes(self, text, size):
        assert cli._size(text) == size

    @pytest.mark.parametrize("text", ["", "G", "64GB", "many", "nan", "inf", "6 4G", "1P"])
    def test_what_is_no_size(self, text):
        """Bug: infinity ended in a traceback."""
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size as 64G"):
            cli._size(text)

    def test_resume(self, trained, model, text, tmp_path, monkeypatch, capsys):
        """Refused in a line, then granted; without --resume the same command would continue as well."""
        command = [
            "train",
            "--model",
            model,
            "--data",
            text,
            "--output",
            str(tmp_path / "a"),
            "--seq-len",
            "64",
            "--max-tokens",
            "2048",
            "--valid-tokens",
            "128",
            "--valid-share",
            "0.25",
            "--rank",
            "16",
            "--max-ppl-increase",
            "0.1",
            "--max-memory",
            "1G",
        ]
        assert cli.main([*command, "--resume"]) == 1
        assert "holds no interrupted run" in capsys.readouterr().err
        with monkeypatch.context() as m:
            m.setattr(artifact, "save", lambda *a, **k: kill())
            with pytest.raises(Killed):
                cli.main(command)
        assert cli.main([*command, "--resume", "--seed", "3"]) == 1
        assert "has other settings (seed)" in capsys.readouterr().err
        assert cli.main([*command, "--resume"]) == 0
        assert artifact.load(tmp_path / "a").digest == trained[0].digest
        assert f"metrics and plots: {tmp_path / 'a'}.run" in capsys.readouterr().out


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
