"""Manifests and tensors with anything in them load, or are refused with an ArtifactError."""

import json
import shutil
from copy import deepcopy

from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from vllm_dejavu import artifact
from vllm_dejavu.inspection import artifact_table
from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    TENSORS_FILE,
    ArtifactError,
)

JUNK = st.sampled_from(
    [
        None,
        True,
        False,
        -1,
        0,
        3,
        10**400,
        1.5,
        float("nan"),
        1e308,
        "",
        "x",
        "sparse",
        "²",
        [],
        [1],
        {},
        {"a": 1},
        {"²": {"mean": 1, "upper": 1}},
    ]
)


@fuzz(300)
@given(data=st.data())
def test_fuzzed_manifests_load_or_are_refused(original, tmp_path, data):
    """Values replaced, removed or added anywhere in a good manifest: never another kind of error."""
    raw = json.loads((original / MANIFEST_FILE).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        node = raw
        for _ in range(data.draw(st.integers(0, 5))):
            inner = [
                v
                for v in (node.values() if isinstance(node, dict) else node)
                if isinstance(v, (dict, list)) and v
            ]
            if not inner:
                break
            node = inner[data.draw(st.integers(0, len(inner) - 1))]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            node[key] = deepcopy(data.draw(JUNK))
        elif action == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=4))] = deepcopy(data.draw(JUNK))
        if not raw:
            break
    target = tmp_path / "fuzz"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    (target / MANIFEST_FILE).write_text(json.dumps(raw))
    try:
        loaded = artifact.load(target)
    except ArtifactError:
        return
    artifact_table(loaded)  # what loads can be shown


@fuzz(200)
@given(
    name=st.sampled_from([MANIFEST_FILE, TENSORS_FILE]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_flipped_bytes_are_refused_or_change_nothing_that_is_checked(original, tmp_path, name, flips):
    """In the tensors every flipped byte is noticed; in the manifest a changed digit may pass, but nothing
    else than ArtifactError comes out.
    """
    target = tmp_path / "fuzz"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    data = bytearray((original / name).read_bytes())
    for place, value in flips:
        # half of the places lie in the first kilobyte, where safetensors has its header
        index = (
            int(2 * place * min(1023, len(data) - 1))
            if place < 0.5
            else int((2 * place - 1) * (len(data) - 1))
        )
        data[index] ^= value
    (target / name).write_bytes(data)
    if bytes(data) == (original / name).read_bytes():
        return
    try:
        artifact.load(target)
    except ArtifactError:
        return
    assert name == MANIFEST_FILE
