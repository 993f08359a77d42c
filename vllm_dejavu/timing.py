"""Timing operations against each other: in turn, so that what else the machine does falls on all alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class Timer:
    """Times functions of a copy's number: CUDA graphs of all copies on a GPU, the host's clock on a CPU.

    Copies of the weights, together larger than the last cache, make every run read memory.

    Args:
        rounds: each function is measured so many times.
    """

    def __init__(self, device: torch.device, rounds: int):
        self.device, self.rounds = device, rounds
        self.cuda = device.type == "cuda"

    def capture(self, run: Callable[[int], Any], copies: int) -> Callable[[], Any]:
        """All copies, one after the other, as one launch; what is slow the first time is done."""
        if not self.cuda:
            run(0)
            return lambda: [run(i) for i in range(copies)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries make their handles, before the capture
            for i in range(copies):  # every one: sizes that Triton specialises on may differ
                run(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                run(i)
        return graph.replay

    def __call__(self, runs: dict[str, Callable[[int], Any]], copies: int) -> dict[str, list[float]]:
        """{name: microseconds of one copy, of each round}; the runs take turns."""
        replay = {name: self.capture(run, copies) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        if not self.cuda:
            for _ in range(self.rounds):
                for name, call in replay.items():
                    start = time.perf_counter()
                    call()
                    times[name].append((time.perf_counter() - start) * 1e6 / copies)
            return times
        for call in list(replay.values()) * 2:
            call()
        torch.cuda.synchronize()
        events = []
        for _ in range(self.rounds):
            for name, call in replay.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(start.elapsed_time(end) * 1e3 / copies)
        return times


def crossover(dense: float, sparse: Sequence[tuple[float, float]]) -> float:
    """Density at which sparse takes as long as dense, by linear interpolation; 1.0: never as long, 0.0:
    always longer.

    Args:
        dense: its time. sparse: (density, time with the prediction), at least one; below the first density
            the time stays.
    """
    points = sorted(sparse)
    place = 0.0
    for (d0, t0), (d1, t1) in zip([(0.0, points[0][1]), *points], points, strict=False):
        if t0 <= dense < t1:
            return d0 + (d1 - d0) * (dense - t0) / (t1 - t0)
        place = d1 if t1 <= dense else place
    return place


def cpu_model() -> str:
    """What the kernel calls this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
