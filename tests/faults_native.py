"""Planted faults of the native kernels and of steps that run natively (faults.py has the others)."""

from __future__ import annotations

from faults_base import picked

SELECT, MLP, HEADS, ARGUMENTS, TILES = (
    f"kernels/csrc/{name}" for name in ("select.h", "mlp.h", "heads.h", "arguments.h", "tiles.h")
)

INTEGERS, LANES, ACCUMULATE, TRANSPOSED = (
    f"kernels/csrc/{name}.h" for name in ("integers", "lanes", "accumulate", "transposed")
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
        TRANSPOSED,
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
        ACCUMULATE,
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

FORMATS = "vllm_dejavu/formats.py"
INT8 = [
    picked(
        "int8-scale-of-another-row",
        MLP,
        "scaled[i] = affine.scale[h.number(begin + i)]",
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
        "static_cast<uint32_t>(zero) * sum)",
        "static_cast<uint32_t>(zero - 1) * sum)",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-odd-row-meets-itself",
        ACCUMULATE,
        "for (int64_t i = n; i % A::GROUP; ++i)",
        "for (int64_t i = n; false; ++i)",
    ),
    picked(
        "int8-scales-of-the-first-group",
        LANES,
        "at = first / GROUP * V * 16",
        "at = 0",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-scales-of-the-first-tokens",
        ACCUMULATE,
        "of.offsets += count * of.groups;",
        "of.offsets += 0;",
        "test_kernel_int8.py",
    ),
    picked(
        "int8-groups-cut-anywhere",
        TRANSPOSED,
        "m * split / splits / ROW_GROUP * ROW_GROUP",
        "m * split / splits",
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

MODEL, CACHE, BLOCKS_FILE = "kernels/csrc/model.h", "kernels/csrc/cache.h", "vllm_dejavu/native.py"
PASSES = [
    picked("pass-limit-of-a-batch", MODEL, "tokens <= most_tokens", "tokens < most_tokens"),
    picked("pass-unselected-heads-stay", MODEL, "if (sparse) zero_heads", "if (false) zero_heads"),
    picked("pass-keys-as-values", MODEL, "part(heads + kv, kv)", "part(heads, kv)"),
    picked(
        "pass-never-written",
        MODEL,
        "block.cache->write(key.narrow(0, 0, written), value.narrow(0, 0, written), *pass.slot_mapping);",
        "",
    ),
    picked(
        "pass-rows-share-neurons", MODEL, "model.row_exact ? MaybeTensor(mask)", "false ? MaybeTensor(mask)"
    ),
    picked("pass-nobody-rides", BLOCKS_FILE, "numbers.get(id(mlp.rider), -1)", "-1"),
    picked("pass-unseen-by-recorders", BLOCKS_FILE, "or any(gate.recorder", "or all(gate.recorder"),
    picked("pass-of-dense-steps", MODEL, "sparse_step && block.gate.takes(rows)", "block.gate.takes(rows)"),
    picked("pass-samples-nothing", BLOCKS_FILE, "if attention.recall.due(step)]", "if False]"),
    picked("cache-key-of-one-query", CACHE, "std::any_of(of_group", "std::all_of(of_group"),
    picked("cache-blocks-of-the-first-head", CACHE, "from[block] * kv + head", "from[block] * kv"),
    picked(
        "cache-all-queries-of-a-key",
        CACHE,
        "if (scores[row * heads + head * group_ + j] > 0)",
        "if (true)",
    ),
    picked("cache-length-of-another-row", CACHE, "[i] = lens[row];", "[i] = lens[0];"),
    picked("cache-slopes-of-the-first-head", CACHE, "attending.slopes || attending", "attending"),
    picked(
        "cache-limit-just-missed",
        MODEL,
        "pass.cached >= least_cached",
        "pass.cached > least_cached",
        "test_kernel_native_cache.py",
    ),
    picked(
        "cache-of-prompts-too",
        MODEL,
        "pass.row_is_sequence && pass.cached",
        "pass.cached",
        "test_kernel_native_cache.py",
    ),
    picked("cache-heads-unscored", MODEL, "&& !rider->selects(*model.pass)", "&& true"),
    picked(
        "cache-spared-in-all-heads",
        BLOCKS_FILE,
        "(attention.kv_heads * spared)",
        "attention.kv_heads",
        "test_tune.py",
    ),
]
