"""benchmarks/gpu_suite.sh: what it runs, what comes back whatever happens, what a later call still does.

A script stands in for Python, so that nothing is measured: it writes what each stage's program would write.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
FIRST = ["smoke", "test-kernels", "kernels-first", "profile", "engine-first"]
NEXT = [
    "smoke",
    "test-kernels",
    "engine-6.7b",
    "engine-30b",
    "test-triton",
    "test-engine",
    "profile",
    "kernels",
    "profile-batch8",
    "profile-dense",
    "engine-dense",
    "sanitizer",
    "test-engine-rest",
    "engine-ablations",
    "engine-13b",
    "plots",
]
PYTHON = r"""#!/usr/bin/env bash
case "$*" in *get_device_properties*) echo "$FAKE_GB" && exit ;; esac
[ -n "${SUITE_STAGE:-}" ] || exit 0
case "$*" in *"-c import"*) exit ;; esac
echo "$SUITE_STAGE: $*" >>"$FAKE/calls"
output=. geometry="" label=""
arguments=("$@")
for i in "${!arguments[@]}"; do
    value=${arguments[i + 1]:-}
    case ${arguments[i]} in
    --output) output=$value ;;
    --geometry) geometry=$value ;;
    --label) label=$value ;;
    esac
done
mkdir -p "$output"
status=ok
[ -e "$FAKE/late-$SUITE_STAGE" ] && status="not run: out of time"
case "$*" in
*bench_kernels.py*) printf 'kernel,status,\nqkv,ok,\nselect,%s,\n' "$status" >"$output/kernels.csv" ;;
*--smoke*) ;;
*bench_engine.py*)
    printf 'batch,status,\n1,ok,\n8,%s,\n' "$status" >"$output/engine-$geometry${label:+-$label}.csv"
    ;;
*profile_step.py*) echo trace >"$output/$SUITE_STAGE.json.gz" ;;
esac
echo "$SUITE_STAGE says so"
if [ -p "$FAKE/hang-$SUITE_STAGE" ]; then
    echo >"$FAKE/started" # waits until the test reads
    read -r <"$FAKE/hang-$SUITE_STAGE"
fi
[ ! -e "$FAKE/fail-$SUITE_STAGE" ]
"""


class Host:
    """A machine with a folder of its own, a stand-in for Python, and OUT, emptied before each call."""

    def __init__(self, place, memory=79):
        self.place, self.out = place, place / "out"
        self.fake, self.work = place / "fake", place / "work"
        self.fake.mkdir(parents=True)
        python = place / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.env = {
            **os.environ,
            "PYTHON": str(python),
            "FAKE": str(self.fake),
            "FAKE_GB": str(memory),
            "WORK": str(self.work),
        }

    def start(self, *arguments, **env):
        shutil.rmtree(self.out, ignore_errors=True)
        command = ["bash", str(SUITE), str(self.out), *arguments]
        return subprocess.Popen(
            command,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, **env):
        """(exit status, output)."""
        process = self.start(*arguments, **env)
        output = process.communicate()[0]
        return process.returncode, output

    def set(self, what):
        (self.fake / what).touch()

    def hang(self, stage):
        for name in (f"hang-{stage}", "started"):
            os.mkfifo(self.fake / name)

    def calls(self):
        """Stages whose programs were started, in that order, once each."""
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return list(dict.fromkeys(line.partition(":")[0] for line in lines))

    def results(self):
        """{stage: result}, without times, as they came back."""
        with tarfile.open(self.out / "results.tar.gz") as tar:
            marks = [m for m in tar.getmembers() if m.name.startswith("./stages/")]
            texts = {Path(m.name).name: tar.extractfile(m).read().decode() for m in marks}
        return {stage: text.split(",")[0] for stage, text in texts.items()}


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "host")


def test_a_first_call(host):
    """All stages, in order; three files, a summary of 40 lines last."""
    status, output = host.run("first")
    assert status == 0, output
    assert set(host.calls()[:2]) == set(FIRST[:2]) and host.calls()[2:] == FIRST[2:]
    assert sorted(p.name for p in host.out.iterdir()) == ["results.tar.gz", "summary.txt", "traces.tar"]
    assert host.results() == dict.fromkeys(FIRST, "ok")
    summary = (host.out / "summary.txt").read_text()
    assert output.endswith(summary) and len(summary.splitlines()) <= 40
    assert all(f"== {stage}: ok" in summary and f"{stage} says so" in summary for stage in FIRST)
    with tarfile.open(host.out / "results.tar.gz") as tar:
        assert {"./engine-6.7b-first.csv", "./first/kernels.csv", "./logs/smoke.log"} <= set(tar.getnames())
    with tarfile.open(host.out / "traces.tar") as tar:
        assert tar.getnames() == ["profile.json.gz"]


def test_what_fails_or_hangs_costs_the_others_nothing(host):
    """Bug: what came behind a stage that took all the time was lost, and with it what had been measured."""
    host.set("fail-smoke")
    os.mkfifo(host.fake / "hang-profile")
    (host.fake / "started").touch()
    status, output = host.run("first", LIMITS="profile=11")
    assert status == 1
    assert host.results() == dict.fromkeys(FIRST, "ok") | {"smoke": "FAILED", "profile": "stopped after 1 s"}
    assert "== smoke: FAILED, status 1" in output


def test_a_kill_leaves_what_had_ended(host):
    """As at the end of a command's ten minutes: no trap runs."""
    host.hang("profile")
    process = host.start("first")
    with open(host.fake / "started") as started:
        started.read()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert set(host.results()) == set(FIRST[:3])
    assert "kernels-first: ok" in (host.out / "summary.txt").read_text()
    with open(host.fake / "hang-profile", "w"):  # lets the stage's program end
        pass


