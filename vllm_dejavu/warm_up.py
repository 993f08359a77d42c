"""What vLLM's workers do for the model when they have warmed up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def complete_warm_up() -> None:
    """Have the workers of this process do after warming up what the model needs; called in one, before that.

    Our counters are set to 0: GPU workers warm up with metadata. And a later pipeline stage gets the buffers
    for what comes from the stage in front of it: vLLM makes them in its first dummy pass, which its CPU
    worker leaves out in eager mode, so that the first request kills it (0.32).
    """
    from vllm.v1.worker.worker_base import WorkerBase

    classes = [WorkerBase]
    for cls in classes:
        classes += cls.__subclasses__()
        original = vars(cls).get("compile_or_warm_up_model")
        if cls is not WorkerBase and original is not None and not hasattr(original, "dejavu_completes"):
            cls.compile_or_warm_up_model = _completed(original)


def _completed(warm_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(warm_up)
    def wrapped(self: Any) -> Any:
        result = warm_up(self)
        reset = getattr(self.model_runner.get_model(), "reset_metrics", None)
        if reset is not None:
            from vllm.distributed import get_pp_group

            if (
                not get_pp_group().is_first_rank
                and getattr(self.model_runner, "intermediate_tensors", True) is None
            ):
                self.execute_dummy_batch()
            reset()
        return result

    wrapped.dejavu_completes = True  # type: ignore[attr-defined]
    return wrapped
