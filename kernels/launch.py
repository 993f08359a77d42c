"""How the Triton kernels are launched: tile tables, scratch memory, checks. No state that changes between
steps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from vllm_dejavu.kernels.reference import COUNTERS


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


# {kernel: {largest number of tokens: Tile}}. Beyond the last bucket the last tile is repeated over the
# tokens.
#
# Chosen on paper, not yet measured on any GPU: about 32 KiB in flight a multiprocessor, no spills (the
# committed record of ahead-of-time compilation), and more programs than multiprocessors.
# `benchmarks/bench_kernels.py` measures. TODO: ends with the first GPU session; then one table a device.
_TILES: dict[str, dict[int, Tile]] = {
    "down": {
        1: Tile(n=2, k=1024, tokens=1, dot=False, warps=4, stages=3),
        16: Tile(n=16, k=128, tokens=16, dot=True, warps=4, stages=4, per_sm=1),
        32: Tile(n=16, k=128, tokens=32, dot=True, warps=4, stages=4, per_sm=1),
        64: Tile(n=16, k=128, tokens=64, dot=True, warps=4, stages=3, per_sm=1),
    },
    "up": {
        1: Tile(n=128, k=32, tokens=1, dot=False, warps=4, stages=3),
        16: Tile(n=128, k=32, tokens=16, dot=True, warps=8, stages=3),
        32: Tile(n=128, k=32, tokens=32, dot=True, warps=8, stages=3),
        64: Tile(n=128, k=16, tokens=64, dot=True, warps=8, stages=2),
    },
    "fc1": {
        1: Tile(n=4, k=1024, tokens=1, dot=False, warps=4, stages=4, per_sm=2),
        16: Tile(n=16, k=256, tokens=16, dot=True, warps=8, stages=4, per_sm=2),
        32: Tile(n=16, k=128, tokens=32, dot=True, warps=4, stages=4, per_sm=2),
        64: Tile(n=32, k=128, tokens=64, dot=True, warps=8, stages=4, per_sm=1),
    },
    "fc2": {
        # the chain list -> activation -> weight takes up stages of its own
        1: Tile(n=8, k=512, tokens=1, dot=False, warps=4, stages=7, per_sm=2),
        16: Tile(n=32, k=256, tokens=16, dot=True, warps=4, stages=7, per_sm=2),
        32: Tile(n=32, k=256, tokens=32, dot=True, warps=8, stages=7, per_sm=2),
        64: Tile(n=32, k=128, tokens=64, dot=True, warps=4, stages=4, per_sm=1),
    },
    "qkv": {
        1: Tile(n=8, k=512, tokens=1, dot=False, warps=4, stages=4),
        16: Tile(n=16, k=256, tokens=16, dot=True, warps=4, stages=4),
        32: Tile(n=32, k=128, tokens=32, dot=True, warps=4, stages=4),
        64: Tile(n=64, k=128, tokens=64, dot=True, warps=4, stages=4),
    },
    "out_proj": {
        1: Tile(n=16, k=0, tokens=1, dot=False, warps=4, stages=4),
        16: Tile(n=16, k=0, tokens=16, dot=True, warps=4, stages=4),
        32: Tile(n=16, k=0, tokens=32, dot=True, warps=4, stages=4),
        64: Tile(n=32, k=0, tokens=64, dot=True, warps=4, stages=3),
    },
    # One row a program whatever the batch; per_sm: programs wanted on the chip, which sets the number of
    # splits.
    "attention": {1: Tile(n=32, k=0, tokens=1, dot=False, warps=4, stages=3, per_sm=4)},
}
# fp32 serves tests and comparisons: half the columns, so that a tile's bytes stay the same.
_FP32_SHRINK = 2
KERNELS = tuple(_TILES)


def tile(kernel: str, num_tokens: int, dtype: torch.dtype = torch.float16) -> Tile:
    """The tile of a kernel for a padded batch; depends on nothing else, so one graph a batch size is
    right.
    """
    buckets = _TILES[kernel]
    chosen = next((t for size, t in buckets.items() if num_tokens <= size), buckets[max(buckets)])
    if dtype == torch.float32 and chosen.k:
        return Tile(**{**chosen.__dict__, "k": max(16, chosen.k // _FP32_SHRINK), "stages": 2})
    return chosen


def buckets(kernel: str) -> tuple[int, ...]:
    """The batch sizes up to which a kernel has a tile of its own."""
    return tuple(_TILES[kernel])


# Multiprocessors assumed where there is none: the interpreter runs programs one after the other.
INTERPRETED_SMS = 3
# Workspace for larger predictors is taken as needed; 3% of OPT-175B's MLP bytes are rank 590.
_MAX_RANK = 1024
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


class Workspace:
    """Scratch memory of one device, shared by all layers: they run one after the other.

    Allocated when the model is built, so that vLLM's memory profile counts it, and never moved: captured
    graphs hold its addresses. A larger request (evaluation on prompts, eager only) gets memory of its own.

    Args:
        sizes: {name: number of elements}; the names are those the kernels ask for.
    """

    SEMAPHORES = 1 << 16

    def __init__(
        self, device: torch.device, sizes: dict[str, int] | None = None, dtype: torch.dtype = torch.float16
    ):
        self.device = device
        self._buffers = {
            name: torch.empty(size, dtype=dtype if name == "activations" else torch.float32, device=device)
            for name, size in (sizes or {}).items()
        }
        # Zero, and zero again after every launch (tiles.arrive); each kernel has its own, in case two streams
        # run. The model registers them as a buffer: vLLM's sleep mode keeps the content of buffers only.
        names = ("down", "heads", "fc2", "attention")
        self.semaphore_memory = torch.zeros(len(names) * self.SEMAPHORES, dtype=torch.int32, device=device)
        self._semaphores = dict(zip(names, self.semaphore_memory.split(self.SEMAPHORES), strict=True))

    @classmethod
    def for_model(
        cls, device: torch.device, dtype: torch.dtype, num_tokens: int, ffn: int, head_size: int
    ) -> Workspace:
        """Room for decode steps of up to `num_tokens` rows.

        Partial sums are bounded by what one wave of programs holds, since grids are cut to fill the chip
        once: a tile (n x tokens, or columns x tokens) each.
        """
        sms = num_sms(device)

        def wave(kernel: str, columns: str) -> int:
            return max(t.per_sm * sms * getattr(t, columns) * t.tokens for t in _TILES[kernel].values())

        attention = tile("attention", 1)
        return cls(
            device,
            {
                "down": num_tokens * _MAX_RANK,
                "down_partials": wave("down", "n"),
                "heads_partials": wave("down", "n"),
                "activations": ffn * padded_tokens(num_tokens),
                "fc2_partials": wave("fc2", "k"),
                # rounding up the number of splits at most doubles a wave
                "attention": 2 * attention.per_sm * sms * (head_size + 2),
            },
            dtype,
        )

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Uninitialised memory, valid until the same name is asked for again."""
        size, buffer = math.prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def semaphores(self, name: str, size: int) -> torch.Tensor:
        """`size` int32 zeros, which the kernel leaves at zero."""
        if size > self.SEMAPHORES:
            return torch.zeros(size, dtype=torch.int32, device=self.device)
        return self._semaphores[name]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._buffers.values(), self.semaphore_memory))


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


