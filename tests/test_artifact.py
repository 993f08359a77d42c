"""The artifact: written whole or not at all, and refused with a reason when anything about it is wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from artifact_files import DOCS, edit_manifest
from conftest import HANG_S

from vllm_dejavu import artifact
from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    ArtifactError,
    check_fingerprint,
    check_model,
)


def test_round_trip(original, tmp_path):
    loaded = artifact.load(original)
    again = artifact.save(tmp_path / "again", loaded.manifest, loaded.tensors)
    assert again.manifest == loaded.manifest and again.digest == loaded.digest
    assert all(torch.equal(again.tensors[k], v) for k, v in loaded.tensors.items())
    spec, tensors = again.gate(0, "mlp")
    assert spec.sparse and set(tensors) == {"down", "up", "bias", "activation_rate"}
    assert again.gate(1, "attention") == (loaded.manifest.layers[1]["attention"], {})


OLD = Path(__file__).parent / "artifacts"  # by the code that wrote version 2, the first without int8


@pytest.mark.parametrize(("version", "dtype"), [(1, torch.float16), (2, torch.int8)], ids=["1", "2"])
def test_artifacts_of_older_versions_are_read(tmp_path, version, dtype):
    """Files as they were written then; saved again, they are of the version that is written now."""
    place = OLD / f"version-{version}"
    assert json.loads((place / MANIFEST_FILE).read_text())["format_version"] == version
    loaded = artifact.load(place)
    model, (first, second) = loaded.manifest.model, loaded.manifest.layers
    assert (model.num_heads, model.num_kv_heads, model.head_size, model.gated) == (4, 4, 8, False)
    assert first["mlp"].sparse and not first["attention"].sparse and second["attention"].sparse
    assert first["mlp"].density_at(8) == 0.5 and first["mlp"].recall == 0.9
    assert second["mlp"].oracle_density == 0.3 and second["attention"].threshold == 0.25
    assert loaded.gate(0, "mlp")[1]["up"].dtype == loaded.gate(1, "attention")[1]["weight"].dtype == dtype
    again = artifact.save(tmp_path / "again", loaded.manifest, loaded.tensors)
    assert json.loads((tmp_path / "again" / MANIFEST_FILE).read_text())["format_version"] == 3
    assert again.manifest == loaded.manifest
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in loaded.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m["layers"][0].pop("mlp"), r"layers\[0\] should be .* keys", id="no-mlp"),
        pytest.param(lambda m: m["model"].update(num_kv_heads=4), "model.num_kv_heads", id="a-key-of-3"),
        pytest.param(
            lambda m: m["model"].pop("num_heads"), "model.num_heads should be present", id="no-heads"
        ),
    ],
)
def test_older_versions_are_checked_by_their_own_rules(tmp_path, change, message):
    place = tmp_path / "copy"
    shutil.copytree(OLD / "version-2", place)
    edit_manifest(place, change)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(place)


def test_a_layer_may_lack_a_block(copy, tmp_path):
    """As in hybrid models: no gate, sparse or dense, and no tensors."""
    loaded = artifact.load(copy)
    layers = ({"attention": loaded.manifest.layers[0]["attention"]}, *loaded.manifest.layers[1:])
    tensors = {name: t for name, t in loaded.tensors.items() if not name.startswith("layers.0.mlp.")}
    saved = artifact.save(tmp_path / "saved", dataclasses.replace(loaded.manifest, layers=layers), tensors)
    assert list(artifact.load(tmp_path / "saved").manifest.layers[0]) == ["attention"]
    assert saved.manifest.layers == layers


def test_an_int8_artifact_round_trips(model_dir, tmp_path):
    """Integers stay integers, bit by bit; biases and rates are fp32; the weights take half the bytes of
    fp16.
    """
    made = artifact.load(tiny.make_artifact(tmp_path / "int8", model_dir, dtype="int8"))
    again = artifact.load(artifact_of(made, tmp_path / "again"))
    assert all(
        torch.equal(again.tensors[k], v) and again.tensors[k].dtype == v.dtype
        for k, v in made.tensors.items()
    )
    for block, weights in (("mlp", ("down", "up")), ("attention", ("weight",))):
        spec, tensors = again.gate(0, block)
        assert spec.dtype == "int8" and {tensors[n].dtype for n in weights} == {torch.int8}
        assert {tensors[n].dtype for n in ("bias", "activation_rate")} == {torch.float32}
    half = artifact.load(tiny.make_artifact(tmp_path / "half", model_dir))
    weights = [
        sum(t.nbytes for n, t in a.tensors.items() if n.endswith(("down", "up", "weight")))
        for a in (made, half)
    ]
    assert 2 * weights[0] == weights[1]


def artifact_of(loaded, directory):
    artifact.save(directory, loaded.manifest, loaded.tensors)
    return directory


def damage_tensors(edit):
    return lambda directory: tiny.rewrite_tensors(directory, edit)


def truncate(directory):
    path = directory / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def swap_tensors(directory):
    """Another artifact's tensors of the same shapes: only the checksum can tell."""
    tiny.rewrite_tensors(directory, lambda t: t["layers.0.mlp.bias"].add_(0.25))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda d: (d / MANIFEST_FILE).unlink(), "vllm-dejavu train", id="no-manifest"),
        pytest.param(lambda d: (d / TENSORS_FILE).unlink(), "has no predictors.safetensors", id="no-tensors"),
        pytest.param(shutil.rmtree, "vllm-dejavu train", id="no-directory"),
        pytest.param(truncate, "damaged or cut short", id="truncated"),
        pytest.param(
            lambda d: (d / TENSORS_FILE).write_bytes(b""), "damaged or cut short", id="empty-tensors"
        ),
        pytest.param(swap_tensors, "not of the same artifact", id="swapped"),
        pytest.param(
            damage_tensors(lambda t: t.pop("layers.2.mlp.up")),
            "misses 1 tensor.*layers.2.mlp.up",
            id="missing-tensor",
        ),
        pytest.param(
            damage_tensors(lambda t: t.update(extra=torch.ones(1))),
            "unexpected 1 tensor.*extra",
            id="extra-tensor",
        ),
        pytest.param(
            damage_tensors(lambda t: t.update({"layers.0.mlp.down": torch.ones(8, 63).half()})),
            r"should be .*\[8, 64\], found .*\[8, 63\]",
            id="shape",
        ),
        pytest.param(
            damage_tensors(lambda t: t.update({"layers.0.mlp.down": torch.ones(8, 64)})),
            "float16.*float32",
            id="dtype",
        ),
        # A bug would be to take any weights where the manifest says int8: scores would lose their scales.
        pytest.param(
            lambda d: edit_manifest(d, lambda m: m["layers"][0]["mlp"].update(dtype="int8")),
            "should be torch.int8.*float16",
            id="not-the-integers-promised",
        ),
        pytest.param(
            damage_tensors(lambda t: t["layers.0.mlp.up"].view(-1)[3:5].fill_(float("nan"))),
            "2 values of 'layers.0.mlp.up' are not finite",
            id="nan",
        ),
        pytest.param(
            damage_tensors(lambda t: t["layers.0.attention.bias"].fill_(float("inf"))), "not finite", id="inf"
        ),
        pytest.param(
            lambda d: (d / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00"),
            "cannot be read as JSON",
            id="binary-manifest",
        ),
        pytest.param(
            lambda d: (d / MANIFEST_FILE).write_text("[" * 100_000),
            "cannot be read as JSON",
            id="deep-manifest",
        ),
        pytest.param(lambda d: (d / MANIFEST_FILE).write_text("[]"), "an object", id="list-manifest"),
    ],
)
def test_damage_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            lambda m: m.update(format="other"), "format should be 'vllm-dejavu-predictor'", id="format"
        ),
        pytest.param(
            lambda m: m.update(format_version=4), "expected format_version 1, 2 or 3, found 4", id="version"
        ),
        pytest.param(
            lambda m: m.update(format_version=True),
            "expected format_version 1, 2 or 3, found True",
            id="version-bool",
        ),
        pytest.param(
            lambda m: m.update(format_version=2.0),
            "expected format_version 1, 2 or 3, found 2.0",
            id="version-float",
        ),
        pytest.param(lambda m: m.pop("model"), "model should be", id="no-model"),
        pytest.param(lambda m: m["model"].pop("ffn_dim"), "model.ffn_dim should be present", id="no-ffn"),
        pytest.param(lambda m: m["model"].update(ffn_dim=-1), "model.ffn_dim", id="negative-ffn"),
        pytest.param(lambda m: m["model"].update(surprise=1), "model.surprise", id="unknown-key"),
        pytest.param(lambda m: m["layers"].pop(), "a list of 3 layers", id="too-few-layers"),
        pytest.param(lambda m: m["layers"][0].update(moe={}), r"layers\[0\]", id="unknown-block"),
        pytest.param(lambda m: m["model"].update(num_kv_heads=3), "a divisor of", id="kv-heads"),
        pytest.param(lambda m: m["model"].update(gated="no"), "true or false", id="gated"),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(state="maybe"),
            r"layers\[0\].mlp.state.*'maybe'",
            id="state",
        ),
        pytest.param(lambda m: m["layers"][0]["mlp"].update(lookahead="next"), "lookahead", id="lookahead"),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(lookahead="previous"),
            "no layer lies before",
            id="previous-in-layer-0",
        ),
        pytest.param(lambda m: m["layers"][0]["mlp"].update(rank=0), "rank", id="rank"),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(density={"mean": 1.5, "upper": 1}),
            "density.mean",
            id="density",
        ),
        pytest.param(
            lambda m: m["layers"][0]["attention"].update(threshold=None), "threshold", id="no-threshold"
        ),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(union_density={"x": {"mean": 1, "upper": 1}}),
            "batch sizes",
            id="union-key",
        ),
        pytest.param(lambda m: m["tensors"].update(file="../../etc/passwd"), "tensors.file", id="other-file"),
        pytest.param(lambda m: m["tensors"].update(sha256=7), "tensors.sha256", id="sha256-number"),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(surprise=1),
            r"layers\[0\].mlp.surprise",
            id="unknown-gate-key",
        ),
        pytest.param(lambda m: m["layers"][0]["mlp"].update(dtype="int4"), "dtype.*'int4'", id="dtype"),
        pytest.param(
            lambda m: m["layers"][0]["attention"].update(lookahead="attn_input"),
            "lookahead",
            id="heads-behind-themselves",
        ),
        pytest.param(lambda m: m["layers"][0]["mlp"].update(recall=float("nan")), "recall", id="nan"),
        pytest.param(lambda m: m.update(training=[]), "training should be an object", id="record"),
        # Bugs: these were accepted, or ended in an OverflowError or a bare ValueError.
        pytest.param(lambda m: m.update(surprise=1), "manifest.surprise", id="unknown-top-key"),
        pytest.param(lambda m: m["tensors"].update(surprise=1), "tensors.surprise", id="unknown-tensors-key"),
        pytest.param(
            lambda m: m["layers"][1]["mlp"].update(oracle_density="x"),
            "oracle_density",
            id="oracle-density-of-a-dense-gate",
        ),
        pytest.param(lambda m: m["layers"][0]["attention"].update(rank="x"), "rank", id="rank-of-heads"),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(margin=10**400), "margin", id="number-no-float-holds"
        ),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(union_density={"²": {"mean": 1, "upper": 1}}),
            "batch sizes",
            id="superscript-batch",
        ),
        pytest.param(
            lambda m: m["layers"][0]["mlp"].update(union_density={"10000": {"mean": 1, "upper": 1}}),
            "batch sizes",
            id="huge-batch",
        ),
    ],
)
def test_manifest_errors_name_file_key_and_value(copy, edit, message):
    edit_manifest(copy, edit)
    with pytest.raises(ArtifactError, match=message) as e:
        artifact.load(copy)
    assert MANIFEST_FILE in str(e.value)


