"""Settings and artifacts that a user may have edited, cut short or mixed up: taken as they say, or refused by
name.

Beyond test_config.py and test_artifact.py, which show that nothing but the right kind of error comes out:
what is refused is named, and what is taken is what was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import os
import resource
import shutil
import struct
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from vllm_dejavu import artifact
from vllm_dejavu.config import DIGEST_KEY, DejaVuConfig
from vllm_dejavu.manifest import MANIFEST_FILE, RECORDS, TENSORS_FILE, ArtifactError, GateSpec, Manifest

FIELDS = sorted(f.name for f in dataclasses.fields(DejaVuConfig))
DEFAULTS = json.loads(json.dumps(dataclasses.asdict(DejaVuConfig())))
VALID = {
    "predictor": ["some/dir", "org/name", "auto", None],
    "mode": ["sparse", "dense", "oracle", "random", "static"],
    "apply_to": ["decode", "all"],
    "row_exact": [True, False],
    "blocks": [["mlp"], ["attention"], ["attention", "mlp"]],
    "crossover": [None, 0.25, 1, 1.0],
    "cache_crossover": [None, 0, 512, 2**31 - 1],
    "sample_recall": [0, 1, 16, 2**31 - 1],
    "measure": [True, False],
    "overlap": [True, False],
    "seed": [0, 7, 2**31 - 1],
    "weight_bits": [16, 8, 4],
    "lm_head_bits": [None, 16, 8],
}
# Said once more, apart from the code: what docs/settings.md allows.
ALLOWED = {
    "predictor": lambda v: v is None or isinstance(v, str) and bool(v.strip()),
    "blocks": lambda v: v in (["mlp"], ["attention"], ["mlp", "attention"], ["attention", "mlp"]),
    "weight_bits": lambda v: type(v) is int and v in (16, 8, 4),
    "lm_head_bits": lambda v: v is None or (type(v) is int and v in (16, 8)),
    "cache_crossover": lambda v: v is None or type(v) is int and 0 <= v < 2**31,
    "crossover": lambda v: v is None or type(v) in (int, float) and 0 < v <= 1,
    **{key: lambda v: type(v) is int and 0 <= v < 2**31 for key in ("seed", "sample_recall")},
    **{key: lambda v: type(v) is bool for key in ("row_exact", "measure", "overlap")},
    **{key: lambda v, key=key: type(v) is str and v in VALID[key] for key in ("mode", "apply_to")},
}
# Whatever a JSON file can hold: json.loads gives integers of up to 4300 digits, NaN and infinities.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            10**400,
            -(10**400),
            2**63,
            1e308,
            5e-324,
            "",
            " ",
            "\0",
            "²",
            "\ud800",
            "nan",
            "true",
            "mlp",
            "sparse",
            "../..",
            "x" * 5000,
        ]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
# What a load may allocate for the artifacts of this file (100 KB), whatever sizes they claim. Generous:
# threads reserve addresses too.
MAX_BYTES = 1 << 30

valid_settings = st.fixed_dictionaries(
    {}, optional={key: st.sampled_from(values) for key, values in VALID.items()}
)


def text(value) -> str:
    """JSON text to compare by: unlike ==, it tells 1 from 1.0 and from true, and finds NaN equal to NaN."""
    return json.dumps(value, sort_keys=True)


def config_of(raw: dict) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(DejaVuConfig.from_dict(raw))))


def test_every_setting_is_fuzzed():
    assert sorted(VALID) == sorted(ALLOWED) == FIELDS, "a new setting needs an entry in both tables"


@fuzz(100)
@given(raw=valid_settings, digest=st.none() | JSON)
def test_valid_settings_are_taken_as_they_are(raw, digest):
    """Every combination, in JSON, as the front end passes it on to the workers: with our digest in it."""
    with_digest = raw if digest is None else {**raw, DIGEST_KEY: digest}
    found = config_of(json.loads(json.dumps(with_digest)))
    assert text(found) == text({**DEFAULTS, **raw})
    assert text(config_of(found)) == text(found), "written out and read again"


@fuzz(300)
@given(
    raw=valid_settings,
    key=st.sampled_from(FIELDS),
    value=JSON | st.sampled_from([v for values in VALID.values() for v in values]),
)
def test_one_fuzzed_value_is_taken_or_named(raw, key, value):
    raw = {**raw, key: value}
    try:
        found = config_of(raw)
    except ValueError as e:
        assert f'additional_config["dejavu"]["{key}"]={value!r} is not allowed. Allowed: ' in str(e)
        assert not ALLOWED[key](value)
        return
    assert ALLOWED[key](value)
    assert text(found[key]) == text(value)
    assert all(text(found[k]) == text(v) for k, v in raw.items())


@fuzz(100)
@given(raw=valid_settings, unknown=st.dictionaries(st.text(max_size=12), JSON, min_size=1, max_size=3))
def test_unknown_keys_are_named(raw, unknown):
    unknown = {k: v for k, v in unknown.items() if k not in FIELDS and k != DIGEST_KEY} or {"x": 1}
    with pytest.raises(ValueError) as e:
        DejaVuConfig.from_dict({**raw, **unknown})
    assert any(
        f'Unknown setting additional_config["dejavu"][{k!r}]={v!r}' in str(e.value)
        for k, v in unknown.items()
    )
    assert all(f"'{name}'" in str(e.value) for name in FIELDS)


@fuzz(100)
@given(raw=JSON.filter(lambda v: not isinstance(v, dict)))
def test_what_is_no_object_is_shown(raw):
    with pytest.raises(ValueError, match="must be an object of settings") as e:
        DejaVuConfig.from_dict(raw)
    assert repr(raw) in str(e.value)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Of two layers, with one dense block, densities of unions and records: something to lose at every
    depth.
    """
    model = tiny.make_opt(tmp_path_factory.mktemp("model"), layers=2)
    unions = {"2": {"mean": 0.6, "upper": 0.7}, "8": {"mean": 0.9, "upper": 0.95}}
    made = artifact.load(
        tiny.make_artifact(tmp_path_factory.mktemp("made") / "a", model, union_density=unions)
    )
    layers = [dict(layer) for layer in made.manifest.layers]
    layers[1]["attention"] = GateSpec(state="dense", oracle_density=0.5)
    manifest = dataclasses.replace(
        made.manifest,
        layers=tuple(layers),
        training={"data": ["a.txt"], "seed": 0, "loss": None},
        calibration={"ppl_increase": 0.01, "layers": [{"recall": 0.9}]},
        versions={"torch": "2"},
    )
    tensors = {k: v for k, v in made.tensors.items() if not k.startswith("layers.1.attention.")}
    directory = tmp_path_factory.mktemp("original") / "a"
    artifact.save(directory, manifest, tensors)
    return directory


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "artifact"


