"""Planted faults: small wrong changes of the code, each of which some test must notice.

`make faults` (scripts/plant_faults.py) makes each change in a copy of the tree and runs the named test files
there; a fault that survives is a hole in the tests. Half of them were picked: one for each kernel entry and
branch, for the predicate, union, calibration, reader, counters, refusals. The others, in drawn_faults.json,
were drawn by seed. test_faults.py keeps both alive: each old text occurs once.
"""

from __future__ import annotations

import json
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
    *("tiles.h", "integers.h", "lanes.h", "common.h", "avx512_bf16.cpp"),
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
    **dict.fromkeys(
        ("kernels/csrc/model.h", "vllm_dejavu/native.py", "vllm_dejavu/compat.py"), ("test_engine_native.py",)
    ),
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


SELECT, MLP, HEADS, ARGUMENTS, TILES = (
    f"kernels/csrc/{name}" for name in ("select.h", "mlp.h", "heads.h", "arguments.h", "tiles.h")
)

NATIVE = [
    picked(
        "native-zero-score-selects",
        TILES,
        "scores[i] + bias[i] > 0 ? 1 : 0",
        "scores[i] + bias[i] >= 0 ? 1 : 0",
    ),
    picked(
        "native-padding-scores-heads", SELECT, "weight.size(0)}, -1.0, scores", "weight.size(0)}, 1.0, scores"
    ),
    picked("native-row-mask-of-another-row", SELECT, "chosen_by[valid[t] * ffn", "chosen_by[t * ffn"),
    picked("native-read-not-counted", SELECT, "count(counters, READ, read);", ""),
    picked("native-rider-scored-on-own-input", SELECT, "score_heads(*head_x, ", "score_heads(x, "),
    picked(
        "native-wrong-segment",
        MLP,
        "std::copy_n(ids + s * SEGMENT,",
        "std::copy_n(ids + (s > 1 ? 1 : s) * SEGMENT,",
    ),
    picked("native-row-mask-dropped", MLP, " n, row_mask ? mask.data_ptr<bool>() : nullptr", " n, nullptr"),
    picked(
        "native-one-thread-not-summed",
        MLP,
        "for (int64_t s = 1; s < splits; ++s)",
        "for (int64_t s = 2; s < splits; ++s)",
    ),
    picked(
        "native-linear-without-bias",
        MLP,
        "output.copy_(plain_linear(x, weight, scale, bias))",
        "output.copy_(plain_linear(x, weight, scale, MaybeTensor()))",
    ),
    picked("native-every-chunk-on-the-first", MLP, "out.narrow(0, begin, count)", "out.narrow(0, 0, count)"),
    picked(
        "native-last-value-row-dropped",
        HEADS,
        "row = queries; row < all; ++row",
        "row = queries; row < all - 1; ++row",
    ),
    picked(
        "native-out-proj-reads-gaps", HEADS, "segments.back().end == begin", "segments.back().end <= begin"
    ),
    picked("native-mask-heads-keeps-zero", HEADS, "if (!(scores[i] > 0)) std", "if (!(scores[i] >= 0)) std"),
    picked("native-dense-counts-padding", ARGUMENTS, "return len > 0;", "return len >= 0;"),
    picked("native-dot-tail-dropped", TILES, "if (k < end) {", "if (k + 1 < end) {"),
    picked("native-second-tile-of-tokens", TILES, "w, next, x + t * ldx, ldx", "w, next, x, ldx"),
    picked(
        "native-neurons-taken-for-neighbours",
        TILES,
        "|| places[first + n - 1] - places[first] != n - 1",
        "|| false",
    ),
    picked(
        "native-share-of-a-thread-short",
        "kernels/csrc/common.h",
        "std::min(n, units * (task + 1) / tasks * unit)",
        "std::min(n, (units * (task + 1) / tasks - (tasks > 2)) * unit)",
    ),
    picked(
        "native-pairs-tail-dropped",
        "kernels/csrc/avx512_bf16.cpp",
        "for (; pair < end; ++pair)",
        "for (; pair + 1 < end; ++pair)",
        needs="avx512_bf16",
    ),
    picked(
        "native-prepare-weight-writes",
        "kernels/cpu.py",
        "use_huge_pages(weight)",
        "use_huge_pages(weight.zero_())",
        "test_kernel_native.py",
    ),
]