@pytest.mark.parametrize(
    "key", ["num_layers", "hidden_size", "ffn_dim", "num_heads", "layer_norm", "architecture", "activation"]
)
def test_another_geometry_is_refused(original, key):
    manifest = artifact.load(original).manifest
    value = getattr(manifest.model, key)
    other = dataclasses.replace(manifest.model, name="other", **{key: value * 2})
    with pytest.raises(ArtifactError, match=f"{key}=.*other has {key}=.*Retrain"):
        check_model(manifest, other)
    check_model(manifest, manifest.model)


def test_other_weights_are_refused(original):
    manifest = artifact.load(original).manifest
    with pytest.raises(ArtifactError, match="sha256:00.*retrain"):
        check_fingerprint(manifest, "sha256:00", "other")
    check_fingerprint(manifest, manifest.model.fingerprint, "same")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["save_file", "os.rename"])
def test_an_interrupted_save_leaves_nothing(original, tmp_path, monkeypatch, where):
    loaded = artifact.load(original)

    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(f"vllm_dejavu.artifact.{where}", kill)
        with pytest.raises(Killed):
            artifact.save(tmp_path / "out", loaded.manifest, loaded.tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replaced", [0, 1], ids=["before-the-first-file", "between-the-two"])
def test_an_interrupted_overwrite_is_never_a_mixture(original, model_dir, tmp_path, monkeypatch, replaced):
    target = tiny.make_artifact(tmp_path / "a", model_dir, seed=9, dense_layers=(1,))
    old, new = artifact.load(target), artifact.load(original)
    calls, replace = [], artifact.os.replace

    def kill_after(*args):
        if len(calls) == replaced:
            raise Killed
        calls.append(args)
        replace(*args)

    with monkeypatch.context() as m:
        m.setattr(artifact.os, "replace", kill_after)
        with pytest.raises(Killed):
            artifact.save(target, new.manifest, new.tensors, overwrite=True)
    if replaced:
        with pytest.raises(ArtifactError, match="not of the same artifact"):
            artifact.load(target)
    else:
        assert artifact.load(target).digest == old.digest


def test_a_save_killed_outright_is_not_mistaken_for_an_artifact(original, tmp_path):
    """The process dies before the rename, without a chance to clean up: the place is free, and the next save
    succeeds.
    """
    code = (
        "import os, sys; from vllm_dejavu import artifact; os.rename = lambda *a: os._exit(9); "
        "a = artifact.load(sys.argv[1]); artifact.save(sys.argv[2], a.manifest, a.tensors)"
    )
    env = os.environ | {"PYTHONPATH": str(DOCS.parent.parent)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code, original, tmp_path / "out"], env=env, timeout=HANG_S
        ).returncode
        == 9
    )
    with pytest.raises(ArtifactError, match="No predictor artifact"):
        artifact.load(tmp_path / "out")
    loaded = artifact.load(original)
    assert artifact.save(tmp_path / "out", loaded.manifest, loaded.tensors).digest == loaded.digest


