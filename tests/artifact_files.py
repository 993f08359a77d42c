"""Artifacts that tests of the format start from: whole, to be copied, edited and damaged."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from vllm_dejavu.manifest import (
    MANIFEST_FILE,
)

DOCS = Path(__file__).parent.parent / "docs" / "artifact.md"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.make_opt(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def original(model_dir, tmp_path_factory):
    return tiny.make_artifact(tmp_path_factory.mktemp("original") / "a", model_dir, dense_layers=(1,))


@pytest.fixture
def copy(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_manifest(directory, edit):
    path = directory / MANIFEST_FILE
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
