"""What a planted fault is, and which test files should notice one in a source file (faults.py has them)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    """One change.

    Attributes:
        file: below the root. old: text that occurs exactly once in it; new: what takes its place.
        tests: files of tests/ that should notice, the likeliest first.
        drawn: by seed, not picked. equivalent: why no test can notice it, where that is so; it is not run.
        needs: "gpu", or the instruction set without which nothing runs through the change.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    drawn: bool = False
    equivalent: str = ""
    needs: str = ""

    @property
    def native(self) -> bool:
        """Whether it is in C++, where it takes a build."""
        return self.file.endswith((".cpp", ".h"))


NATIVE_SOURCES = (
    *("ops.cpp", "arguments.h", "products.h", "select.h", "mlp.h", "heads.h"),
    *("tiles.h", "accumulate.h", "integers.h", "lanes.h", "common.h", "avx512_bf16.cpp"),
)
NATIVE_TESTS = (
    "test_kernel_native.py",
    "test_kernel_native_dense.py",
    "test_kernel_native_rounding.py",
    "test_kernel_native_refused.py",
    "test_kernel_int8.py",
)
TRITON_TESTS = (
    "test_kernel_triton.py",
    "test_kernel_triton_attention.py",
    "test_kernel_triton_interface.py",
)
ARTIFACT_TESTS = (
    "test_artifact.py",
    "test_artifact_page.py",
    "test_artifact_fuzz.py",
    "test_engine_dense_gates.py",
)
STEPS = ("test_step.py", "test_engine_selection.py", "test_engine_metrics.py", "test_engine_replay.py")
BLOCKS = (
    "test_engine_dense_gates.py",
    "test_engine_metrics.py",
    "test_engine_selection.py",
    "test_engine_replay.py",
)
MODELS = ("test_engine_metrics.py", "test_engine_parity.py", "test_engine_plugin.py")
# Which test files should notice a change of a file; what is drawn from a file takes them all.
TESTS_OF = {
    **dict.fromkeys(
        [f"kernels/csrc/{name}" for name in NATIVE_SOURCES],
        NATIVE_TESTS,
    ),
    "kernels/csrc/exact.h": ("test_kernel_exact.py",),
    **dict.fromkeys(
        ("kernels/csrc/nibbles.h", "kernels/csrc/nibble_quads.h", "kernels/packing.py"),
        ("test_kernel_int4.py",),
    ),
    "kernels/csrc/transposed.h": ("test_kernel_tiles.py", "test_kernel_exact.py", *NATIVE_TESTS),
    "vllm_dejavu/exact.py": ("test_engine_exact.py",),
    "vllm_dejavu/models/nemotron.py": ("test_engine_nemotron.py",),
    "kernels/reference.py": ("test_kernel_reference.py",),
    "kernels/primitives.py": TRITON_TESTS,
    "kernels/tables.py": TRITON_TESTS,
    "kernels/workspace.py": TRITON_TESTS,
    "kernels/checks.py": TRITON_TESTS,
    "kernels/predict.py": TRITON_TESTS,
    "kernels/projections.py": TRITON_TESTS,
    "kernels/sparse_attention.py": TRITON_TESTS,
    "kernels/sparse_mlp.py": TRITON_TESTS,
    **dict.fromkeys(("vllm_dejavu/steps.py", "vllm_dejavu/ops.py"), STEPS),
    **dict.fromkeys(
        [f"vllm_dejavu/{name}.py" for name in ("gate", "recall", "blocks", "mlp", "attention")], BLOCKS
    ),
    **dict.fromkeys(("vllm_dejavu/models/base.py", "vllm_dejavu/models/opt.py"), MODELS),
    "vllm_dejavu/metrics.py": ("test_selection.py", "test_engine_metrics.py"),
    "vllm_dejavu/monitoring.py": ("test_engine_metrics.py",),
    "vllm_dejavu/selection.py": ("test_selection.py", "test_engine_selection.py"),
    "vllm_dejavu/predictor.py": ("test_selection.py", "test_training_forms.py"),
    **dict.fromkeys(("vllm_dejavu/artifact.py", "vllm_dejavu/manifest.py"), ARTIFACT_TESTS),
    "vllm_dejavu/tune.py": ("test_tune.py",),
    "vllm_dejavu/config.py": ("test_config.py",),
    "vllm_dejavu/engine.py": ("test_capture_sizes.py", "test_engine_plugin.py", "test_engine_metrics.py"),
    "vllm_dejavu/quantization.py": ("test_quantization.py", "test_kernel_int8.py"),
    "vllm_dejavu/formats.py": ("test_engine_int8.py",),
    "kernels/csrc/cache.h": ("test_kernel_native_cache.py", "test_engine_native.py"),
    "vllm_dejavu/tune_cache.py": ("test_tune.py",),
    **dict.fromkeys(("kernels/csrc/model.h", "vllm_dejavu/compat.py"), ("test_engine_native.py",)),
    "vllm_dejavu/native.py": ("test_engine_native.py", "test_tune.py"),
    "predictor_training/calibrate.py": ("test_training_fit.py", "test_training_calibrate.py"),
    "predictor_training/describe.py": ("test_training_fit.py", "test_training_calibrate.py"),
    "predictor_training/gates.py": ("test_training_fit.py", "test_training_calibrate.py"),
    "predictor_training/masked.py": ("test_training_fit.py", "test_training_calibrate.py"),
    "predictor_training/collect.py": ("test_training_fit.py", "test_training_samples.py"),
    "predictor_training/evaluate.py": ("test_evaluate.py",),
    "predictor_training/forms.py": ("test_training_forms.py",),
    "predictor_training/labels.py": ("test_training_samples.py",),
    "predictor_training/samples.py": ("test_training_samples.py",),
    "predictor_training/train.py": ("test_training_fit.py",),
}


def picked(name: str, file: str, old: str, new: str, *tests: str, needs: str = "") -> Fault:
    return Fault(name, file, old, new, tests or TESTS_OF[file], needs=needs)
