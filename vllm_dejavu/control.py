"""What an operator may change while an engine serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM


def set_dense(llm: LLM, dense: bool = True) -> None:
    """Serve at dense quality from the next step on, or sparse again: every gate selects everything.

    For quality in doubt, not for speed: predictors still run, and all weights are read through the sparse
    kernels. Requests that are running are preempted and computed anew, as the prefix cache is reset: cached K
    and V depend on the mode.

    Raises:
        RuntimeError: the prefix cache could not be reset; the switch itself has been set.
    """
    llm.collective_rpc("dejavu_set_dense", args=(dense,))
    _check(llm.reset_prefix_cache(reset_running_requests=True))


async def set_dense_async(engine: AsyncLLM, dense: bool = True) -> None:
    """`set_dense` for an asynchronous engine."""
    await engine.collective_rpc("dejavu_set_dense", args=(dense,))
    _check(await engine.reset_prefix_cache(reset_running_requests=True))


def _check(reset: bool) -> None:
    if not reset:
        raise RuntimeError(
            "The dense switch is set, but the prefix cache holds blocks in use and was not reset: try again,"
            " or reset it when idle."
        )
