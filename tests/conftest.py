"""One environment for every test, settled before vLLM, Triton or a kernel is imported.

Engines run in this process (no engine-core child), with private vLLM caches, on one thread: the models are
tiny.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Made by the process that was started; those that pytest-xdist starts inherit it.
CACHE = "DEJAVU_TESTS_CACHE"
_owner = CACHE not in os.environ
_cache_root = os.environ[CACHE] if not _owner else tempfile.mkdtemp(prefix="vllm-dejavu-tests.")
os.environ[CACHE] = _cache_root
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    # Private, yet shared by the session: vLLM inspects a model class in a child process of 8 s once, then
    # finds it here.
    VLLM_CACHE_ROOT=_cache_root,
    VLLM_RPC_BASE_PATH=_cache_root,  # sockets, which a killed process leaves behind
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
# The CPU worker would otherwise pin pytest itself to cores; with one thread a core, tiny models wait at
# barriers.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the engines say kv_cache_memory_bytes
os.environ.pop("VLLM_PLUGINS", None)

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from artifact_files import copy, model_dir, original  # noqa: E402, F401
from serving import Served  # noqa: E402
from tiny import make_artifact, make_nemotron, make_opt  # noqa: E402
from training_runs import model, text, trained, undrawn  # noqa: E402, F401

# What a child process may take before it counts as hung. Not a measure of anything: no child takes a tenth of
# it, on a busy machine either.
HANG_S = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "on_demand" in item.keywords and os.environ.get("DEJAVU_ON_DEMAND") != "1":
            item.add_marker(pytest.mark.skip(reason="takes minutes: DEJAVU_ON_DEMAND=1 runs it"))
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests one process runs one after the other. Not by `xdist_group`, which pytest 9.2 ignores
    (pytest-xdist 3.8).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            name = file.rpartition("/")[2]
            if name.startswith("test_kernel_"):
                return nodeid  # they share nothing: whoever is idle takes the next one
            # module fixtures, engines, one server
            return "servers" if name.startswith("test_server") else file

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went: no test decides by it, but the suite as a whole is to stay short."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if not seconds:
        return
    terminalreporter.section("ten slowest files, seconds of one process")
    for name, spent in seconds.most_common(10):
        terminalreporter.write_line(f"{spent:7.1f}  {name}")


# Numbers drawn without a generator of one's own depend neither on the order of tests nor on who was first to
# ask for a shared fixture. A generator with a seed is still better: it says what the numbers depend on.


def _seed(name: str) -> None:
    number = zlib.crc32(name.encode())  # hash() would differ from process to process
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """What a test left behind is that test's fault, not of whichever comes next in this process."""
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "it left autograd off"
    # The next torch.compile in this process would fail by it ("you set no_dispatch()"), in another test;
    # tests/engine.py says how it comes about.
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python):
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Python, False)
        warnings.warn(f"{item.nodeid} left PyTorch's Python dispatch key excluded", stacklevel=1)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(f"{item.path.name}::{item.name}")  # not its nodeid, to which pytest-xdist adds


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what tests/engine.py froze: or nanobind calls it leaks
    if _owner:
        shutil.rmtree(_cache_root, ignore_errors=True)


def _cached(tmp_path_factory: pytest.TempPathFactory, kind: str, make):
    made = {}

    def get(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp(kind) / kind, *args, **kwargs)
        return made[key]

    return get


@pytest.fixture(scope="session")
def opt(tmp_path_factory):
    """opt(**kwargs of tiny.make_opt) -> directory of a tiny random OPT; one a session for equal arguments."""
    return _cached(tmp_path_factory, "model", make_opt)


@pytest.fixture(scope="session")
def nemotron(tmp_path_factory):
    """nemotron(**kwargs of tiny.make_nemotron) -> as `opt`."""
    return _cached(tmp_path_factory, "model", make_nemotron)


@pytest.fixture(scope="session")
def predictors(tmp_path_factory):
    """predictors(model_dir, **kwargs of tiny.make_artifact) -> directory of an artifact; one a session for
    equal arguments.
    """
    return _cached(tmp_path_factory, "artifact", make_artifact)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A `serving.Served`; its server is started when it is first asked for."""
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.stop()


@pytest.fixture
def server(served):
    """The shared server, running."""
    return served.running()


@pytest.fixture
def isa(request):
    """The native kernels' instruction set of this name, for one test."""
    from native import instruction_set  # which skips whoever imports it where the kernels are not built

    with instruction_set(request.param):
        yield request.param
