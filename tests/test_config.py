"""Settings: every key, every wrong value, and that nothing but ValueError ever comes out."""

import dataclasses
import re
from pathlib import Path

import pytest
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from vllm_dejavu.config import DIGEST_KEY, DejaVuConfig

FIELDS = [f.name for f in dataclasses.fields(DejaVuConfig)]


def test_defaults():
    assert dataclasses.asdict(DejaVuConfig.from_dict({})) == {
        "predictor": None,
        "mode": "sparse",
        "apply_to": "decode",
        "row_exact": False,
        "blocks": ("mlp", "attention"),
        "crossover": None,
        "cache_crossover": None,
        "sample_recall": 64,
        "measure": False,
        "overlap": False,
        "seed": 0,
        "weight_bits": 16,
        "lm_head_bits": None,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("predictor", "some/dir"),
        ("predictor", None),
        ("mode", "dense"),
        ("mode", "oracle"),
        ("mode", "random"),
        ("mode", "static"),
        ("apply_to", "all"),
        ("row_exact", True),
        ("blocks", ["mlp"]),
        ("blocks", ["attention", "mlp"]),
        ("crossover", 0.3),
        ("crossover", 1),
        ("crossover", None),
        ("cache_crossover", 0),
        ("cache_crossover", None),
        ("measure", True),
        ("overlap", True),
        ("seed", 2**31 - 1),
        ("weight_bits", 16),
        ("weight_bits", 8),
        ("weight_bits", 4),
        ("lm_head_bits", 16),
        ("lm_head_bits", 8),
        ("lm_head_bits", None),
    ],
    ids=str,
)
def test_allowed_values(key, value):
    got = getattr(DejaVuConfig.from_dict({key: value}), key)
    assert got == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("predictor", 3, "a path"),
        ("predictor", " ", "a path"),
        ("mode", "fast", "'oracle'"),
        ("mode", None, "'oracle'"),
        ("apply_to", "prefill", "'decode'"),
        ("row_exact", 1, "true or false"),
        ("row_exact", "yes", "true or false"),
        ("measure", None, "true or false"),
        ("overlap", 1, "true or false"),
        ("blocks", [], "'mlp'"),
        ("blocks", "mlp", "'mlp'"),
        ("blocks", ["mlp", "mlp"], "'mlp'"),
        ("blocks", ["heads"], "'attention'"),
        ("blocks", [["mlp"]], "'mlp'"),
        ("crossover", 0, "(0, 1]"),
        ("crossover", 1.01, "(0, 1]"),
        ("crossover", True, "(0, 1]"),
        ("crossover", float("nan"), "(0, 1]"),
        ("crossover", "1", "(0, 1]"),
        ("cache_crossover", -1, "[0, 2147483648) or null"),
        ("cache_crossover", 0.5, "[0, 2147483648) or null"),
        ("seed", None, "[0, 2147483648)"),
        ("seed", -1, "[0, 2147483648)"),
        ("seed", 2**31, "[0, 2147483648)"),
        ("seed", 0.5, "[0, 2147483648)"),
        ("seed", True, "[0, 2147483648)"),
        ("weight_bits", 3, "[16, 8, 4]"),
        ("weight_bits", 4.0, "[16, 8, 4]"),
        ("weight_bits", "4", "[16, 8, 4]"),
        ("weight_bits", None, "[16, 8, 4]"),
        ("lm_head_bits", 4, "[16, 8]"),
        ("lm_head_bits", "8", "[16, 8]"),
        ("lm_head_bits", True, "[16, 8]"),
    ],
    ids=str,
)
def test_errors_name_key_value_and_allowed_set(key, value, allowed):
    with pytest.raises(ValueError) as e:
        DejaVuConfig.from_dict({key: value})
    for part in (f'["{key}"]', repr(value), allowed):
        assert part in str(e.value)


def test_unknown_key_is_named_with_the_allowed_ones():
    with pytest.raises(ValueError) as e:
        DejaVuConfig.from_dict({"predictors": "x"})
    assert "'predictors'" in str(e.value) and all(f"'{name}'" in str(e.value) for name in FIELDS)


def test_unknown_keys_of_any_type_are_refused():
    """Bug: unknown keys were sorted as they were, and {1: ..., "x": ...}, which only Python callers can pass,
    gave a TypeError.
    """
    with pytest.raises(ValueError, match="Unknown setting"):
        DejaVuConfig.from_dict({1: True, "x": True, None: True})


@pytest.mark.parametrize("value", [None, [], "sparse", 1], ids=str)
def test_not_an_object(value):
    with pytest.raises(ValueError, match="must be an object"):
        DejaVuConfig.from_dict(value)


def test_our_own_digest_key_is_accepted():
    """The front end writes it into additional_config; the workers read the settings again."""
    assert DejaVuConfig.from_dict({DIGEST_KEY: "ab"}) == DejaVuConfig()


def test_settings_cannot_change_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DejaVuConfig().mode = "dense"


@pytest.mark.parametrize(
    ("changes", "masks"), [({}, False), ({"row_exact": True}, True), ({"apply_to": "all"}, True)], ids=str
)
def test_rows_are_masked_by_row_exact_and_when_scoring(changes, masks):
    assert DejaVuConfig.from_dict(changes).masks_rows is masks


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@fuzz(100)
@given(
    st.one_of(
        JSON,
        st.dictionaries(
            st.sampled_from([*FIELDS, "x"]),
            JSON | st.sampled_from(["sparse", "all", "mlp", True, 1]),
            max_size=4,
        ),
    )
)
def test_anything_gives_settings_or_a_value_error(value):
    try:
        assert isinstance(DejaVuConfig.from_dict(value), DejaVuConfig)
    except ValueError as e:
        assert "additional_config" in str(e)


def test_every_setting_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in FIELDS:
        assert re.search(rf"^\| `{name}` +\|", text, re.M), name


@pytest.mark.parametrize(
    ("weights", "head", "of_head"),
    [(16, None, 16), (8, None, 8), (4, None, 8), (8, 16, 16), (16, 8, 8), (4, 16, 16)],
)
def test_bits_of_the_head(weights, head, of_head):
    """It goes along, in 8, unless told otherwise."""
    settings = DejaVuConfig.from_dict({"weight_bits": weights, "lm_head_bits": head})
    assert (settings.weight_bits, settings.head_bits) == (weights, of_head)