def test_a_full_disk_leaves_nothing(original, tmp_path, monkeypatch):
    loaded = artifact.load(original)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            artifact.save(tmp_path / "out", loaded.manifest, loaded.tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_written_from_inside(original, tmp_path, monkeypatch):
    """Bug: the files were staged beside the directory, where a mount point cannot be renamed into (EXDEV), or
    nothing written.

    What else lies in the directory stays.
    """
    loaded, out, renamed = artifact.load(original), tmp_path / "out", []
    out.mkdir()
    (out / "README.md").write_text("a model card")
    replace = os.replace
    monkeypatch.setattr(
        artifact.os, "replace", lambda source, target: (renamed.append(Path(source)), replace(source, target))
    )
    artifact.save(out, loaded.manifest, loaded.tensors)
    assert renamed and all(out in source.parents for source in renamed)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", MANIFEST_FILE, TENSORS_FILE]


def test_others_may_read_what_one_user_trained(original, tmp_path):
    """Bug: safetensors makes its files readable by their owner only, and a server often runs as another
    user.
    """
    loaded, before = artifact.load(original), os.umask(0o022)
    try:
        artifact.save(tmp_path / "out", loaded.manifest, loaded.tensors)
    finally:
        os.umask(before)
    assert {(tmp_path / "out" / name).stat().st_mode & 0o444 for name in (MANIFEST_FILE, TENSORS_FILE)} == {
        0o444
    }


def test_overwriting_needs_a_word(original, copy):
    loaded = artifact.load(original)
    with pytest.raises(ArtifactError, match="--overwrite"):
        artifact.save(copy, loaded.manifest, loaded.tensors)
    assert artifact.save(copy, loaded.manifest, loaded.tensors, overwrite=True).digest == loaded.digest


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.check_output(tmp_path / "file")
    with pytest.raises(PermissionError, match="cannot be written"):
        artifact.check_output(tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="cannot be written"):
        artifact.check_output(tmp_path / "out")


def test_tensors_that_do_not_fit_the_manifest_are_not_saved(original, tmp_path):
    loaded = artifact.load(original)
    bad = {**loaded.tensors, "layers.0.mlp.bias": torch.full((256,), float("nan"))}
    with pytest.raises(ArtifactError, match="not finite"):
        artifact.save(tmp_path / "out", loaded.manifest, bad)
    assert list(tmp_path.iterdir()) == []
