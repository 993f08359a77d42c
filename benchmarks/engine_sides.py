"""What is compared: each side by its name, and how much of a step's weights it reads."""

from __future__ import annotations

from typing import Any, NamedTuple


class Side(NamedTuple):
    """
    Attributes:
        impl: `vllm`, stock; `dejavu`, ours; `hf`, Transformers.
        scheme: of the quantized checkpoint (`quantized`) that is served, or None.
        settings: of ours.
        bits: of the layers' weights. head_bits: of the LM head's. cache: vLLM's `kv_cache_dtype`.
    """

    impl: str
    scheme: str | None = None
    settings: dict[str, Any] = {}
    bits: int = 16
    head_bits: int = 16
    cache: str = "auto"

    @property
    def sparse(self) -> bool:
        return self.settings.get("mode") == "sparse"

    @property
    def counts(self) -> bool:
        """Whether it counts what it reads."""
        return self.settings.get("mode") in ("sparse", "exact")


_SPARSE, _DENSE, _INT8, _INT4 = {"mode": "sparse"}, {"mode": "dense"}, {"weight_bits": 8}, {"weight_bits": 4}
_EXACT = {"mode": "exact"}
SIDES = {
    "dense": Side("vllm"),
    "w8a8": Side("vllm", "w8a8", bits=8),
    "w8a8-fp8": Side("vllm", "w8a8", bits=8, cache="fp8"),
    "w4a16": Side("vllm", "w4a16", bits=4),
    "dejavu": Side("dejavu", settings=_SPARSE),
    "dejavu-dense": Side("dejavu", settings=_DENSE),
    "dejavu-int8": Side("dejavu", settings=_SPARSE | _INT8, bits=8, head_bits=8),
    "dejavu-int8-head16": Side("dejavu", settings=_SPARSE | _INT8 | {"lm_head_bits": 16}, bits=8),
    "dejavu-int8-fp8": Side("dejavu", settings=_SPARSE | _INT8, bits=8, head_bits=8, cache="fp8"),
    "dejavu-int8-dense": Side("dejavu", settings=_DENSE | _INT8, bits=8, head_bits=8),
    "dejavu-int4": Side("dejavu", settings=_SPARSE | _INT4, bits=4, head_bits=8),
    "dejavu-int4-head16": Side("dejavu", settings=_SPARSE | _INT4 | {"lm_head_bits": 16}, bits=4),
    "dejavu-int4-dense": Side("dejavu", settings=_DENSE | _INT4, bits=4, head_bits=8),
    "exact": Side("dejavu", settings=_EXACT),
    "exact-w8a8": Side("dejavu", "w8a8", settings=_EXACT, bits=8),
    "hf": Side("hf"),
}
STOCK = [name for name, side in SIDES.items() if side.impl == "vllm"]
