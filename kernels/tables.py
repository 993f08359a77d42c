"""What was measured for a device, as data (tables/*.json), and how the Triton kernels divide their work by
it.

No state that changes between steps: a captured graph keeps what it was launched with.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).with_name("tables")


@functools.cache
def read(name: str) -> dict[str, Any]:
    """A table; `measured` in it says on what."""
    return json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))


def crossovers(name: str) -> dict[str, dict[int, dict[int, float]]]:
    """{block: {hidden size: {tokens: union density}}} at which sparse and dense take equally long."""
    return {
        block: {int(hidden): {int(t): d for t, d in by_tokens.items()} for hidden, by_tokens in sizes.items()}
        for block, sizes in read(name)["crossovers"].items()
    }


@dataclass(frozen=True)
class Tile:
    """Shape of one program.

    Attributes:
        n: weight rows (attention: tokens; fc2: neurons) taken at a time. k: columns at a time (0: the
            kernel's own size).
        tokens: rows of the batch at a time. dot: tensor cores; else products are summed in registers.
        per_sm: programs a multiprocessor, for kernels that divide their work over a fixed grid.
    """

    n: int
    k: int
    tokens: int
    dot: bool
    warps: int
    stages: int
    per_sm: int = 1


# One row a program of attention whatever the batch; its per_sm: programs wanted on the chip, which sets the
# number of splits. fc2 has stages of its own: the chain list -> activation -> weight takes up some.


@functools.cache
def tiles() -> dict[str, dict[int, Tile]]:
    """{kernel: {largest number of tokens: Tile}}: those of this process's device, else those of any.

    Beyond the last bucket the last tile is repeated over the tokens.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    own = "triton-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    table = read(own if (DIRECTORY / f"{own}.json").exists() else "triton")["tiles"]
    return {
        kernel: {int(tokens): Tile(**tile) for tokens, tile in buckets.items()}
        for kernel, buckets in table.items()
    }


# fp32 serves tests and comparisons: half the columns, so that a tile's bytes stay the same.
_FP32_SHRINK = 2


def tile(kernel: str, num_tokens: int, dtype: torch.dtype = torch.float16) -> Tile:
    """The tile of a kernel for a padded batch; depends on nothing else, so one graph a batch size is
    right.
    """
    buckets = tiles()[kernel]
    chosen = next((t for size, t in buckets.items() if num_tokens <= size), buckets[max(buckets)])
    if dtype == torch.float32 and chosen.k:
        return Tile(**{**chosen.__dict__, "k": max(16, chosen.k // _FP32_SHRINK), "stages": 2})
    return chosen


def buckets(kernel: str) -> tuple[int, ...]:
    """The batch sizes up to which a kernel has a tile of its own."""
    return tuple(tiles()[kernel])


# Multiprocessors assumed where there is none: the interpreter runs programs one after the other.
INTERPRETED_SMS = 3
MAX_SPLITS = 32


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded_tokens(num_tokens: int) -> int:
    """Columns of a neuron's activations: whole 32-byte pieces, so that they are read in wide loads."""
    return num_tokens if num_tokens == 1 else -(-num_tokens // 16) * 16


def attention_splits(num_tokens: int, heads: int, max_len: int, device: torch.device) -> int:
    """Pieces a sequence is cut in: enough programs for the chip, none shorter than two steps at full length.

    From the padded batch and the longest possible sequence, never from live lengths: a graph is captured
    once.
    """
    t = tile("attention", num_tokens)
    wanted = math.ceil(t.per_sm * num_sms(device) / max(1, num_tokens * heads))
    return max(1, min(wanted, max_len // (2 * t.n), MAX_SPLITS))


def down_grid(num_tokens: int, rank: int, heads: int, hidden: int, device: torch.device) -> int:
    """Pieces the predictor's inner products are cut in, so that few rows still fill the chip; 1 for one
    token.
    """
    t = tile("down", num_tokens)
    if not t.dot:
        return 1
    programs = (-(-rank // t.n) + -(-heads // t.n)) * -(-num_tokens // t.tokens)
    return max(1, min(t.per_sm * num_sms(device) // max(1, programs), hidden // (2 * t.k), 16))


def fc2_grid(num_tokens: int, hidden: int, device: torch.device) -> int:
    """Pieces the neurons of fc2 are cut in: the whole chip, divided by the tiles of the hidden size."""
    t = tile("fc2", num_tokens)
    tiles = -(-hidden // t.k) * -(-num_tokens // t.tokens)
    return max(1, t.per_sm * num_sms(device) // tiles)


def wave(kernel: str, columns: str, device: torch.device) -> int:
    """Most elements that the programs of one wave of a kernel hold: tiles of `columns` ("n" or "k") x
    tokens.
    """
    largest = (t.per_sm * getattr(t, columns) * t.tokens for t in tiles()[kernel].values())
    return num_sms(device) * max(largest)
