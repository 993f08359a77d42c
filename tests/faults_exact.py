"""Planted faults of mode exact and of Nemotron (faults.py has the others)."""

from __future__ import annotations

from faults_base import picked

CSRC, WHOLE = "kernels/csrc/transposed.h", "kernels/csrc/exact.h"
EXACT = [
    picked("exact-not-a-number-is-dropped", CSRC, "m += alive[i] != 0;", "m += alive[i] > 0;"),
    picked("exact-union-of-one-tile", CSRC, "sum[i] += h.alive[tile * h.n + i];", "sum[i] += h.alive[i];"),
    picked("exact-blocks-not-added", CSRC, "columns, memory, row > 0);", "columns, memory, false);"),
    picked(
        "exact-block-ends-early",
        CSRC,
        "tile.until(row + BLOCK_ROWS, ffn)",
        "tile.until(row + BLOCK_ROWS - 1, ffn)",
    ),
    picked("exact-tiles-on-the-first", CSRC, "sums + tile.first * columns + column", "sums + column"),
    picked(
        "exact-last-tile-of-a-share",
        CSRC,
        "for (int64_t i = from; i < to; ++i)",
        "for (int64_t i = from; i + 1 < to; ++i)",
    ),
    picked("exact-scale-of-the-first-panel", CSRC, "each ? each + begin : nullptr", "each"),
    picked("exact-values-of-other-neurons", CSRC, "tile.neurons.places[j]];", "tile.neurons.places[0] + j];"),
    picked(
        "exact-always-tiled", CSRC, "if (static_cast<double>(read) <= crossover", "if (read >= 0 * crossover"
    ),
    picked(
        "exact-rows-of-chunks", WHOLE, "count(counters, ROWS, tokens);", "count(counters, ROWS, all_tokens);"
    ),
    picked(
        "square-forgotten",
        "kernels/csrc/tiles.h",
        "square ? Vec::fma(value, value, Vec::zero()) : value",
        "value",
        "test_kernel_exact.py",
    ),
    picked(
        "heads-not-turned",
        "kernels/csrc/model.h",
        "if (block.rotate)",
        "if (false)",
        "test_engine_nemotron.py",
    ),
    picked(
        "triton-square-not-undone",
        "kernels/sparse_mlp.py",
        "result = result / SCALE",
        "result = result",
        "test_kernel_exact.py",
    ),
    picked(
        "triton-padding-is-positive",
        "kernels/sparse_mlp.py",
        "mask=valid[:, None] & neuron_mask[None, :], other=0.0",
        "mask=token_mask[:, None] & neuron_mask[None, :], other=0.0",
        "test_kernel_exact.py",
    ),
    picked(
        "rotary-of-the-other-kind",
        "vllm_dejavu/compat.py",
        "rotary.is_neox_style",
        "not rotary.is_neox_style",
        "test_engine_nemotron.py",
    ),
    picked(
        "int8-scale-of-fc2-lost",
        "vllm_dejavu/formats.py",
        "param.data.copy_(loaded.flatten())",
        "param.data.fill_(1)",
        "test_engine_exact.py",
    ),
    picked(
        "asymmetric-is-taken",
        "vllm_dejavu/quantization.py",
        'if kind == "int" and scheme.symmetric else',
        'if kind == "int" else',
        "test_engine_exact.py",
    ),
    picked(
        "norm-by-w-alone",
        "vllm_dejavu/families.py",
        "norm_offset=1.0",
        "norm_offset=0.0",
        "test_training_families.py",
    ),
]
