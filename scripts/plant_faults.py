"""Make each planted fault of tests/faults.py in a copy of the tree, and see which of its test files notice.

    python scripts/plant_faults.py [--only NAME ...] [--tests-from CHECKOUT] [--out FILE] [--jobs N] [--list]

A test file is first run without a fault and must pass. Each fault is then

    killed    a test failed, crashed Python or ran into the time limit; which one is said
    survived  nothing noticed: a finding
    broken    the changed code cannot be imported, there is no test file, or the tests fail without any fault
    not run   no test can notice it (`equivalent`), or this machine lacks what it needs

Faults in C++ share one build, in which the variable DEJAVU_FAULT chooses between old and new code.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from faults import FAULTS  # noqa: E402
from faults_base import Fault  # noqa: E402
from faults_switch import with_switches  # noqa: E402

LIBRARY = "kernels/_cpu.so"
# A file's time limit: so many seconds, or so many times as long as without a fault.
LEAST_LIMIT_S, SLOWER = 300, 5
CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""


@dataclass(frozen=True)
class Result:
    """result: as in this module's docstring. test: the first that failed, or why there is none."""

    name: str
    file: str
    drawn: bool
    result: str
    test: str
    seconds: float


# One C++ build for all faults


def build_switched(faults: list[Fault], folder: Path) -> Path:
    """The native kernels with all of these faults in them; DEJAVU_FAULT=n makes the n-th of them."""
    copy_tree(folder, None)
    by_file: dict[str, dict[int, Fault]] = {}
    for number, fault in enumerate(faults, 1):
        by_file.setdefault(fault.file, {})[number] = fault
    for file, some in by_file.items():
        path = folder / file
        path.write_text(with_switches(path.read_text(encoding="utf-8"), some), encoding="utf-8")
    header, source = folder / "kernels/csrc/isa.h", folder / "kernels/csrc/ops.cpp"
    declared = "namespace dejavu {\nextern const int dejavu_fault;\n"
    chosen = 'std::getenv("DEJAVU_FAULT") ? std::atoi(std::getenv("DEJAVU_FAULT")) : 0'
    defined = f"namespace dejavu {{\nconst int dejavu_fault = {chosen};\n"
    for path, text in ((header, declared), (source, defined)):
        path.write_text(
            path.read_text(encoding="utf-8").replace("namespace dejavu {\n", text, 1), encoding="utf-8"
        )
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    environment = {"MAX_JOBS": "2", **os.environ, "VLLM_DEJAVU_CPU_KERNELS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # ninja
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
        raise SystemExit("The switched build failed:\n" + "\n".join(errors[:20] or [done.stderr[-2000:]]))
    [library] = (folder / "built").rglob("_cpu.so")
    return library


# Copies of the tree


def copy_tree(folder: Path, tests_from: Path | None) -> None:
    """The tree's files; tests/ and pytest's settings out of another checkout, if one is named."""
    for root, others in ((ROOT, False), *([(tests_from, True)] if tests_from else [])):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            check=True,
        ).stdout.decode()
        if others:
            shutil.rmtree(folder / "tests")
        for name in filter(None, listed.split("\0")):
            is_test = name.startswith("tests/") or name == "pyproject.toml"
            if (root / name).is_file() and (is_test or not others):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)


# Runs


