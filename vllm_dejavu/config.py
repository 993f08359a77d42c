"""Settings: `additional_config={"dejavu": {...}}` as one validated, immutable dataclass.

Imports neither torch nor vLLM, so that the command line and vLLM's front end can check settings at no cost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MODES = ("sparse", "exact", "dense", "oracle", "random", "static")
EVALUATED_MODES = tuple(mode for mode in MODES if mode != "exact")  # which has nothing to lose but rounding
APPLY_TO = ("decode", "all")
BLOCKS = ("mlp", "attention")
WEIGHT_BITS = (16, 8, 4)
LM_HEAD_BITS = (16, 8)
# Which hidden state feeds a gate; `predictor.gate_input` maps the name to the tensor.
LOOKAHEADS = {"mlp": ("self", "attn_input", "previous"), "attention": ("self", "previous")}

SETTINGS_KEY = "dejavu"
# Written by us into additional_config (never by the user): it puts the artifact's content into vLLM's
# compile-cache key, so that a changed artifact is never served with a graph compiled for the old one.
DIGEST_KEY = "artifact_digest"


@dataclass(frozen=True)
class DejaVuConfig:
    """Settings of one engine.

    Attributes:
        predictor: directory or hub id of the predictor artifact; None looks in `MODEL/dejavu/`; `auto` makes
            one (`auto`).
        mode: `sparse` (predictors decide), `exact` (no predictors: only fc2 skips, what came out 0), `dense`
            (everything is read), or the controls `oracle` (the truly
            active neurons and heads), `random` and `static` (at the artifact's calibrated densities).
        apply_to: `decode` (steps in which every request adds one token) or `all` (evaluation: prompt tokens
            too, each row reading exactly its own selection).
        row_exact: mask each row to its own neurons inside the batch's union, so that neighbours in a batch
            cannot change a request's result.
        blocks: which blocks are gated: `mlp`, `attention` or both.
        crossover: a layer's block runs dense at batch sizes whose calibrated union density is above this; in
            (0, 1]. None: above what was measured for the device's kernels, by batch size; 1.0: never. In mode
            `exact`, on a CPU: prompts go through fc2 by a few tokens at a time, where these need no more
            than this share of what all of them need together.
        cache_crossover: on a CPU attention reads the cache of only the selected heads in decode steps in
            which that is expected to spare at least so many keys (a head's of a token), whatever the
            projections do. None: as measured for the device; 0: always.
        sample_recall: in one of how many long dense passes (prompts) a gate compares its prediction with the
            truth on a few rows, so that recall can be watched while serving; 0: never.
        measure: in sparse steps also compute every true activation, to count recall. Costs a dense fc1 per
            layer.
        overlap: predict neurons on a side stream, beside the attention (GPU; gates whose lookahead is not
            `self`). Saves latency, not bytes; off until measured.
        seed: of the control mode `random`.
        weight_bits: of the layers' linear weights. 8 or 4 (CPU): rounded while a 16-bit checkpoint loads, to
            int8 with one scale for each output, or to 4 bits with one for each 128 of them that are read
            together (`formats`). 16: they stay as they are.
        lm_head_bits: 8 or 16, of the LM head, and of the embedding where that is tied to it; None: 8 where
            weight_bits is not 16.
    """

    predictor: str | None = None
    mode: str = "sparse"
    apply_to: str = "decode"
    row_exact: bool = False
    blocks: tuple[str, ...] = BLOCKS
    crossover: float | None = None
    cache_crossover: int | None = None
    sample_recall: int = 64
    measure: bool = False
    overlap: bool = False
    seed: int = 0
    weight_bits: int = 16
    lm_head_bits: int | None = None

    def __post_init__(self) -> None:
        _check_type("predictor", self.predictor, (str, type(None)), "a path, a hub id or null")
        if self.predictor is not None and not self.predictor.strip():
            raise _error("predictor", self.predictor, "a path, a hub id or null")
        _check_choice("mode", self.mode, MODES)
        _check_choice("apply_to", self.apply_to, APPLY_TO)
        _check_type("row_exact", self.row_exact, (bool,), "true or false")
        _check_type("measure", self.measure, (bool,), "true or false")
        _check_type("overlap", self.overlap, (bool,), "true or false")
        if isinstance(self.blocks, str) or not isinstance(self.blocks, (list, tuple)):
            raise _error("blocks", self.blocks, f"a non-empty list out of {list(BLOCKS)}")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if (
            not self.blocks
            or any(b not in BLOCKS for b in self.blocks)
            or len(set(self.blocks)) != len(self.blocks)
        ):
            raise _error("blocks", list(self.blocks), f"a non-empty list out of {list(BLOCKS)}")
        number = isinstance(self.crossover, (int, float)) and not isinstance(self.crossover, bool)
        if self.crossover is not None and not (number and 0 < self.crossover <= 1):
            raise _error("crossover", self.crossover, "a number in (0, 1] or null")
        for key, absent in (("seed", ""), ("sample_recall", ""), ("cache_crossover", " or null")):
            value = getattr(self, key)
            if value is None and absent:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise _error(key, value, f"an integer in [0, 2147483648){absent}")
        if type(self.weight_bits) is not int or self.weight_bits not in WEIGHT_BITS:
            raise _error("weight_bits", self.weight_bits, f"one of {list(WEIGHT_BITS)}")
        bits = self.lm_head_bits
        if bits is not None and (type(bits) is not int or bits not in LM_HEAD_BITS):
            raise _error("lm_head_bits", self.lm_head_bits, f"one of {list(LM_HEAD_BITS)} or null")

    @property
    def head_bits(self) -> int:
        """Of the LM head's weights in memory."""
        return max(8, self.weight_bits) if self.lm_head_bits is None else self.lm_head_bits

    @property
    def masks_rows(self) -> bool:
        """Whether every row is restricted to its own selection."""
        return self.row_exact or self.apply_to == "all"

    @classmethod
    def from_dict(cls, settings: Any) -> DejaVuConfig:
        """Validate `additional_config["dejavu"]`.

        Raises:
            ValueError: naming key, value and what is allowed.
        """
        if not isinstance(settings, dict):
            raise ValueError(
                f'additional_config["dejavu"] must be an object of settings, got {settings!r}. '
                f"Allowed keys: {sorted(_FIELDS)}."
            )
        unknown = sorted(set(settings) - _FIELDS - {DIGEST_KEY}, key=repr)
        if unknown:
            raise ValueError(
                f'Unknown setting additional_config["dejavu"][{unknown[0]!r}]={settings[unknown[0]]!r}. '
                f"Allowed keys: {sorted(_FIELDS)}."
            )
        return cls(**{k: v for k, v in settings.items() if k in _FIELDS})

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> DejaVuConfig:
        """Settings of an engine; shapes as in `from_dict`."""
        return cls.from_dict((vllm_config.additional_config or {}).get(SETTINGS_KEY, {}))


_FIELDS = {f.name for f in dataclasses.fields(DejaVuConfig)}


def _error(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f'additional_config["dejavu"]["{key}"]={value!r} is not allowed. Allowed: {allowed}.')


def _check_type(key: str, value: Any, types: tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, types):
        raise _error(key, value, allowed)


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _error(key, value, f"one of {list(choices)}")
