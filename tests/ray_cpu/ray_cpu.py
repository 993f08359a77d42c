"""A platform plugin of vLLM for tests: its CPU platform, whose workers Ray may place on what the cluster
calls GPUs.

vLLM refuses Ray on a CPU because that platform names no resource of Ray's. With this directory on PYTHONPATH
and DEJAVU_TEST_RAY_CPU=1 vLLM finds the entry point in every process, Ray's actors too; the cluster needs
`num_gpus`.
"""

import os

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def register() -> str | None:
    """Entry point `vllm.platform_plugins`: the platform's class, None where it is not asked for."""
    return "ray_cpu.RayCpuPlatform" if os.environ.get("DEJAVU_TEST_RAY_CPU") == "1" else None