def workspace_for(workspace: Workspace | None, device: torch.device) -> Workspace:
    return Workspace(device) if workspace is None else workspace


def precision(*dtypes: torch.dtype) -> str:
    """How fp32 tiles are multiplied: exactly if an operand is fp32; else only fp16 and bf16 values meet in
    fp32, exact in tf32.
    """
    return "ieee" if torch.float32 in dtypes else "tf32"


def precision_of_projected(*dtypes: torch.dtype) -> str:
    """As `precision`, for the predictor's fp32 down-projection: three tf32 products keep what one would
    drop.
    """
    if torch.float32 in dtypes or torch.version.hip:  # AMD has no tf32x3
        return "ieee"
    return "tf32x3"


def check(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {what}, got {got}")


def check_matrix(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Shape (None: any), dtype (None: any) and a contiguous last dimension."""
    good = tensor.dim() == len(shape) and all(
        s is None or s == t for s, t in zip(shape, tensor.shape, strict=True)
    )
    check(good, f"{name} of shape {list(shape)}", list(tensor.shape))
    check(dtype is None or tensor.dtype == dtype, f"{name} of dtype {dtype}", tensor.dtype)
    check(
        tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
        f"{name} contiguous in its last dimension",
        f"strides {tensor.stride()}",
    )


def check_counters(counters: torch.Tensor | None) -> None:
    if counters is not None:
        good = (
            counters.dtype == torch.int64
            and counters.dim() == 1
            and counters.numel() >= len(COUNTERS)
            and counters.is_contiguous()
        )
        check(
            good,
            f"counters int64, contiguous, at least {len(COUNTERS)}",
            (counters.dtype, list(counters.shape), counters.stride()),
        )


def check_bias(name: str, bias: torch.Tensor | None, size: int) -> None:
    if bias is not None:
        check_matrix(name, bias, (size,))