TRITON = [
    picked(
        "triton-columns-not-masked",
        "kernels/primitives.py",
        "mask=row_mask[:, None] & (kk < k_end)[None, :]",
        "mask=row_mask[:, None]",
    ),
    picked(
        "triton-semaphore-not-reset",
        "kernels/primitives.py",
        "tl.store(counter_ptr, 0)",
        "tl.store(counter_ptr, 1)",
    ),
    picked(
        "triton-no-fence",
        "kernels/primitives.py",
        'sem="acq_rel"',
        'sem="relaxed"',
        "test_kernel_gpu.py",
        needs="gpu",
    ),
    picked(
        "triton-heads-of-padding", "kernels/predict.py", "tl.where(valid[None, :], result, -1.0)", "result"
    ),
    picked(
        "triton-padding-selects",
        "kernels/predict.py",
        "(scores > 0) & inside[:, None] & valid[None, :]",
        "(scores > 0) & inside[:, None]",
    ),
    picked(
        "triton-wrong-segment",
        "kernels/sparse_mlp.py",
        "before = ends[None, :] <= position",
        "before = ends[None, :] < position",
    ),
    picked(
        "triton-dead-rows-read",
        "kernels/sparse_mlp.py",
        "mask=alive[:, None] & column_mask",
        "mask=mask[:, None] & column_mask",
    ),
    picked(
        "triton-survivors-counted-by-tile",
        "kernels/sparse_mlp.py",
        "if (tile == 0) & (token_block == 0):",
        "if token_block == 0:",
    ),
    picked(
        "triton-unselected-queries-read",
        "kernels/projections.py",
        "needed = (number > 0).to(tl.int32)",
        "needed = tl.full([], 1, tl.int32)",
    ),
    picked(
        "triton-unselected-columns-read",
        "kernels/projections.py",
        "(d < HEAD_SIZE * needed)[None, :]",
        "(d < HEAD_SIZE)[None, :]",
    ),
    picked(
        "triton-one-token-too-far",
        "kernels/sparse_attention.py",
        "mask = position < end",
        "mask = position <= end",
    ),
]

REFERENCE = [
    picked("reference-union-of-wrong-segment", "kernels/reference.py", "found + start", "found"),
    picked(
        "reference-reads-behind-the-sequence",
        "kernels/reference.py",
        ".flatten(0, 1)[:length]",
        ".flatten(0, 1)",
    ),
]

SPARSE_IF = '"sparse" if apply_to == "all" or metadata.max_query_len == 1 else "prefill_or_mixed"'

SERVING = [
    picked("always-dense", "vllm_dejavu/steps.py", f"reason = {SPARSE_IF}", 'reason = "prefill_or_mixed"'),
    picked("always-sparse", "vllm_dejavu/steps.py", f"reason = {SPARSE_IF}", 'reason = "sparse"'),
    picked(
        "piecewise-graphs-sparse",
        "vllm_dejavu/steps.py",
        "context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE",
        "False",
        "test_step.py",
        "test_engine_metrics.py",
    ),
    picked(
        "padding-counts-as-a-row",
        "vllm_dejavu/steps.py",
        "< self.metadata.num_actual_tokens",
        "<= self.metadata.num_actual_tokens",
        "test_step.py",
        "test_engine_apply_all.py",
        "test_engine_selection.py",
    ),
    picked(
        "rider-reads-another-state",
        "vllm_dejavu/mlp.py",
        "else Rider(previous, rider",
        "else Rider(gate_input, rider",
        "test_engine_replay.py",
    ),
    picked(
        "crossover-upside-down",
        "vllm_dejavu/gate.py",
        "spec.density_at(tokens) > limit(tokens)",
        "spec.density_at(tokens) < limit(tokens)",
    ),
    picked(
        "dense-switch-never-back",
        "vllm_dejavu/gate.py",
        "self.predictor.bias.copy_(self.calibrated_bias)",
        "pass",
    ),
    picked(
        "rows-not-masked",
        "kernels/interface.py",
        "selection if asked.row_exact or selection.mask is None else selection._replace(mask=None)",
        "selection._replace(mask=None)",
        "test_engine_selection.py",
    ),
    picked(
        "gates-not-reset",
        "vllm_dejavu/models/base.py",
        "(self.step_counters, *(g.counters for g in self.gates))",
        "(self.step_counters,)",
    ),
]

METRICS = [
    picked(
        "ranks-add-steps", "vllm_dejavu/metrics.py", "max(slot.get(key, 0), value) if key in SHARED else ", ""
    ),
    picked(
        "recall-is-one",
        "vllm_dejavu/gate.py",
        "active.sum(), (active & mask).sum()",
        "active.sum(), active.sum()",
        "test_engine_selection.py",
    ),
    picked(
        "reset-counters-fall",
        "vllm_dejavu/monitoring.py",
        "total - seen if total >= seen else total",
        "max(0, total - seen)",
    ),
]

TRAINING = [
    picked(
        "margin-subtracted", "predictor_training/gates.py", "fitted.bias + margin", "fitted.bias - margin"
    ),
    picked("cut-added", "predictor_training/gates.py", "fitted.bias - cut", "fitted.bias + cut"),
    picked(
        "budget-ignored",
        "predictor_training/calibrate.py",
        "if measured <= budget:\n            low,",
        "if measured <= 9 * budget:\n            low,",
    ),
    picked("union-of-what-all-select", "predictor_training/describe.py", "rows[p].any(0)", "rows[p].all(0)"),
]