def test_no_time_left(host):
    status, output = host.run("first", LIMIT_S="0")
    assert host.calls() == [] and f"not run: {' '.join(FIRST)}" in output
    assert (host.out / "summary.txt").exists()


def test_the_next_call_takes_what_is_not_done(host):
    status, output = host.run("next", DONE="smoke test-kernels kernels", LIMIT_S="99999")
    assert status == 0, output
    summary = (host.out / "summary.txt").read_text()
    assert len(summary.splitlines()) <= 40 and all(f"== {stage}: ok" in summary for stage in host.calls())
    assert host.calls() == [stage for stage in NEXT if stage not in ("smoke", "test-kernels", "kernels")]
    (host.fake / "calls").unlink()
    assert host.run("next", LIMIT_S="99999")[0] == 0 and host.calls() == []
    assert host.run("plots", "profile")[0] == 0
    assert host.calls() == ["plots", "profile"], "named ones run again"


def test_another_machine_goes_on(host, tmp_path):
    """From what came back: failures in their turn, what ran out of time after all the others."""
    host.set("late-engine-6.7b")
    host.set("fail-engine-30b")
    stages = [*NEXT[:4], "sanitizer"]
    assert host.run(*stages, LIMIT_S="99999")[0] == 1
    assert host.results()["engine-6.7b"] == "incomplete: out of time"
    assert host.results()["engine-30b"] == "FAILED"
    other = Host(tmp_path / "other")
    status, output = other.run("next", FROM=str(host.out / "results.tar.gz"), LIMIT_S="99999")
    assert status == 0, output
    left = [stage for stage in NEXT if stage not in stages]
    assert other.calls() == ["engine-30b", *left, "engine-6.7b"]
    assert set(other.results()) == set(NEXT)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(79, "--batch 1 8 --context 256 "), (139, "--batch 1 8 24 64 --context 256 1920 "), (39, None)],
    ids=["80-GB", "141-GB", "40-GB"],
)
def test_30b_is_sized_for_the_card(tmp_path, memory, expected):
    host = Host(tmp_path / "host", memory)
    status, output = host.run("engine-30b")
    assert status == 0, output
    if expected is None:
        assert host.calls() == [] and host.results()["engine-30b"] == "does not fit on this card"
    else:
        assert expected in (host.fake / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "env", "status", "message"),
    [
        (["first"], {"FAKE_GB": "Error: no driver"}, 1, "torch finds no GPU here: Error: no driver"),
        (["smoke", "kernel"], {}, 2, "unknown stage kernel"),
        (["next"], {"FROM": "nowhere.tar.gz"}, 2, "nowhere.tar.gz cannot be read"),
        ([], {}, 2, "OUT STAGE..."),
    ],
    ids=["no-gpu", "unknown-stage", "no-earlier-results", "nothing-asked"],
)
def test_what_is_refused(host, arguments, env, status, message):
    found, output = host.run(*arguments, **env)
    assert found == status and message in output and host.calls() == []


@pytest.mark.on_demand
@pytest.mark.parametrize("what", ["first", "next"])
def test_dry_run(tmp_path, what):
    """The real programs, tiny, on a CPU."""
    env = {**os.environ, "PYTHON": sys.executable, "DRY_RUN": "1", "JOBS": "1"}
    env |= {"WORK": str(tmp_path / "work"), "LIMIT_S": "7200"}
    env |= {"LIMITS": " ".join(f"{stage}=1200" for stage in {*FIRST, *NEXT})}
    # not into this environment's packages
    env |= {"VLLM_SITE": str(tmp_path / "site"), "PYTHONPATH": str(tmp_path / "site")}
    command = ["bash", str(SUITE), str(tmp_path / "out"), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
