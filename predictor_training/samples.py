"""Stored activations for forms that train by gradient: bit-packed shards on disk, never more than a limit.

A row of a layer's MLP is its gate input in fp16 (2 * hidden bytes) and its labels, a bit a neuron (ffn / 8
bytes); with energies also one fp16 value for every positive neuron, in order; with heads their gate's input
and norms. OPT-66B: 23 KB a token and layer without either; the paper's layout (activations, not bits) took 92
KB.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """[rows, units] bool -> [rows, ceil(units / 8)] uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def unpack_bits(packed: torch.Tensor, units: int) -> torch.Tensor:
    """Inverse of `pack_bits`."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=units)).bool()


# Of a shard's header, at most. A shard may hold one row only.
HEADER_BYTES = 640


def row_bytes(hidden: int, ffn: int, heads: int, with_energy: bool, with_heads: bool) -> int:
    """Most bytes a token and layer takes: gate inputs, labels, head norms, at worst every energy, and a shard
    of its own.
    """
    energies, head_rows = -(-ffn // 8) + 2 * ffn, 2 * hidden + 2 * heads
    return 2 * hidden + -(-ffn // 8) + with_energy * energies + with_heads * head_rows + HEADER_BYTES


def stride_within(limit: int | None, num_tokens: int, layers: int, bytes_a_row: int) -> int:
    """Keep every so many-th token, so that all layers' shards stay below `limit` bytes.

    Raises:
        ValueError: not even one token fits.
    """
    if limit is None:
        return 1
    rows = limit // (layers * bytes_a_row)
    if rows < 1:
        raise ValueError(
            f"--max-disk {limit} bytes cannot hold the activations of one token ({layers * bytes_a_row} bytes"
            f" for {layers} layers). Allow more, or take the closed form, which stores none."
        )
    return max(1, -(-num_tokens // rows))


@dataclass(frozen=True)
class Rows:
    """Stored tokens of one layer. mlp_x, attn_x: [rows, hidden]; active: [rows, ffn] bool; energy: [rows,
    ffn];
    head_norms: [rows, heads]. What the store does not keep is None."""

    mlp_x: torch.Tensor
    active: torch.Tensor
    energy: torch.Tensor | None
    attn_x: torch.Tensor | None
    head_norms: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.mlp_x)


class SampleStore:
    """Shards `layer-N/part-M.safetensors` below a directory.

    Args:
        ffn: neurons, to unpack labels. with_energy: keep the energies of positive neurons. with_heads: and
            what heads are fitted on.
    """

    def __init__(self, directory: Path, ffn: int, with_energy: bool, with_heads: bool):
        self.directory, self.ffn, self.with_energy, self.with_heads = directory, ffn, with_energy, with_heads

    def write(self, layer: int, part: int, rows: Rows) -> None:
        """One shard; written again under the same name after an interruption. None for no rows."""
        if not len(rows):
            return
        tensors = {"mlp_x": rows.mlp_x.half().contiguous(), "active": pack_bits(rows.active)}
        if self.with_heads:
            tensors |= {
                "attn_x": rows.attn_x.half().contiguous(),
                "head_norms": rows.head_norms.half().contiguous(),
            }
        if self.with_energy:
            positive = rows.energy > 0
            tensors |= {"positive": pack_bits(positive), "energy": rows.energy[positive].bfloat16()}
        path = self.directory / f"layer-{layer:03d}" / f"part-{part:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu() for k, v in tensors.items()}, path)

    def read(self, layer: int) -> Iterator[Rows]:
        """Shards of a layer, in order."""
        for path in sorted((self.directory / f"layer-{layer:03d}").glob("part-*.safetensors")):
            t = load_file(path)
            energy = None
            if self.with_energy:
                positive = unpack_bits(t["positive"], self.ffn)
                energy = torch.zeros(positive.shape, dtype=torch.bfloat16).masked_scatter_(
                    positive, t["energy"]
                )
            yield Rows(
                t["mlp_x"], unpack_bits(t["active"], self.ffn), energy, t.get("attn_x"), t.get("head_norms")
            )

    def discard_from(self, part: int) -> None:
        """Forget shards from a part on: what an interrupted run wrote behind its checkpoint, perhaps in other
        batches.
        """
        for path in self.directory.glob("layer-*/part-*.safetensors"):
            if int(path.stem.removeprefix("part-")) >= part:
                path.unlink()

    def num_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.directory.rglob("*.safetensors"))

    def clear(self) -> None:
        """Remove the shards, and the directory unless it holds other things."""
        for path in self.directory.glob("layer-*"):
            shutil.rmtree(path, ignore_errors=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()
