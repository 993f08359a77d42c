"""`vllm-dejavu train`, interrupted: what it keeps, what it takes up again, and what it must not."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import PLOTS, Killed, config, files, interrupted, kill

from vllm_dejavu import artifact, cli
from vllm_dejavu.manifest import ArtifactError
from vllm_dejavu.predictor_training import calibrate, collect, pipeline

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("stage", ["collect", "calibrate", "save"])
def test_interrupted_run_leaves_no_artifact_and_resumes_to_the_same(
    trained, model, text, tmp_path, monkeypatch, stage
):
    made, _ = trained
    output = tmp_path / "artifact"
    collected, measured = [], []
    decoder, measure = collect.HfModel.decoder, calibrate.Masked.nll_from
    monkeypatch.setattr(
        collect.HfModel,
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
                collect.HfModel,
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


def test_changed_settings_do_not_reuse_an_interrupted_run(model, text, tmp_path, monkeypatch):
    """A checkpoint of another seed would silently train on other text."""
    run_dir = tmp_path / "artifact.run"
    interrupted(config(model, text, tmp_path / "artifact"), monkeypatch)
    kept = load_file(run_dir / "fitted-0-3.safetensors")
    interrupted(config(model, text, tmp_path / "artifact", seed=1, max_tokens=1024), monkeypatch)
    assert not any(
        bool((kept[k] == v).all())
        for k, v in load_file(run_dir / "fitted-0-3.safetensors").items()
        if k.endswith("up")
    )


def test_changed_text_does_not_reuse_an_interrupted_run(model, tmp_path, monkeypatch):
    """The file kept its name: moments of the old text would be continued with windows of the new one."""
    source = tmp_path / "prose.txt"
    for words in ("the river rose in the night", "a carriage stood before the gate"):
        source.write_text("\n\n".join(f"{words}, as it did in the year {n}. " * 40 for n in range(8)))
        interrupted(config(model, str(source), tmp_path / "resumed"), monkeypatch)
    resumed = pipeline.run(config(model, str(source), tmp_path / "resumed"))
    assert resumed.digest == pipeline.run(config(model, str(source), tmp_path / "fresh")).digest


class TestResume:
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
        interrupted(config(model, text, tmp_path / "a"), monkeypatch)
        before = files(tmp_path / "a.run")
        with pytest.raises(
            ValueError,
            match=r"has other settings \(max_ppl_increase, rank\). Repeat its command, or pass --restart",
        ):
            pipeline.run(config(model, text, tmp_path / "a", rank=32, max_ppl_increase=0.2), resume=True)
        assert files(tmp_path / "a.run") == before and "fitted-0-3.safetensors" in before

    def test_what_does_not_decide_the_artifact_may_change(self, trained, model, text, tmp_path, monkeypatch):
        interrupted(config(model, text, tmp_path / "a"), monkeypatch)
        resumed = pipeline.run(config(model, text, tmp_path / "a", batch=3), resume=True)
        assert all(torch.equal(resumed.tensors[k], v) for k, v in trained[0].tensors.items()), (
            "only what is measured at the end varies, by other draws"
        )

    def test_restart_forgets(self, model, text, tmp_path, monkeypatch):
        interrupted(config(model, text, tmp_path / "a"), monkeypatch)
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
        decoder, ran = collect.HfModel.decoder, []
        with monkeypatch.context() as m:
            m.setattr(
                collect.HfModel,
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


def test_resume_on_the_command_line(trained, model, text, tmp_path, monkeypatch, capsys):
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