def run_tests(folder: Path, file: str, limit_s: float, number: int = 0) -> tuple[str, str]:
    """("green", ""), ("killed", first failing test or how it ended) or ("broken", why)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DEJAVU_", "VLLM_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "DEJAVU_FAULT": str(number)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{file}"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "killed", f"by the time limit of {limit_s:.0f} s"
    finally:
        try:  # and what its tests have started
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    if process.returncode == 0:
        return "green", ""
    if process.returncode < 0:
        return "killed", f"by signal {-process.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::.*?)(?: - |$)", output, re.M)
    if process.returncode == 1 and failed:
        return "killed", failed[1]
    lines = [line for line in output.splitlines() if line.strip()]
    return "broken", " / ".join(lines[-3:])[-300:]


class Runner:
    """Makes faults in copies of the tree, one a job."""

    def __init__(self, work: Path, jobs: int, tests_from: Path | None, faults: list[Fault]):
        self.native = [f for f in faults if f.native and not f.equivalent]
        self.library = {False: ROOT / LIBRARY, True: ROOT / LIBRARY}
        if self.native:
            print(f"building the native kernels with {len(self.native)} faults", flush=True)
            self.library[True] = build_switched(self.native, work / "build")
        self.copies: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            copy_tree(work / f"copy-{i}", tests_from)
            self.copies.put(work / f"copy-{i}")
        self.present = {p.name for p in (work / "copy-0/tests").glob("test_*.py")}
        # (file, whether with the switched library): why it is not green without a fault, its time limit.
        self.green: dict[tuple[str, bool], tuple[str, float]] = {}
        self.locks: defaultdict[tuple[str, bool], threading.Lock] = defaultdict(threading.Lock)

    def run(self, fault: Fault) -> Result:
        """One fault, test file by test file until one notices."""
        reason = self._lacking(fault)
        outcome, test, seconds = (*reason, 0.0) if reason else self._noticed(fault)
        print(f"{outcome:10} {seconds:7.1f} s  {fault.name}: {test}", flush=True)
        return Result(fault.name, fault.file, fault.drawn, outcome, test, round(seconds, 1))

    def _lacking(self, fault: Fault) -> tuple[str, str] | None:
        if fault.equivalent:
            return "not run", f"equivalent: {fault.equivalent}"
        has_gpu = shutil.which("nvidia-smi") is not None
        if fault.needs and not (has_gpu if fault.needs == "gpu" else fault.needs in CPU):
            return "not run", f"needs {fault.needs}"
        if not self.present.intersection(fault.tests):
            return "broken", f"none of its test files is there: {', '.join(fault.tests)}"
        return None

    def _noticed(self, fault: Fault) -> tuple[str, str, float]:
        seconds = 0.0
        for file in filter(self.present.__contains__, fault.tests):
            why, limit_s = self._without_fault(file, fault.native)
            if why:
                return "broken", why, seconds
            outcome, test, took = self._run(file, limit_s, fault.native, fault)
            seconds += took
            if outcome != "green":
                return outcome, test, seconds
        return "survived", "", seconds

    def _without_fault(self, file: str, native: bool) -> tuple[str, float]:
        with self.locks[file, native]:
            if (file, native) not in self.green:
                outcome, why, seconds = self._run(file, 3600, native)
                what = f"{file}{' (switched build)' if native else ''}"
                print(f"{outcome:10} {seconds:7.1f} s  {what} without a fault {why}", flush=True)
                problem = "" if outcome == "green" else f"{file} is {outcome} without a fault: {why}"
                self.green[file, native] = problem, max(LEAST_LIMIT_S, SLOWER * seconds)
            return self.green[file, native]

    def _run(
        self, file: str, limit_s: float, native: bool, fault: Fault | None = None
    ) -> tuple[str, str, float]:
        """As `run_tests`, and the seconds it took, in a copy that no other job uses."""
        folder = self.copies.get()
        started = time.monotonic()
        try:
            if self.library[native].exists():
                shutil.copy2(self.library[native], folder / LIBRARY)
            if fault is None or native:
                number = 0 if fault is None else self.native.index(fault) + 1
                return *run_tests(folder, file, limit_s, number), time.monotonic() - started
            path, text = folder / fault.file, (ROOT / fault.file).read_text(encoding="utf-8")
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
            try:
                return *run_tests(folder, file, limit_s), time.monotonic() - started
            finally:
                path.write_text(text, encoding="utf-8")
        finally:
            self.copies.put(folder)


def in_turns(faults: list[Fault]) -> list[Fault]:
    """One of each test file after the other, so that jobs seldom wait for the same file to be green."""
    seen: Counter[str] = Counter()
    order = []
    for fault in faults:
        seen[fault.tests[0]] += 1
        order.append((seen[fault.tests[0]], fault))
    return [fault for _, fault in sorted(order, key=lambda turn: turn[0])]


def stale(fault: Fault) -> str:
    """Why a fault cannot be made in this tree, if it cannot."""
    path = ROOT / fault.file
    times = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
    return "" if times == 1 else f"{fault.name}: its old text occurs {times} times in {fault.file}, not once"


def write(results: list[Result], out: Path) -> None:
    """As CSV or JSON, by the name's ending."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in results]
    with open(out, "w", encoding="utf-8", newline="") as f:
        if out.suffix == ".json":
            json.dump(rows, f, indent=1)
        else:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read(out: Path) -> list[Result]:
    """What an interrupted run left; only of CSV."""
    with open(out, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    return [Result(**{**r, "drawn": r["drawn"] == "True", "seconds": float(r["seconds"])}) for r in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults, by name")
    parser.add_argument(
        "--tests-from",
        type=Path,
        metavar="CHECKOUT",
        help="run the tests of another checkout against this one's code",
    )
    parser.add_argument("--out", type=Path, help="write the results to a .csv or .json file")
    parser.add_argument("--resume", action="store_true", help="keep the results that --out (a .csv) holds")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="only list the faults")
    args = parser.parse_args()
    faults = [f for f in FAULTS if not args.only or f.name in args.only]
    if unknown := set(args.only or ()) - {f.name for f in faults}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    if args.resume and not (args.out and args.out.suffix == ".csv" and args.out.is_file()):
        parser.error("--resume needs --out with the .csv of an earlier run")
    if problems := [p for p in map(stale, faults) if p]:
        parser.error("\n".join(problems))
    if args.list:
        for f in faults:
            print(f"{f.name:45} {'drawn ' if f.drawn else 'picked'} {f.file:36} {', '.join(f.tests)}")
        return 0

    made = {r.name: r for r in read(args.out)} if args.resume else {}
    results = [made[fault.name] for fault in faults if fault.name in made]
    with tempfile.TemporaryDirectory(prefix="dejavu-faults.") as work, ThreadPoolExecutor(args.jobs) as pool:
        tests_from = None if args.tests_from is None else args.tests_from.resolve()
        runner = Runner(Path(work), args.jobs, tests_from, [f for f in faults if f.name not in made])
        for result in pool.map(runner.run, in_turns([f for f in faults if f.name not in made])):
            made[result.name] = result
            results = [made[fault.name] for fault in faults if fault.name in made]
            if args.out:  # what there is so far: a run takes long
                write(results, args.out)
    counts = {
        kind: [r.name for r in results if r.result == kind]
        for kind in ("killed", "survived", "broken", "not run")
    }
    print()
    for kind, names in counts.items():
        print(f"{len(names):4} {kind}" + (f": {', '.join(names)}" if kind != "killed" and names else ""))
    return 1 if counts["survived"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
