"""A Ray cluster of a test's own, that no other cluster, user or memory hog on this machine has a part in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # or Ray writes a token into the home directory
    "RAY_memory_monitor_refresh_ms": "0",  # or Ray kills our workers where others fill the memory
}


@contextlib.contextmanager
def local_ray(**options: Any) -> Iterator[str]:
    """Its address. The cluster's files are gone and the environment is as before afterwards.

    Args:
        options: of `ray.init`.
    """
    import ray

    before = dict(os.environ)
    # Not Ray's own /tmp/ray, which belongs to whoever was first. The name is short because sockets lie in it,
    # whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        os.environ.update(ENVIRONMENT)
        try:
            # "local": otherwise Ray joins the cluster that RAY_ADDRESS or `ray start` names, and refuses
            # num_cpus.
            yield ray.init(
                "local", _temp_dir=directory, include_dashboard=False, logging_level="ERROR", **options
            ).address_info["address"]
        finally:
            ray.shutdown()
            os.environ.clear()
            os.environ.update(before)
