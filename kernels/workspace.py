"""Scratch memory of the Triton kernels, at addresses that captured graphs may keep."""

from __future__ import annotations

import math

import torch

from vllm_dejavu.kernels import tables

# Scratch memory for larger predictors is taken as needed; 3% of OPT-175B's MLP bytes are rank 590.
_MAX_RANK = 1024


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
        # Zero, and zero again after every launch (primitives.arrive); each kernel has its own, in case two
        # streams run. The model registers them as a buffer: vLLM's sleep mode keeps the content of buffers
        # only.
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
        attention = tables.tile("attention", 1)
        return cls(
            device,
            {
                "down": num_tokens * _MAX_RANK,
                "down_partials": tables.wave("down", "n", device),
                "heads_partials": tables.wave("down", "n", device),
                "activations": ffn * tables.padded_tokens(num_tokens),
                "fc2_partials": tables.wave("fc2", "k", device),
                # rounding up the number of splits at most doubles a wave
                "attention": 2 * attention.per_sm * tables.num_sms(device) * (head_size + 2),
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


def workspace_for(workspace: Workspace | None, device: torch.device) -> Workspace:
    return Workspace(device) if workspace is None else workspace
