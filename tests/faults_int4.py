"""Planted faults of weights in 4 bits (faults.py has the others)."""

from __future__ import annotations

from faults_base import picked

QUADS, QUANTIZATION = "kernels/csrc/nibble_quads.h", "vllm_dejavu/quantization.py"
INT4 = [
    picked("int4-halves-exchanged", "kernels/packing.py", "(first | second << 4)", "(second | first << 4)"),
    picked("int4-offset-too-small", QUADS, "(0u - 8 * ", "(0u - 7 * "),
    picked("int4-dot-without-offsets", QUADS, "sums[i][r] = Vec::fma(both, offset, sums[i][r]);", ""),
    picked(
        "int4-lanes-first-half-twice",
        QUADS,
        "_mm512_loadu_si512(of + (PIECE / 8 * V + v) * 16)",
        "_mm512_loadu_si512(of + v * 16)",
    ),
    picked(
        "int4-scales-of-the-first-columns",
        QUADS,
        "* rows.scales.stride + at + g;",
        "* rows.scales.stride + g;",
    ),
    picked(
        "int4-blocks-of-two-scales",
        QUADS,
        "/ rows.scales.rows != mine) n = i;",
        "/ rows.scales.rows < 0) n = i;",
    ),
    picked(
        "int4-outputs-not-scaled",
        "kernels/csrc/transposed.h",
        "each = output_scale ? output",
        "each = false ? output",
    ),
    picked("int4-scales-of-any-sign", QUANTIZATION, "signed=False), each", "signed=True), each"),
    picked(
        "int4-outputs-as-they-are", QUANTIZATION, "weight / each[:, None]).t()", "weight / each.amax()).t()"
    ),
]
