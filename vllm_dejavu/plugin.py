"""Hooks us into vLLM: `model_impl="dejavu"` resolves to our class, every other value to vLLM's own."""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm_dejavu.families import FAMILIES, family_of

MODEL_IMPL = "dejavu"
_MARK = "_dejavu_wrapped"

logger = logging.getLogger("vllm.dejavu")


def register() -> None:
    """Register the model class and the mapping; runs in every process vLLM starts, more than once.

    vLLM's registry resolves an architecture name to a class in two methods, `inspect_model_cls` (front end,
    on the config) and `resolve_model_cls` (workers). Both are wrapped: with `model_impl == "dejavu"` the
    architecture is replaced by ours, or an error says that there is none. Everything else passes through
    untouched.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        name = family.serving_architecture
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, family.serving)
        MODELS_CONFIG_MAP[name] = EngineConfig
    registry_cls = type(ModelRegistry)
    for method in ("inspect_model_cls", "resolve_model_cls"):
        original = getattr(registry_cls, method)
        if not getattr(original, _MARK, False):
            setattr(registry_cls, method, _wrap(original))


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def wrapped(self: Any, architectures: str | list[str], model_config: Any) -> Any:
        if getattr(model_config, "model_impl", None) == MODEL_IMPL:
            architectures = [family_of(architectures).serving_architecture]
        return original(self, architectures, model_config)

    setattr(wrapped, _MARK, True)
    return wrapped


class EngineConfig:
    """vLLM calls this once the whole engine configuration is known, in the front end, before any worker
    starts.

    So wrong settings, a missing artifact and unsupported options are plain errors there, not in a worker's
    log.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """vLLM's hook for the model configuration alone: nothing to do."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """vLLM's hook for the whole configuration."""
        from vllm_dejavu import engine, monitoring

        engine.settle(vllm_config, in_worker=False)
        monitoring.install()