def fresh(original: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(original, target))


def load_or_none(directory: Path, *names: str) -> artifact.Artifact | None:
    """The loaded artifact; None if it was refused by a message that names the place and one of `names`."""
    try:
        with address_space_limit(MAX_BYTES):
            return artifact.load(directory)
    except ArtifactError as e:
        assert str(directory) in str(e)
        assert not names or any(name in str(e) for name in names), str(e)
        return None


@contextlib.contextmanager
def address_space_limit(more_bytes: int):
    """Whoever allocates more than that meanwhile, touched or not, gets an error, which is no
    ArtifactError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def written(manifest: Manifest, raw: dict) -> None:
    """Asserts that a manifest is what its JSON says, nothing lost and nothing made up, and can be computed
    with.

    A dense gate keeps two keys.
    """
    assert all(
        0 <= gate.density_at(batch) <= 1
        for layer in manifest.layers
        for gate in layer.values()
        for batch in (1, 3, 8, 100)
    )
    found = manifest.to_json(raw["tensors"]["sha256"])
    assert text(found["model"]) == text(raw["model"])
    assert [text(found[r]) for r in RECORDS] == [text(raw.get(r, {})) for r in RECORDS]
    assert len(found["layers"]) == len(raw["layers"])
    for layer, raw_layer in zip(found["layers"], raw["layers"], strict=True):
        for block, gate in layer.items():
            said = raw_layer[block]
            if said["state"] == "dense":
                said = {k: said[k] for k in ("state", "oracle_density") if k in said}
            assert text(gate) == text({**dataclasses.asdict(GateSpec(state="sparse")), **said})


def value_at(node, path: tuple):
    return functools.reduce(operator.getitem, path, node)


def paths(node, at=()) -> list[tuple]:
    """Where every value of a JSON document is."""
    inner = list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    )
    return [(*at, key) for key, _ in inner] + [
        path for key, value in inner for path in paths(value, (*at, key))
    ]


SIZES = st.sampled_from([0, 1, 2, 10**6, 10**9, 2**31, 2**63, 2**64, 10**18, 10**400])


@fuzz(350)
@given(data=st.data())
def test_fuzzed_manifests_are_taken_as_they_are_or_refused(original, target, data):
    raw = json.loads((original / MANIFEST_FILE).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        places = paths(raw)
        if not places:
            break
        *parents, key = data.draw(st.sampled_from(places))
        node = value_at(raw, parents)
        action = data.draw(st.sampled_from(["drop", "replace", "size", "copy", "wrap", "add"]))
        if action == "drop":
            del node[key]
        elif action == "replace":
            node[key] = data.draw(JSON)
        elif action == "size":
            node[key] = data.draw(SIZES)
        elif action == "copy":  # a value of the right type in the wrong place
            node[key] = deepcopy(value_at(raw, data.draw(st.sampled_from(places))))
        elif action == "wrap":
            node[key] = [node[key]]
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=6))] = data.draw(JSON)
        else:
            node.append(data.draw(JSON))
    directory = fresh(original, target)
    (directory / MANIFEST_FILE).write_text(json.dumps(raw))
    # A changed shape is seen in the tensors, a changed checksum in their file.
    if (loaded := load_or_none(directory, MANIFEST_FILE, TENSORS_FILE, "tensor")) is not None:
        written(loaded.manifest, raw)


@fuzz(100)
@given(data=st.data())
def test_cut_and_overwritten_manifests(original, target, data):
    """Bytes lost at the end or in the middle, or replaced by others."""
    whole = (original / MANIFEST_FILE).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.sampled_from([start, len(whole)]) | st.integers(start, len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]
    directory = fresh(original, target)
    (directory / MANIFEST_FILE).write_bytes(changed)
    if (loaded := load_or_none(directory, MANIFEST_FILE, TENSORS_FILE, "tensor")) is not None:
        written(loaded.manifest, json.loads(changed))


@fuzz(100)
@given(share=st.floats(0, 1, exclude_max=True), extra=st.binary(max_size=64))
def test_tensors_cut_short_are_refused(original, target, share, extra):
    """As a copy that stopped; with something else behind it, as a download that was resumed wrongly."""
    whole = (original / TENSORS_FILE).read_bytes()
    directory = fresh(original, target)
    (directory / TENSORS_FILE).write_bytes(whole[: int(share * len(whole))] + extra)
    if (directory / TENSORS_FILE).read_bytes() != whole:
        assert load_or_none(directory, TENSORS_FILE, "tensor") is None


DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "x",
    3,
    None,
]


@fuzz(200)
@given(data=st.data())
def test_fuzzed_headers_of_the_tensors_are_refused(original, target, data):
    """A header that claims other types, shapes, places and sizes than the file has; its recorded checksum is
    made to fit.
    """
    whole = (original / TENSORS_FILE).read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    before = text(header)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"}) or [""]))
        action = data.draw(
            st.sampled_from(["dtype", "shape", "offsets", "drop", "rename", "junk", "metadata"])
        )
        if action == "metadata":
            header["__metadata__"] = data.draw(JSON)
        elif action == "junk" or not isinstance(header.get(name), dict):
            header[name] = data.draw(JSON)
        elif action == "drop":
            del header[name]
        elif action == "rename":
            header[data.draw(st.text(max_size=8))] = header.pop(name)
        elif action == "dtype":
            header[name]["dtype"] = data.draw(st.sampled_from(DTYPES))
        elif action == "shape":
            header[name]["shape"] = data.draw(st.lists(SIZES | st.integers(-2, 300), max_size=3) | JSON)
        else:
            header[name]["data_offsets"] = data.draw(
                st.lists(SIZES | st.integers(-2, len(whole)), max_size=3) | JSON
            )
    packed = json.dumps(header).encode()
    claimed = data.draw(st.just(len(packed)) | st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]))
    directory = fresh(original, target)
    (directory / TENSORS_FILE).write_bytes(struct.pack("<Q", claimed) + packed + whole[8 + size :])
    raw = json.loads((directory / MANIFEST_FILE).read_text())
    raw["tensors"]["sha256"] = artifact._sha256(directory / TENSORS_FILE)
    (directory / MANIFEST_FILE).write_text(json.dumps(raw))
    if (loaded := load_or_none(directory, TENSORS_FILE, "tensor", "values of")) is not None:
        good = artifact.load(original)
        assert loaded.manifest == good.manifest and loaded.tensors.keys() == good.tensors.keys()
        described = {k: v for k, v in header.items() if k != "__metadata__"}
        if text(described) == text({k: v for k, v in json.loads(before).items() if k != "__metadata__"}):
            assert all(torch.equal(loaded.tensors[k], v) for k, v in good.tensors.items())
