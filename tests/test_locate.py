"""Where an artifact is looked for: a directory, the hub, beside the model."""

import pytest

from vllm_dejavu import locate
from vllm_dejavu.manifest import (
    ArtifactError,
)


class TestResolve:
    def test_beside_the_model(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"looked for .*dejavu.json.*--output"):
            locate.resolve(None, str(tmp_path))
        (tmp_path / "dejavu").mkdir()
        assert locate.resolve(None, str(tmp_path)) == tmp_path / "dejavu"

    def test_a_directory(self, tmp_path):
        assert locate.resolve(str(tmp_path), "any/model") == tmp_path

    @pytest.mark.parametrize(
        "name",
        ["./missing", "/no/such/dir", "a/b/c", "~/x", "plain", "x" * 5000, "nul\0"],
        ids=lambda n: ascii(n)[1:14],
    )
    def test_no_such_directory_and_no_hub_id(self, name):
        """Bug: a name longer than any file system takes ended in an OSError."""
        with pytest.raises(ArtifactError, match="no such directory, and not a hub id"):
            locate.resolve(name, "model")

    def test_hub(self, tmp_path, monkeypatch):
        import huggingface_hub

        asked = []

        def download(repo, revision, allow_patterns):
            asked.append((repo, revision, sorted(allow_patterns)))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert locate.resolve("org/name", "any/model", "main") == tmp_path
        assert locate.resolve(None, "org/model", "v1") == tmp_path / "dejavu"
        assert asked == [
            ("org/name", None, ["dejavu.json", "predictors.safetensors"]),
            ("org/model", "v1", ["dejavu/dejavu.json", "dejavu/predictors.safetensors"]),
        ]

        def refuse(*args, **kwargs):
            raise ConnectionError("offline")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ArtifactError, match="the hub gave none .*offline"):
            locate.resolve("org/name", "any/model")
