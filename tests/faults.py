"""Planted faults: small wrong changes of the code, each of which some test must notice.

`make faults` (scripts/plant_faults.py) makes each change in a copy of the tree and runs the named test files
there; a fault that survives is a hole in the tests. Half of them were picked: one for each kernel entry and
branch, for the predicate, union, calibration, reader, counters, refusals. The others, in drawn_faults.json,
were drawn by seed. test_faults.py keeps both alive: each old text occurs once.
"""

from __future__ import annotations

import json
from pathlib import Path

from faults_base import TESTS_OF, Fault, picked
from faults_exact import EXACT
from faults_int4 import INT4
from faults_native import INT8, NATIVE, PASSES

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
        "(self.step_counters, *(c.counters for c in self.counted))",
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

PICKED = [
    *(*NATIVE, *TRITON, *REFERENCE, *SERVING, *METRICS, *TRAINING, *ARTIFACT, *REFUSALS, *INT8),
    *(*PASSES, *EXACT, *INT4),
]
# As `scripts/draw_faults.py` wrote them; only `equivalent` was added by hand.
DRAWN_FILE = Path(__file__).with_name("drawn_faults.json")
DRAWN = [
    Fault(**entry, tests=TESTS_OF[entry["file"]], drawn=True)
    for entry in json.loads(DRAWN_FILE.read_text(encoding="utf-8"))
]
FAULTS = [*PICKED, *DRAWN]
