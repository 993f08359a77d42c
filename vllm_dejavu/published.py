"""What is known beforehand, for `roofline` and whatever measures beside it: sizes of OPT, datasheets of GPUs,
densities of papers.

Needs the standard library only.
"""

from __future__ import annotations

import math

from vllm_dejavu.families import Geometry
from vllm_dejavu.roofline import Device


def opt_geometry(
    hidden_size: int,
    num_heads: int,
    num_layers: int,
    *,
    ffn_dim: int | None = None,
    vocab_size: int = 50272,
    max_positions: int = 2048,
) -> Geometry:
    """An OPT by its sizes, as published ones have them: ffn_dim, where it is not given, is 4 * hidden_size.

    Raises:
        ValueError: heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}.")
    return Geometry(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size if ffn_dim is None else ffn_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        activation="relu",
        gated=False,
        norm="pre",
        max_positions=max_positions,
        vocab_size=vocab_size,
    )


GEOMETRIES = {
    "125m": opt_geometry(768, 12, 12),
    "1.3b": opt_geometry(2048, 32, 24),
    "2.7b": opt_geometry(2560, 32, 32),
    "6.7b": opt_geometry(4096, 32, 32),
    "13b": opt_geometry(5120, 40, 40),
    "30b": opt_geometry(7168, 56, 48),
    "66b": opt_geometry(9216, 72, 64),
    "175b": opt_geometry(12288, 96, 96),
}


def full_name(size: str) -> str:
    """Of one of GEOMETRIES: "6.7b" is OPT-6.7B."""
    return f"OPT-{size.upper()}"


# Bandwidth and capacity: vendors' datasheets of the modules named, SXM and OAM, not PCIe. Links: half of the
# figure the datasheet gives for both directions together. launch_us: assumed 3 everywhere (2-4 is usual for a
# dependent kernel of a CUDA graph; for MI300X, HIP graphs, not even that much is known here). all_reduce_us:
# assumed 8 everywhere. Reported for H100, small messages, 2-8 GPUs, no graph: 8.5-12 for vLLM's kernel, 4-8
# for a faster one (sglang pull request 2904). The same table has 13-24 us at 256 KiB, where latency + bytes /
# link gives under 10: large batches under tensor parallelism come out too fast on both sides, and so too high
# in speed-up.
DEVICES = {
    # 2039 GB/s HBM2e; NVLink 3, 600 GB/s both directions.
    "a100": Device("A100-80GB SXM", 2039, 80, 300),
    # 3.35 TB/s HBM3; NVLink 4, 900 GB/s both directions.
    "h100": Device("H100 SXM", 3350, 80, 450),
    # 4.8 TB/s HBM3e, 141 GB; NVLink 4 as H100.
    "h200": Device("H200", 4800, 141, 450),
    # DGX B200: 64 TB/s and 1440 GB for 8 GPUs (other datasheets: 7.7 TB/s, 192 GB); NVLink 5, 1.8 TB/s both
    # directions.
    "b200": Device("B200", 8000, 180, 900),
    # 5.3 TB/s HBM3, 192 GB; xGMI mesh of 8: 7 links, each 128 GB/s both directions, so a pair of GPUs has one
    # link only.
    "mi300x": Device("MI300X", 5300, 192, 448, peer_gbs=64),
}

# Neurons that any row of a batch selects, mean over layers: the tables of Polar Sparsity (NeurIPS 2025), made
# for 99% recall. Single layers lie far off (6.7B at batch 64: up to 0.97). Time is linear in this density, so
# its mean gives the step's time; that layers above their crossover run dense is not modelled. Heads per
# sequence: 0.3 for 66B is theirs too; 0.5 and 0.4 are what this project sets itself for 6.7B and 30B. None of
# it was measured here.
_UNION_DENSITIES = {
    "6.7b": {1: 0.10, 8: 0.29, 16: 0.40, 32: 0.52, 64: 0.62, 256: 0.77},
    "30b": {1: 0.08, 8: 0.21, 16: 0.30, 32: 0.42, 64: 0.53, 256: 0.68},
    "66b": {1: 0.08, 8: 0.18, 16: 0.26, 32: 0.37, 64: 0.49, 256: 0.64},
}
_HEAD_DENSITIES = {"6.7b": 0.5, "30b": 0.4, "66b": 0.3}
# No table for these sizes: the nearest by hidden size stands in.
_STANDS_IN = {"125m": "6.7b", "1.3b": "6.7b", "2.7b": "6.7b", "13b": "6.7b", "175b": "66b"}


def preset_densities(name: str, batch: int) -> tuple[float, float, str]:
    """Assumed MLP union density, heads per sequence, and in words where they come from.

    Between two batch sizes of the table: linear in log2(batch). Above the last: the last.
    """
    known = _STANDS_IN.get(name, name)
    table = _UNION_DENSITIES[known]
    if known != name:
        source = f"assumed: {known} stands in"
    else:
        source = "Polar's tables" if name == "66b" else "MLP Polar's table, heads assumed"
    if batch in table:
        return table[batch], _HEAD_DENSITIES[known], source
    above = [size for size in table if size > batch]
    below = max(size for size in table if size < batch)
    if not above:
        return table[below], _HEAD_DENSITIES[known], f"{source}, batch {below}"
    share = math.log2(batch / below) / math.log2(min(above) / below)
    density = table[below] + share * (table[min(above)] - table[below])
    return density, _HEAD_DENSITIES[known], f"{source}, interpolated"
