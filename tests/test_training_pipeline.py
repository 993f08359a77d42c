"""`vllm-dejavu train` as a user runs it, on a small random OPT with a real tokenizer: whole, interrupted, refused."""
import json
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from vllm_dejavu import artifact, cli
from vllm_dejavu.predictor_training import collect, data, pipeline
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
    scenes = ["the old house by the river", "a letter from her brother", "the road to the village", "my father's library"]
    documents = [
        " ".join(f"It was {place} that she remembered in the {n}th year, and nobody spoke of {place} again." for n in range(4, 40))
        for place in scenes * 2
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def config(model, text, output, **changes) -> TrainConfig:
    small = {"seq_len": 64, "max_tokens": 2048, "valid_tokens": 512, "valid_share": 0.25, "rank": 16, "max_ppl_increase": 0.1, "batch": 4}
    return TrainConfig(model=model, data=(text,), output=str(output), **{**small, **changes})


@pytest.fixture(scope="module")
def trained(model, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "artifact"
    return pipeline.run(config(model, text, output)), output


def test_a_run_leaves_a_loadable_artifact_and_nothing_else(trained):
    made, output = trained
    loaded = artifact.load(output)
    assert loaded.digest == made.digest
    assert sorted(p.name for p in output.parent.iterdir()) == ["artifact"]
    assert sorted(p.name for p in output.iterdir()) == ["dejavu.json", "predictors.safetensors"]
    assert any(g.sparse for layer in loaded.manifest.layers for g in layer.values())
    assert loaded.manifest.calibration["ppl_increase"] <= 0.1
    assert loaded.manifest.training["data"] == ["prose.txt"]


def test_same_seed_same_artifact(trained, model, text, tmp_path):
    made, _ = trained
    again = pipeline.run(config(model, text, tmp_path / "again"))
    assert again.digest == made.digest


class Killed(BaseException):
    """Stands for a kill signal: nothing in the pipeline may catch it."""


@pytest.mark.parametrize("stage", ["collect", "calibrate", "save"])
def test_interrupted_run_leaves_no_artifact_and_resumes_to_the_same(trained, model, text, tmp_path, monkeypatch, stage):
    made, _ = trained
    output = tmp_path / "artifact"
    collected = []
    decoder = collect.OptModel.decoder
    monkeypatch.setattr(collect.OptModel, "decoder", lambda self, tokens: collected.append(len(tokens)) or decoder(self, tokens))
    monkeypatch.setattr(collect.Collector.run, "__defaults__", (1,))  # a checkpoint after every batch
    with monkeypatch.context() as m:
        if stage == "collect":
            m.setattr(collect.OptModel, "decoder", lambda self, tokens: kill() if len(collected) >= 3 else collected.append(1) or decoder(self, tokens))
        elif stage == "calibrate":
            from vllm_dejavu.predictor_training import calibrate

            original, calls = calibrate.Masked.nll, []
            m.setattr(calibrate.Masked, "nll", lambda self, *a: kill() if len(calls) >= 5 else calls.append(1) or original(self, *a))
        else:
            m.setattr(artifact.os, "rename", lambda *a: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, output))
    with pytest.raises(artifact.ArtifactError):
        artifact.load(output)
    assert not output.exists() and (tmp_path / "artifact.run").is_dir()

    before = len(collected)
    resumed = pipeline.run(config(model, text, output))
    assert resumed.digest == made.digest
    if stage != "collect":
        # 24 windows of text would need 6 batches; only calibration's own statistics pass runs again.
        assert len(collected) - before <= 2
    assert not (tmp_path / "artifact.run").exists()


def kill():
    raise Killed


def test_changed_settings_do_not_reuse_an_interrupted_run(model, text, tmp_path, monkeypatch):
    """A checkpoint of another seed would silently train on other text."""
    run_dir = tmp_path / "artifact.run"
    with monkeypatch.context() as m:
        m.setattr(artifact, "save", lambda *a, **k: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, tmp_path / "artifact"))
    kept = load_file(run_dir / "moments.safetensors")
    with monkeypatch.context() as m:
        m.setattr(artifact, "save", lambda *a, **k: kill())
        with pytest.raises(Killed):
            pipeline.run(config(model, text, tmp_path / "artifact", seed=1, max_tokens=1024))
    assert not all(bool((kept[k] == v).all()) for k, v in load_file(run_dir / "moments.safetensors").items())


def test_text_sampled_from_the_model_itself(model, tmp_path):
    made = pipeline.run(config(model, "self", tmp_path / "self", max_tokens=2048, valid_tokens=512))
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
        ({"rank": -1}, "--rank -1"), ({"max_ppl_increase": -0.5}, "--max-ppl-increase -0.5"), ({"valid_share": 1.5}, "--valid-share 1.5"),
        ({"mlp_lookahead": "next"}, "--mlp-lookahead 'next'"), ({"dtype": "int3"}, "--dtype 'int3'"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)  # fmt: skip
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
    assert cli.main(["train", "--model", model, "--data", str(empty), "--output", str(tmp_path / "file" / "x")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["train", "--model", "/no/such/model", "--data", "self", "--output", str(tmp_path / "x")]) == 1
    assert "Model /no/such/model: no such directory" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "dejavu.json" in capsys.readouterr().err


def test_an_existing_artifact_is_not_overwritten_unasked(trained, model, text):
    _, output = trained
    before = (output / "dejavu.json").read_bytes()
    with pytest.raises(artifact.ArtifactError, match="--overwrite"):
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


@pytest.mark.parametrize(("flag", "value"), [("rank", 0), ("seq_len", 0), ("max_documents", 0)])
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