ARTIFACT = [
    picked("digest-not-compared", "vllm_dejavu/artifact.py", "if sha256 != recorded_sha256:", "if False:"),
    picked(
        "infinite-predictor-served",
        "vllm_dejavu/artifact.py",
        "~torch.isfinite(tensor)",
        "torch.isnan(tensor)",
    ),
    picked(
        "fingerprint-not-compared",
        "vllm_dejavu/manifest.py",
        "if manifest.model.fingerprint != found:",
        "if not found:",
    ),
]

REFUSALS = [
    picked(
        "lora-not-refused",
        "vllm_dejavu/engine.py",
        "if vllm_config.lora_config is not None:",
        "if False:",
        "test_engine_plugin.py",
    ),
    picked(
        "largest-batch-not-captured",
        "vllm_dejavu/engine.py",
        "elif largest not in sizes:",
        "elif largest in sizes:",
    ),
]

INTEGERS, LANES, FORMATS = "kernels/csrc/integers.h", "kernels/csrc/lanes.h", "vllm_dejavu/formats.py"
INT8 = [
    picked(
        "int8-scale-of-another-row",
        MLP,
        "scaled[i] = affine.scale[id(begin + i)]",
        "scaled[i] = affine.scale[begin + i]",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-unread-heads-are-rounded-too",
        HEADS,
        "if (n == heads * attn.size(2)) return",
        "if (true) return",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-sums-overflow",
        INTEGERS,
        "by_sum > by_most ? by_sum : by_most",
        "by_most",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-infinity-passes", INTEGERS, "sum - sum == 0 ? scale :", "true ? scale :", "test_kernel_int8.py"
    ),
    picked(
        "int8-offset-too-small",
        INTEGERS,
        "(0u - 128 * sum)",
        "(0u - 127 * sum)",
        "test_kernel_int8.py",
    ),
    picked("int8-odd-row-meets-itself", TILES, "for (int64_t i = n; i % A::GROUP; ++i)", "for (; false;)"),
    picked(
        "int8-scales-of-the-first-group",
        LANES,
        "at = first / GROUP * V * 16",
        "at = 0",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-scales-of-the-first-tokens",
        TILES,
        "of.offsets += count * of.groups;",
        "of.offsets += 0;",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-groups-cut-anywhere", MLP, "m * split / splits / ROW_GROUP * ROW_GROUP", "m * split / splits"
    ),
    picked("int8-scales-cut-short", "vllm_dejavu/quantization.py", "wide.abs().amax(1)", "wide.amax(1)"),
    picked(
        "int8-embedding-without-scale",
        FORMATS,
        "layer.weight[ids] * layer.weight_scale[ids, None]",
        "layer.weight[ids]",
    ),
    picked("int8-dummies-stay-empty", FORMATS, "module.weight.copy_(integers)", "module.weight.zero_()"),
    picked(
        "int8-tuned-as-16",
        "vllm_dejavu/models/base.py",
        "model_config.dtype, tp, bits)",
        "model_config.dtype, tp)",
        "test_tune.py",
    ),
]

MODEL, BLOCKS_FILE = "kernels/csrc/model.h", "vllm_dejavu/native.py"
PASSES = [
    picked("pass-limit-of-a-batch", MODEL, "tokens <= most_tokens", "tokens < most_tokens"),
    picked("pass-unselected-heads-stay", MODEL, "if (sparse) zero_heads", "if (false) zero_heads"),
    picked("pass-keys-as-values", MODEL, "part(heads + kv, kv)", "part(heads, kv)"),
    picked("pass-never-written", MODEL, "if (pass.slot_mapping) block", "if (false) block"),
    picked(
        "pass-rows-share-neurons", MODEL, "model.row_exact ? MaybeTensor(mask)", "false ? MaybeTensor(mask)"
    ),
    picked("pass-nobody-rides", BLOCKS_FILE, "numbers.get(id(mlp.rider), -1)", "-1"),
    picked("pass-unseen-by-recorders", BLOCKS_FILE, "or any(gate.recorder", "or all(gate.recorder"),
    picked("pass-of-dense-steps", MODEL, "sparse_step && block.gate.takes(rows)", "block.gate.takes(rows)"),
    picked("pass-samples-nothing", BLOCKS_FILE, "if attention.recall.due(step)]", "if False]"),
]
PICKED = [
    *(*NATIVE, *TRITON, *REFERENCE, *SERVING, *METRICS, *TRAINING, *ARTIFACT, *REFUSALS, *INT8),
    *PASSES,
]
# As `scripts/draw_faults.py` wrote them; only `equivalent` was added by hand.
DRAWN_FILE = Path(__file__).with_name("drawn_faults.json")
DRAWN = [
    Fault(**entry, tests=TESTS_OF[entry["file"]], drawn=True)
    for entry in json.loads(DRAWN_FILE.read_text(encoding="utf-8"))
]
FAULTS = [*PICKED, *DRAWN]
